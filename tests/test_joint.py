"""Whole runs of models that are fine-tuned together, and of students that one or several of them teach."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from conftest import FILLER, GOOD, tiny_model, tiny_tokenizer
from kd.build.check import check_run
from kd.build.inputs import ExpectedModels
from kd.build.models import build_models
from kd.build.parts import examples_of
from kd.errors import InputError
from kd.forward import Needs
from kd.models import Encoder
from kd.results.tables import score
from kd.runs.identity import backbone_of
from kd.runs.run import Run
from kd.training import execute
from kd.training import fit as fitting
from whole_runs import Small, broken_off, checked, last_weights, made, over, planned, same_weights, torchrun, weights

Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second backbone: a RoBERTa of the same width, with other layers and fewer words."""
    folder = tmp_path_factory.mktemp("models") / "other"
    words = [*reversed(FILLER), *GOOD]
    tokenizer = tiny_tokenizer(words)
    model = tiny_model(seed=3, model_type="roberta", layers=3, initializer_range=0.1)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def joint(small: Small, other: Path) -> Words:
    """Overrides of a run of two members: `a`, the first two layers of the backbone, and `b`, the other backbone."""

    def overrides(*more: str) -> list[str]:
        members = f"cohort.students=[{{name: a}},{{name: b,layers: null,backbone: {other}}}]"
        return small("method=finetune", "teacher=[]", "cohort=joint", members, "trainer.selection=last", *more)

    return overrides


@pytest.fixture(scope="module")
def finished(joint: Words) -> tuple[Run, dict]:
    """A run of both members."""
    return made(joint())


def students_of(run: Run) -> dict[str, Encoder]:
    return build_models(run, next(iter(examples_of(run).values())).task).students


def head(weights: dict[str, torch.Tensor], family: str) -> list[torch.Tensor]:
    paths = {"bert": ("bert.pooler.dense", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}[family]
    return [weights[f"{path}.{kind}"] for path in paths for kind in ("weight", "bias")]


# The run


def test_members_begin_with_the_pooling_of_the_first_backbone(joint: Words, backbone: Path) -> None:
    a, b = students_of(planned(joint())).values()
    assert (a.depth, b.depth, b.config.model_type) == (2, 3, "roberta")
    assert all(one is same for one, same in zip(a.head_layers, b.head_layers, strict=True))
    pooler = AutoModelForSequenceClassification.from_pretrained(backbone).bert.pooler.dense.weight
    assert torch.equal(b.head_layers[0].weight, pooler)
    (alone,) = students_of(planned([*joint(), "cohort=single", "cohort.students=1"])).values()
    assert same_weights(a.state_dict(), alone.state_dict())
    one, own = students_of(planned(joint("cohort.share=none"))).values()
    assert not torch.equal(one.head_layers[1].weight, own.head_layers[1].weight)
    assert same_weights(dict(b.base.state_dict()), dict(own.base.state_dict()))


def test_every_member_is_exported_as_a_plain_model_with_the_logits_that_it_was_trained_to(
    finished: tuple[Run, dict], other: Path, reviews: Path
) -> None:
    run, record = finished
    assert set(record["students"]) == {"a", "b"}
    heads, trained, members = [], last_weights(run), students_of(run)
    texts = [line.partition(",")[0] for line in (reviews / "test.csv").read_text().splitlines()[1:9]]
    for name, entry in record["students"].items():
        folder, member = run.directory / entry["folder"], members[name]
        member.load_state_dict(
            {key.removeprefix(f"student-{name}."): value for key, value in trained.items() if name in key[:10]}
        )
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        given = {key: inputs[key] for key in member.family.inputs}
        with torch.no_grad():
            ours, theirs = member.eval()(dict(inputs), Needs()).logits, model.eval()(**given).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        assert entry["export_difference"] <= 1e-5
        heads.append(head(model.state_dict(), model.config.model_type))
    assert all(torch.equal(one, same) for one, same in zip(*heads, strict=True))
    assert record["students"]["b"]["init"].endswith("backbone other; pooling and prediction layer of a")
    assert "pooling" not in record["students"]["a"]["init"]
    cards = {name: (run.directory / entry["folder"] / "README.md").read_text() for name, entry in record["students"].items()}
    assert "Base model: `other`" in cards["b"]
    assert "Base model: `backbone`" in cards["a"]
    assert run.digest_inputs["cohort"]["backbones"]["b"] in cards["b"]
    assert str(other.parent) not in cards["b"]


def test_its_folders_are_exported_again(joint: Words, tmp_path: Path) -> None:
    run, record = made(joint(f"paths.runs={tmp_path}", "trainer.max_epochs=1"))
    for entry in record["students"].values():
        (run.directory / entry["folder"] / "model.safetensors").unlink()
    assert execute.execute(run)["files"] == record["files"]
    assert run.is_done(thorough=True)


def test_without_sharing_each_member_is_fine_tuned_as_if_alone(joint: Words, other: Path, tmp_path: Path) -> None:
    """To the bit, from the same initial weights, in the same batches, and without dropout, whose masks differ."""
    more = ("student.dropout=0", "seed=3")
    run, _ = made(joint("cohort.share=none", *more))
    for name, student in students_of(run).items():
        start = tmp_path / name
        start.mkdir()
        student.save(start)
        own = ["student.layers=null", f"student.backbone={other}"] if name == "b" else []
        alone, _ = made(
            [
                *joint(*more),
                "cohort=single",
                "cohort.students=1",
                "student.init=checkpoint",
                f"student.checkpoint={start}",
                *own,
            ]
        )
        assert same_weights(last_weights(run, f"student-{name}."), last_weights(alone, "student."))
    shared = last_weights(planned(joint(*more))) if planned(joint(*more)).result else last_weights(made(joint(*more))[0])
    assert not torch.equal(shared["student-a.model.classifier.weight"], last_weights(run)["student-a.model.classifier.weight"])


def test_a_stopped_run_resumes_to_the_bit(
    finished: tuple[Run, dict], joint: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, record = finished
    run = planned(joint(f"paths.runs={tmp_path}", "trainer.checkpoint_minutes=0"))
    broken_off(run, 8, monkeypatch)
    again = execute.execute(run)
    assert run.digest == unbroken.digest
    assert same_weights(last_weights(run), last_weights(unbroken))
    assert again["files"] == record["files"]
    saved = torch.load(run.checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    places = [
        saved[f"student-{name}.model.{path}.weight"] for name, path in (("a", "classifier"), ("b", "classifier.out_proj"))
    ]
    assert places[0].data_ptr() == places[1].data_ptr()


@pytest.mark.ddp
def test_two_ranks_train_what_one_does(joint: Words, tmp_path: Path) -> None:
    overrides = joint("student.dropout=0", "trainer.clip=0.1", "optimizer.weight_decay=0.5")
    one, _ = made(overrides)
    torchrun([*overrides, f"paths.runs={tmp_path}", "trainer=ddp", "trainer.accelerator=cpu"])
    (result,) = tmp_path.glob("finetune-*/result.json")
    record = json.loads(result.read_text())
    assert (record["digest"], record["ranks"]) == (one.digest, 2)
    found = torch.load(result.parent / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in last_weights(one).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0)


def test_what_the_members_are_is_in_the_digest(joint: Words, small: Small, backbone: Path, other: Path) -> None:
    run, alone = over(joint()), over(small("method=finetune", "teacher=[]"))
    digests = {
        run(*more).digest
        for more in (
            (),
            ("cohort.share=none",),
            ("cohort.students=[{name: a},{name: b,layers: null}]",),
            (f"cohort.students=[{{name: b,layers: null,backbone: {other}}},{{name: a}}]",),
        )
    }
    assert len(digests) == 4
    named = [f"cohort.students=[{{name: a,backbone: {backbone}}},{{name: b}}]", "cohort.students=[{name: a},{name: b}]"]
    assert run(named[0]).digest == run(named[1]).digest, "it is the backbone that the member would have anyway"
    assert alone("cohort.students=[3l]").digest == alone("student=3l").digest != alone().digest
    assert alone("cohort.students=[3l]").name.startswith("finetune-3l-")
    assert alone("cohort.students=[2l]").digest == alone().digest
    assert alone(f"cohort.students=[{{backbone: {other}}}]").digest != alone().digest
    assert "share" not in planned(small("method=dml", "teacher=[]")).digest_inputs["cohort"]


# Its students


@pytest.fixture(scope="module")
def taught(small: Small, backbone: Path) -> Words:
    """Overrides of a run with two teachers, of four and three layers, that are members of one run."""

    def overrides(*more: str, teachers: tuple[str, ...] = ("joint_6l", "joint_4l")) -> list[str]:
        members = "[{name: 6l,layers: null},{name: 4l,layers: 3}]"
        runs = [
            f"teacher.{name}.{key}={value}"
            for name in teachers
            for key, value in {
                "backbone": backbone,
                "run.cohort.students": members,
                "run.optimizer.lr": 5e-3,
                "run.trainer.max_epochs": 2,
            }.items()
        ]
        return small(f"teacher=[{','.join(teachers)}]", *runs, *more)

    return overrides


def test_two_members_teach_a_student_and_their_run_is_trained_once(
    taught: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []
    original = fitting.fit

    def fit(run: Run, *more: object) -> object:
        trained.append(run.name)
        return original(run, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(fitting, "fit", fit)
    run, record = made(taught("method=mt_bert", f"paths.runs={tmp_path}"))
    first, second = run.inputs.teachers.values()
    assert first.digest == second.digest
    assert trained == [first.name, run.name]
    assert len(list(tmp_path.glob("finetune-*/result.json"))) == 1
    results, printed = json.loads((first.directory / "result.json").read_text()), capsys.readouterr().out
    for name, member in (("joint_6l", "6l"), ("joint_4l", "4l")):
        own = results["students"][member]
        teacher = run.inputs.teachers[name]
        assert teacher.student == first.directory / own["folder"]
        assert record["metrics_teacher"][name] == own["metrics"]
        assert record["parameters"]["teachers"][name] == own["parameters"]
        assert record["cache"][name]["used"]
        assert list(teacher.cache.glob("train-*/about.json"))
        assert teacher.metrics == own["metrics"]
        assert f"teacher '{name}' accuracy {score('accuracy', own['metrics']['validation']['accuracy'])}" in printed
    assert first.student != second.student
    sizes = {name: entry["parameters"] for name, entry in results["students"].items()}
    assert sizes["6l"] > sizes["4l"]
    assert "not trained together" not in printed
    kd, _ = made(taught("method=kd", f"paths.runs={tmp_path}", teachers=("joint_4l",)))
    assert kd.inputs.teachers["joint_4l"].digest == first.digest
    assert trained == [first.name, run.name, kd.name]


def test_students_that_are_alike_need_no_name(small: Small) -> None:
    """Their shape is checked before the teacher is trained, not that of the `student` that their entries vary."""
    cohort = "+teacher.minilm.run.cohort={name: joint,students: [{layers: 3},{layers: 3,dropout: 0.2}],share: none}"
    run = planned(small("method=kd", cohort))
    config, _ = ExpectedModels(run).teacher("minilm", examples_of(run)[run.spec.task.name].task)
    assert config.num_hidden_layers == 3


def test_members_of_two_runs_are_told_of(taught: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = made(taught("method=mt_bert", f"paths.runs={tmp_path}", "teacher.joint_4l.run.seed=1"))
    assert len({needed.digest for needed in run.inputs.teachers.values()}) == 2
    assert "WARN  the teachers are members of 2 runs of 6l, 4l, not trained together" in capsys.readouterr().out


def test_a_student_without_a_backbone_has_that_of_the_member(taught: Words, other: Path) -> None:
    members = f"[{{name: 6l,layers: null}},{{name: 4l,layers: 3,backbone: {other}}}]"
    run = planned(
        taught("method=kd", f"teacher.joint_4l.run.cohort.students={members}", "student.backbone=null", teachers=("joint_4l",))
    )
    assert backbone_of(run.spec) == (str(other), "teacher.joint_4l.run.cohort.students")
    check_run(run, examples_of(run))


def test_the_command_that_trains_the_members_makes_the_run_of_the_teachers(taught: Words, small: Small, backbone: Path) -> None:
    (teacher, _) = planned(taught("method=mt_bert")).inputs.teachers.values()
    more = ("student=full", f"student.backbone={backbone}", "optimizer.lr=5e-3", "trainer.batch_size=32")
    members = "cohort.students=[{name: 6l,layers: null},{name: 4l,layers: 3}]"
    assert planned(small("method=finetune", "teacher=[]", "cohort=joint", members, *more)).digest == teacher.digest


def test_the_member_is_in_the_digest_of_its_student_and_not_in_that_of_its_run(taught: Words) -> None:
    base = over(taught("method=kd", teachers=("joint_6l",)))
    run, other = base(), base("teacher.joint_6l.member=4l")
    assert run.digest != other.digest
    assert run.inputs.teachers["joint_6l"].digest == other.inputs.teachers["joint_6l"].digest
    assert [each.inputs.teachers["joint_6l"].chosen for each in (run, other)] == ["6l", "4l"]


def test_shapes_of_members_are_checked_before_they_are_trained(taught: Words) -> None:
    deep = taught("method=mt_bert", "teacher.joint_4l.run.cohort.students=[{name: 6l,layers: null},{name: 4l,layers: 3}]")
    with pytest.raises(InputError, match=r"layers") as caught:
        checked(over(deep), "method.layers=[[2,4]]")  # the second member has three
    assert caught.value.key == "method.layers"


WRONG = {
    "an unknown member": (["teacher.joint_4l.member=5l"], "teacher.joint_4l.member", "'5l' is not one of 6l, 4l"),
    "a member of a run of one": (
        ["teacher.joint_4l.run.cohort={name: single,students: 1,share: null}"],
        "teacher.joint_4l.member",
        "trains one student",
    ),
    "no member of students that differ": (["teacher.joint_4l.member=null"], "teacher.joint_4l.member", "names one"),
    "a member in a chain": (["pool=takd"], "teacher.joint_4l.member", "the one before it in the chain"),
    "members of two widths": (
        ["teacher.joint_4l.run.cohort.students=[{name: 6l},{name: 4l,init: random,width: 16}]"],
        "teacher.joint_4l.run.cohort.students",
        "one width: '6l' has 32, '4l' has 16",
    ),
    "another word for what is shared": (
        ["teacher.joint_4l.run.cohort.share=body"],
        "teacher.joint_4l.run.cohort.share",
        "head, none",
    ),
    "a backbone that is not there": (
        ["teacher.joint_4l.run.cohort.students=[{name: 6l},{name: 4l,backbone: nowhere}]"],
        "teacher.joint_4l.run.cohort.students",
        "nowhere",
    ),
    "a member of a ready classifier": (
        ["teacher.joint_4l.backbone=null", "+teacher.joint_4l.model={backbone}"],
        "teacher.joint_4l.member",
        "leave it out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_teacher_that_cannot_be_a_member_names_the_key(
    case: str, taught: Words, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, key, message = WRONG[case]
    monkeypatch.setattr(fitting, "fit", lambda *_: pytest.fail("something was trained"))
    with pytest.raises(InputError, match=f"(?s){message}") as caught:
        execute.execute(planned(taught("method=mt_bert", *(word.replace("{backbone}", str(backbone)) for word in more))))
    assert caught.value.key == key


# What cannot be

BAD = {
    "one member": (["cohort.students=1"], "cohort.students", "needs two students or more"),
    "another word": (["cohort.share=body"], "cohort.share", "head, none"),
    "no word": (["cohort.share=null"], "cohort", "cohort=joint, which sets cohort.share"),
    "a member narrower than the first": (
        ["cohort.students=[{},{init: random,width: 16}]"],
        "cohort.students",
        "'2l' has 32, '2l_2' has 16",
    ),
    "members from one checkpoint of backbones of their own": (
        ["student.init=checkpoint", "student.checkpoint={backbone}", "cohort.students=[{},{backbone: {other}}]"],
        "cohort.students",
        "have to be equal",
    ),
    "a member from a run": (["cohort.students=[{},{init: run,backbone: {other}}]"], "cohort.students", "by student.init"),
    "a member deeper than its backbone": (
        ["cohort.students=[{},{layers: 4,backbone: {other}}]"],
        "student.init",
        "takes 4 layers from a model that has 3",
    ),
    "turns": (["+engine.update=sequential"], "engine.update", "engine.update=simultaneous"),
    "an online teacher": (["cohort.teacher=online"], "cohort.teacher", "trained online together"),
    "a masked language model": (["task=text", "task.train={data}/train.csv"], "cohort.share", "cohort.share=none"),
    "masked language models of two vocabularies": (
        [
            "task=text",
            "task.train={data}/train.csv",
            "cohort.share=none",
            "cohort.students=[{},{init: random,backbone: {other}}]",
        ],
        "cohort.students",
        "different vocabularies",
    ),
    "a method in two runs": (
        ["method=tinybert", "teacher=[hub]", "teacher.hub.backbone={backbone}"],
        "cohort",
        "for one student",
    ),
    "a method that replaces the head": (
        ["method=simkd", "teacher=[hub]", "teacher.hub.backbone={backbone}"],
        "cohort.share",
        "method=simkd replaces",
    ),
    "tokens of another vocabulary than the teacher's": (
        ["method=mt_bert", "teacher=[hub]", "teacher.hub.backbone={backbone}", "cohort.students=[{},{backbone: {other}}]"],
        "cohort.students",
        "vocabulary of its own",
    ),
    "sharing alone": (
        ["cohort=single", "cohort.students=1", "cohort.share=head"],
        "cohort.students",
        "cohort.share=head, of cohort=single, needs two students",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_cohort_that_cannot_be_joint_names_the_key(
    case: str, small: Small, backbone: Path, other: Path, reviews: Path
) -> None:
    more, key, message = BAD[case]
    places = {"{backbone}": str(backbone), "{other}": str(other), "{data}": str(reviews)}
    words = []
    for word in more:
        for mark, place in places.items():
            word = word.replace(mark, place)
        words.append(word)
    base = small("method=finetune", "teacher=[]", "cohort=joint")
    if any(word.startswith("task=") for word in words):
        base = [word for word in base if not word.startswith("task")]
    chosen = {word.partition("=")[0] for word in words}
    base = [word for word in base if word.partition("=")[0] not in chosen]
    with pytest.raises(InputError, match=f"(?s){message}") as caught:
        checked(planned, [*base, *words])  # type: ignore[arg-type]
    assert caught.value.key == key


def test_mutual_students_may_share_layers_too(small: Small) -> None:
    run, _ = made(small("method=dml", "teacher=[]", "cohort.share=head", "cohort.students=[2l,3l]", "trainer.selection=last"))
    exported = weights(run)
    peer = AutoModelForSequenceClassification.from_pretrained(next((run.directory / "peers").iterdir())).state_dict()
    assert all(torch.equal(one, other) for one, other in zip(head(exported, "bert"), head(peer, "bert"), strict=True))
