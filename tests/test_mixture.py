"""Whole runs on mixtures of tasks: one student with a head for each, trained a task at a time."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from conftest import BAD, GOOD, sentence, write_csv
from kd.bench import cell
from kd.bench.workers import Finished
from kd.bench.workers import Job as Measurement
from kd.build.check import check_run
from kd.build.parts import build_parts, engine_of, examples_of
from kd.config.compose import check_overrides, compose
from kd.config.mixture import check_mixture
from kd.config.schema import KEEP, TaskSpec
from kd.data.mixture import Mixture
from kd.data.tasks import Classification
from kd.errors import InputError
from kd.launch.measure import CELL
from kd.results.maps import read_maps
from kd.results.mixture import scores
from kd.runs.members import members
from kd.runs.retention import USES
from kd.system.files import LOCK
from kd.training import execute
from kd.training.leftovers import Folder
from whole_runs import broken_off, check_predictions, last_weights, made, planned, same_weights, torchrun, weights

Mixed = Callable[..., list[str]]


def write_scores(path: Path, count: int, seed: int) -> Path:
    """Sentences whose score is the share of good words in them."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        good, bad = generator.randint(0, 3), generator.randint(0, 3)
        words = generator.choices(GOOD, k=good) + generator.choices(BAD, k=bad)
        rows.append((sentence(generator, words or GOOD), round(good / max(good + bad, 1), 3)))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of three tasks: `mood` of two classes, `kind` of two others, `score`."""
    folder = tmp_path_factory.mktemp("tasks")
    for seed, (split, count) in enumerate({"train": 64, "validation": 24, "test": 24}.items()):
        write_csv(folder / f"mood_{split}.csv", count, seed)
        write_csv(folder / f"kind_{split}.csv", count // 2, 10 + seed, ("bad", "fine"))
        write_scores(folder / f"score_{split}.csv", count // 2, 20 + seed)
    return folder


@pytest.fixture(scope="module")
def mixed(files: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """Overrides of a run on the mixture of these tasks: `mixed("mood", "score")("method=kd")`."""
    runs = tmp_path_factory.mktemp("runs")

    def of(*names: str) -> Callable[..., list[str]]:
        def task(name: str) -> list[str]:
            sources = [f"task.of.{name}.{split}={files}/{name}_{split}.csv" for split in ("train", "validation", "test")]
            kind = ["kind=regression", "metrics=[pearson,mse]", "monitor=pearson"] if name == "score" else []
            return [
                f"+task@task.of.{name}=file",
                *sources,
                f"task.of.{name}.max_length=32",
                *(f"task.of.{name}.{word}" for word in kind),
            ]

        def overrides(*more: str) -> list[str]:
            options = {"backbone": backbone, "run.optimizer.lr": 5e-3, "run.trainer.max_epochs": 3}
            teacher = [f"teacher.minilm.{key}={value}" for key, value in options.items()]
            return [
                "student=2l",
                "task=mixture",
                *(word for name in names for word in task(name)),
                *([] if "teacher=[]" in more else teacher),
                f"backbone={backbone}",
                f"paths.runs={runs}",
                "trainer.progress=none",
                "trainer.keep=all",
                "trainer.max_epochs=2",
                "trainer.batch_size=16",
                "optimizer.lr=5e-3",
                *more,
            ]

        return overrides

    return of


def alone(name: str, overrides: list[str]) -> list[str]:
    """The overrides of a mixture of one task, as a run of that task alone, whose student begins as that of a mixture does."""
    own = [word.replace(f"task.of.{name}.", "task.") for word in overrides if not word.startswith("+task@")]
    return ["student.init_from=pretrained", *("task=file" if word == "task=mixture" else word for word in own)]


def test_a_mixture_trains_one_body_and_a_head_for_each_task(mixed: Mixed, capsys: pytest.CaptureFixture[str]) -> None:
    run, record = made(mixed("mood", "kind", "score")("method=finetune", "teacher=[]", "trainer.max_epochs=12"))
    metrics = record["metrics"]["validation"]
    assert list(metrics) == ["mean", "mood/accuracy", "kind/accuracy", "score/pearson", "score/mse"]
    monitored = [metrics["mood/accuracy"], metrics["kind/accuracy"], metrics["score/pearson"]]
    assert metrics["mean"] == pytest.approx(sum(monitored) / 3)
    assert metrics["mood/accuracy"] > 0.8
    heads, bodies = {}, {}
    for name in ("mood", "kind", "score"):
        model = AutoModelForSequenceClassification.from_pretrained(run.student / name)
        bodies[name], heads[name] = model.bert.state_dict(), model.classifier.weight
    assert same_weights(bodies["mood"], bodies["kind"])
    assert same_weights(bodies["mood"], bodies["score"])
    assert heads["score"].shape[0] == 1
    assert not torch.equal(heads["mood"], heads["kind"])
    (answer,) = pipeline("text-classification", model=str(run.student / "kind"))("a film great it")
    assert answer["label"] in ("bad", "fine")
    assert record["labels"] == {"mood": ["negative", "positive"], "kind": ["bad", "fine"], "score": None}
    check_predictions(run, record)
    assert {path.name for path in run.directory.glob("predictions*/*")} == {"mood.npz", "kind.npz", "score.npz"}
    assert set(record["files"]) >= {f"student/{name}/model.safetensors" for name in heads}
    assert run.is_done(thorough=True)
    execute.deliver(run)
    table = capsys.readouterr().out
    for words in ("validation mean", "pearson", "constant prediction"):
        assert words in table
    card = (run.student / "kind" / "README.md").read_text()
    assert "bad, fine" in card


def test_each_task_of_a_mixture_has_a_budget_for_its_teachers_outputs(mixed: Mixed, tmp_path: Path) -> None:
    """The 600 bytes are logits of 75 examples: 48 are evaluated and 27 trained on; of the smaller task, all are cached."""
    _, record = made(mixed("mood", "kind")("method=kd", "cache=600", f"paths.runs={tmp_path}"))
    caches, work = record["cache"], record["teacher_forwards"]
    assert {name: cache["live"] for name, cache in caches.items()} == {"mood/minilm": {"train": 64 - 27}, "kind/minilm": {}}
    assert {name: cache["budget"] for name, cache in caches.items()} == {"mood/minilm": 600, "kind/minilm": 600}
    assert {name: done["examples"] for name, done in work.items()} == {"mood/minilm": 27 + 2 * 37, "kind/minilm": 32}


def test_a_mixture_retains_its_predictions_whatever_it_removes(mixed: Mixed, tmp_path: Path) -> None:
    """A run is reduced from word to word; kd-clean has nothing to remove after any of them."""
    words = mixed("mood", "score")("method=finetune", "teacher=[]", "trainer.max_epochs=1", f"paths.runs={tmp_path}")
    figures = {"result.json", "config.yaml", "metrics.csv", "predictions/mood.npz", "predictions/score.npz"}
    last = {"checkpoints/last.ckpt"}
    checkpoints = {"checkpoints/best.ckpt", "checkpoints/costs.json"}
    for keep in KEEP:
        run, record = made([*words, f"trainer.keep={keep}"])
        names = (LOCK, USES)
        found = {path.relative_to(run.directory).as_posix() for path in run.directory.rglob("*") if path.is_file()} - {*names}
        exported = {name for name in found if name.startswith("student/")}
        assert {name.split("/")[1] for name in exported} == (set() if keep == "figures" else {"mood", "score"})
        assert found - exported == figures | {"all": last | checkpoints, "best": checkpoints}.get(keep, set())
        check_predictions(run, record)
        assert run.is_done()
        assert not list(Folder(tmp_path).leftovers())


def test_a_mixture_of_one_task_is_that_task_alone(mixed: Mixed) -> None:
    more = ("method=kd", "trainer.accumulate=2", "task.of.mood.limit_train=57")
    whole, record = made(mixed("mood")(*more))
    single, own = made(alone("mood", mixed("mood")(*more)))
    ours = AutoModelForSequenceClassification.from_pretrained(whole.student / "mood").state_dict()
    assert same_weights(ours, weights(single))
    assert record["metrics"]["test"]["mood/accuracy"] == own["metrics"]["test"]["accuracy"]
    assert record["tasks"]["mood"]["metrics_teacher"] == own["metrics_teacher"]


def test_a_step_moves_the_head_of_its_task_alone(mixed: Mixed) -> None:
    """Not even by weight decay: tau so large that the smaller task is never drawn leaves its head as it was begun."""
    run, _ = made(mixed("mood", "kind")("method=finetune", "teacher=[]", "task.tau=100", "optimizer.weight_decay=0.5"))
    begun, _ = made(
        mixed("mood", "kind")("method=finetune", "teacher=[]", "task.tau=100", "optimizer.lr=1e-12", "optimizer.weight_decay=0")
    )
    ends = [last_weights(one) for one in (run, begun)]
    head = "of-kind.student.model.classifier.weight"
    assert torch.equal(ends[0][head], ends[1][head])
    assert not torch.equal(ends[0][head.replace("kind", "mood")], ends[1][head.replace("kind", "mood")])


def test_a_stopped_mixture_resumes_to_the_bit(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = mixed("mood", "score")("method=pkd", "trainer.checkpoint_minutes=0", "task.tau=0.5")
    unbroken, _ = made([*overrides, "paths.runs=" + overrides_runs(overrides) + "/unbroken"])
    run = planned(overrides)
    broken_off(run, 8, monkeypatch)  # inside the second epoch of six batches
    execute.execute(run)
    assert run.digest == unbroken.digest
    assert same_weights(last_weights(run), last_weights(unbroken))


def overrides_runs(overrides: list[str]) -> str:
    """The folder of runs of some overrides."""
    return next(word.partition("=")[2] for word in overrides if word.startswith("paths.runs="))


@pytest.mark.ddp
def test_two_ranks_train_the_mixture_that_one_does(mixed: Mixed, tmp_path: Path) -> None:
    overrides = mixed("mood", "score")(
        "method=finetune", "teacher=[]", "student.dropout=0", "trainer.clip=0.1", "optimizer.weight_decay=0.5"
    )
    one, _ = made(overrides)
    two = [*overrides, f"paths.runs={tmp_path}", "trainer=ddp", "trainer.accelerator=cpu"]
    torchrun(two)
    (result,) = tmp_path.glob("finetune-*/result.json")
    record = json.loads(result.read_text())
    assert record["digest"] == one.digest
    check_predictions(planned(two), record)
    for name, tensor in last_weights(one).items():
        found = torch.load(result.parent / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"][name]
        torch.testing.assert_close(found, tensor, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "more",
    [
        ["method=tinybert", "method.before.run.trainer.max_epochs=1"],
        ["method=rl_kd", "method.before=null"],
        ["method=kd", "surgery=[cut_vocabulary]"],
        ["method=kd", "cohort=mutual", "cohort.students=2"],
        ["method=simkd"],
        ["method=one", "teacher=[]"],
        ["method=pkd", "surgery=[sps]"],
        ["method=dml", "cohort.students=2", "teacher=[]"],
        ["method=p2p_mutual", "cohort.teacher=online", "cohort.students=2"],
    ],
    ids=lambda more: more[0],
)
def test_mixtures_compose(mixed: Mixed, backbone: Path, more: list[str]) -> None:
    second = [f"teacher.minilm_4l.backbone={backbone}"] if "method=rl_kd" in more else []
    run, record = made(mixed("mood", "score")(*more, *second, "trainer.max_epochs=1"))
    assert record["metrics"]["test"]["mean"] is not None
    assert run.is_done()
    mood, score = (AutoModelForSequenceClassification.from_pretrained(run.student / name) for name in ("mood", "score"))
    assert same_weights(mood.bert.state_dict(), score.bert.state_dict())
    assert (mood.config.num_labels, score.config.num_labels) == (2, 1)
    check_predictions(run, record)


def test_a_mixture_writes_the_maps_of_all_its_tasks(mixed: Mixed) -> None:
    run, _ = made(mixed("mood", "score")("method=pkd", "surgery=[sps]", "trainer.max_epochs=1"))
    assert [(one.task, one.teacher, one.name) for one in read_maps(run.directory)] == [
        ("mood", "minilm", "hidden"),
        ("score", "minilm", "hidden"),
    ]


def test_a_mixture_does_not_share_heads_among_members(mixed: Mixed) -> None:
    """Its tasks have prediction layers of their own over one body, of which the pooling is a part in some families."""
    with pytest.raises(InputError, match="layers of their own over one body") as caught:
        planned(mixed("mood", "score")("method=finetune", "cohort=joint", "cohort.students=[2l,3l]", "teacher=[]"))
    assert caught.value.key == "cohort.share"


def test_a_member_of_a_mixture_teaches_each_task(mixed: Mixed) -> None:
    cohort = "+teacher.minilm.run.cohort={name: joint,students: [{name: a},{name: b,layers: 3}],share: none}"
    run, _ = made(mixed("mood", "score")("method=kd", cohort, "+teacher.minilm.member=b", "trainer.max_epochs=1"))
    folders = {name: one.inputs.teachers["minilm"].student for name, one in members(run).items()}
    for name, folder in folders.items():
        assert folder.name == name
        assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_hidden_layers == 3


def test_its_folders_are_exported_again(mixed: Mixed) -> None:
    run, record = made(mixed("mood", "kind", "score")("method=kd"))
    (run.student / "kind" / "model.safetensors").unlink()
    assert not run.is_done()
    again = execute.execute(run)
    assert again["files"] == record["files"]
    assert run.is_done(thorough=True)


def test_gradients_are_clipped_once_for_each_student(mixed: Mixed) -> None:
    run = planned(mixed("mood", "score")("method=finetune", "teacher=[]"))
    parts = build_parts(run, examples_of(run))
    engine = engine_of(run, {name: part.engine for name, part in parts.items()}, examples_of(run))
    (group,) = engine.trained()
    assert len(group) == len(set(group))
    assert set(group) == set(engine.parameters())


def test_a_task_of_a_mixture_has_a_run_of_its_own_folder(mixed: Mixed) -> None:
    run = planned(mixed("mood", "score")("method=kd"))
    parts = members(run)
    assert list(parts) == ["mood", "score"]
    assert parts["score"].student == run.student / "score"
    assert parts["score"].inputs.teachers["minilm"].student == run.inputs.teachers["minilm"].student / "score"
    assert parts["mood"].spec.task.name == "mood"


def checked(overrides: list[str]) -> None:
    """Plan a run, and check it as is done before anything is trained."""
    run = planned(overrides)
    check_run(run, examples_of(run, planned=True))


def test_teachers_of_one_task_each(mixed: Mixed) -> None:
    overrides = mixed("mood", "score")("method=kd", "teacher.minilm.tasks=each")
    run, record = made(overrides)
    assert [str(role) for role, _ in run.inputs] == ["teacher minilm/mood", "teacher minilm/score"]
    for name, one in members(run).items():
        teacher = one.inputs.teachers["minilm"]
        assert teacher.spec.task.name == name
        theirs = record["tasks"][name]["metrics_teacher"]["minilm"]["test"]
        assert theirs == (teacher.result or {})["metrics"]["test"]
        assert (teacher.directory / "cache").is_dir()
    single = planned(alone("mood", mixed("mood")("method=kd", "task.of.mood.name=mood")))
    assert single.inputs.teachers["minilm"].digest == members(run)["mood"].inputs.teachers["minilm"].digest


def test_a_student_of_one_task_has_the_teacher_of_a_mixture(mixed: Mixed) -> None:
    """Its own task is as it has it, others are those of their files, which have no limits."""
    tasks = "teacher.minilm.tasks=[rotten_tomatoes,mood]"
    run = planned(alone("mood", mixed("mood")("method=kd", "task.of.mood.name=mood", "task.of.mood.limit_train=9", tasks)))
    teacher = run.inputs.teachers["minilm"]
    assert list(teacher.spec.task.of) == ["rotten_tomatoes", "mood"]
    assert teacher.spec.task.of["mood"].train == run.spec.task.train
    assert [one.limit_train for one in teacher.spec.task.of.values()] == [None, 9]
    assert members(run)["mood"].inputs.teachers["minilm"].student == teacher.student / "mood"


def test_a_teacher_of_the_same_tasks_is_that_of_the_mixture(mixed: Mixed) -> None:
    named, plain = (planned(mixed("mood", "score")("method=kd", *more)) for more in (["teacher.minilm.tasks=[mood,score]"], []))
    assert named.digest == plain.digest


def test_a_teacher_for_each_of_one_task_is_its_teacher(mixed: Mixed) -> None:
    each, plain = (planned(alone("mood", mixed("mood")("method=kd", *more))) for more in (["teacher.minilm.tasks=each"], []))
    assert each.digest == plain.digest


def test_the_record_names_all_that_made_the_run(mixed: Mixed) -> None:
    more = ("method=tinybert", "method.before.run.trainer.max_epochs=1", "trainer.max_epochs=1", "trainer.accumulate=8")
    run, record = made(mixed("mood", "score")(*more, "teacher.minilm.tasks=each"))
    assert list(record["inputs"]) == ["teacher minilm/mood", "teacher minilm/score", "before"]
    assert record["identity"]["before"]["method"]["name"] == "tinybert_layers"
    assert (record["accumulate"], record["batch_size"]) == (6, 96)  # all the batches of an epoch
    card = (run.student / "score" / "README.md").read_text()
    assert "mood, score, drawn in proportion to n^1" in card


def test_a_list_of_tasks_is_a_mixture_and_a_sweep_has_lists_and_words(tmp_path: Path) -> None:
    overrides = ["task=[sst2,rte]", f"paths.runs={tmp_path}", "paths.glue=nowhere"]
    config = compose(overrides)
    assert list(config.task.of) == ["sst2", "rte"]
    check_overrides(["task=[sst2,rte],sst2", "task=[sst2,rte],[mrpc,rte]"])
    with pytest.raises(InputError, match="twice"):
        check_overrides(["task=[rte,rte]"])
    with pytest.raises(InputError, match="names no task"):
        check_overrides(["task=[]"])


def test_a_student_of_one_task_may_begin_with_that_of_a_mixture(mixed: Mixed) -> None:
    whole = planned(mixed("mood", "score")("method=kd"))
    tasks = [word for word in mixed("mood", "score")() if word.startswith(("+task@", "task"))]
    stage = ",".join(f"'{word}'" for word in ["method=kd", "edit=[]", *tasks])
    own = alone("mood", mixed("mood")("method=kd", "task.of.mood.name=mood"))
    run, _ = made([*own, "student.init=run", f"student.run=[{stage}]"])
    assert run.inputs.stage is not None
    assert run.inputs.stage.digest == whole.digest
    assert members(run)["mood"].init_run.student == whole.student / "mood"


def test_a_head_whose_labels_change_between_stages_is_refused(mixed: Mixed, tmp_path: Path) -> None:
    splits = {split: write_csv(tmp_path / f"{split}.csv", 24, 3, ("ugly", "nice")) for split in ("train", "validation", "test")}
    stage = ",".join(f"'task.of.kind.{split}={path}'" for split, path in splits.items())
    with pytest.raises(InputError, match=r"\['nice', 'ugly'\].*\['bad', 'fine'\]") as refusal:
        checked(mixed("mood", "kind")("method=kd", "student.init=run", f"student.run=[{stage}]"))
    assert refusal.value.key == "task.of.kind.labels"


def test_a_start_that_lacks_a_task_is_refused(mixed: Mixed) -> None:
    tasks = [word for word in mixed("mood", "score")() if word.startswith(("+task@", "task"))]
    stage = ",".join(f"'{word}'" for word in ["method=kd", *tasks])
    with pytest.raises(InputError, match="no model for 'kind'") as refusal:
        checked([*mixed("mood", "kind")("method=kd"), "student.init=run", f"student.run=[{stage}]"])
    assert refusal.value.key == "student.run"


def test_a_name_with_a_dot_is_refused() -> None:
    task = TaskSpec("mix", "mixture", {}, [], None, metrics=[], monitor="mean", of={"a.b": TaskSpec(kind="classification")})
    with pytest.raises(InputError, match="dot"):
        check_mixture(task)


def test_a_mean_is_of_all_tasks() -> None:
    tasks = {name: Classification(name, ["x", "y"], {}, ["accuracy"], "accuracy") for name in "ab"}
    mixture = Mixture("mix", tasks, "mean")
    assert scores(mixture, {"a": {"accuracy": 0.5}, "b": {"accuracy": 1.0}})["mean"] == 0.75
    assert scores(mixture, {"a": {"accuracy": 0.5}}) == {"a/accuracy": 0.5}
    assert scores(mixture, {}) == {}


BAD_INPUT = {
    "a pool that ranks": (["pool=best", "teacher=[minilm,minilm_4l]"], "pool.distribution", "one task"),
    "an edit of all": (["edit=[label_noise]"], "task.edits", "task.of.<name>.edits"),
    "a teacher of fewer tasks": (["teacher.minilm.tasks=[rte]"], "teacher.minilm.tasks", "'mood'"),
    "starts from several teachers": (
        ["teacher.minilm.tasks=each", "student.init_from=teacher"],
        "student.init_from",
        "one for each task",
    ),
    "a teacher of a task twice": (["teacher.minilm.tasks=[mood,mood,kind,score]"], "teacher.minilm.tasks", "twice"),
    "a teacher of no such task": (["teacher.minilm.tasks=[mood,kind,score,rtf]"], "teacher.minilm.tasks", "no task 'rtf'"),
    "a teacher of a text": (["teacher.minilm.tasks=[mood,kind,score,imdb_text]"], "teacher.minilm.tasks", "masked_lm"),
    "tasks of an online teacher": (
        ["teacher.minilm.tasks=each", "cohort=mutual", "cohort.teacher=online"],
        "teacher.minilm.tasks",
        "run of its own",
    ),
    "a teacher of no tasks": (["teacher.minilm.tasks=all"], "teacher.minilm.tasks", "each"),
    "a negative tau": (["task.tau=-1"], "task.tau", "-1"),
    "a metric that no task has": (["task.monitor=mood/f2"], "task.monitor", "mood/accuracy"),
    "a key of one task": (["+task.max_length=16"], "task.max_length", "task.of.<name>.max_length"),
    "an error as part of the mean": (["task.of.score.monitor=mse"], "task.monitor", "largest is best"),
    "a file that is missing": (["task.of.kind.train=nowhere.csv"], "task.of.kind.train", "nowhere.csv"),
    "a masked language model": (["task.of.kind.kind=masked_lm"], "task.of.kind.kind", "classification, regression"),
    "too few positions": (["task.of.score.max_length=100"], "task.of.score.max_length", "positions"),
}


@pytest.mark.parametrize(("more", "key", "words"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_mixtures_are_refused(mixed: Mixed, more: list[str], key: str, words: str) -> None:
    with pytest.raises(InputError) as refusal:
        checked(mixed("mood", "kind", "score")("method=kd", *more))
    assert refusal.value.key == key
    assert words in refusal.value.message


def test_a_single_task_is_identified_as_before(mixed: Mixed) -> None:
    """A single task has no key of a mixture in its identity, so that its digest is what it was."""
    run = planned(alone("mood", mixed("mood")("method=kd")))
    assert not {"of", "tau"} & run.digest_inputs["task"].keys()


def test_steps_of_a_mixture_are_measured_as_they_are_trained(mixed: Mixed, tmp_path: Path) -> None:
    """Batches of both tasks, the same in each turn."""
    words = [*mixed("mood", "score")("method=finetune", "teacher=[]"), f"paths.runs={tmp_path}"]
    words = [word for word in words if not word.startswith("teacher.")]
    run = planned(words)
    prepared = cell.prepare(run, examples_of(run))
    data = cell.FirstBatches(prepared.data, 4)
    turns = [[(batch.task, batch.index.tolist()) for batch in data.train_dataloader()] for _ in range(2)]
    assert turns[0] == turns[1] == [(batch.task, batch.index.tolist()) for batch in prepared.data.train_dataloader()][:4]
    assert {task for task, _ in turns[0]} == {"mood", "score"}
    sent: list[dict[str, int]] = []

    class Gate:
        def ready(self, facts: dict[str, int], accelerator: str) -> None:
            sent.append(facts)

        def open(self) -> None:
            if len(sent) > 1:
                raise Finished

        def close(self, examples: int) -> None:
            sent.append({"examples": examples})

    with pytest.raises(Finished):
        cell.train_cell(Measurement(CELL, tuple(words), 4, 1, tmp_path / "scratch"), Gate())  # type: ignore[arg-type]
    assert sent[0] == {"steps": 4}
    assert sent[1] == {"examples": sum(len(rows) for _, rows in turns[0])}
