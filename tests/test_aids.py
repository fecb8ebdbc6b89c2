"""Aids: frozen models of a method that are no teachers, given or made by runs of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.bench import Bench
from transformers import AutoModelForMaskedLM

from conftest import BAD, FILLER, GOOD, tiny_config, tiny_tokenizer
from kd.build.instantiate import build_method
from kd.config.compose import compose, typed
from kd.config.frozen import aids_of
from kd.errors import InputError
from kd.methods.text_smoothing import TextSmoothing
from whole_runs import checked, made, planned, roles, same_weights

Small = Callable[..., list[str]]


def save_masked_lm(folder: Path, words: list[str] | None = None, **more: Any) -> Path:
    """A random masked language model."""
    torch.manual_seed(3)
    config = tiny_config(**more)
    if words is not None:
        config.vocab_size = len(tiny_tokenizer(words))
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_masked_lm(tmp_path_factory.mktemp("aids") / "mlm")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aid_text") / "story.txt"
    path.write_text("\n".join(" ".join((FILLER + GOOD + BAD)[n : n + 12]) for n in range(24)))
    return path


@pytest.fixture(scope="module")
def smoothing(small: Small, story: Path) -> Small:
    """Overrides of a run of text smoothing whose masked language model a run on the story trains."""
    run = "method.aids.mlm.run"
    tasks = [f"{run}.choose.task=text", f"{run}.task.train={story}", f"{run}.task.max_length=16"]
    return lambda *more: small("method=text_smoothing", "teacher=[]", *tasks, *more)


def test_an_aid_is_made_by_its_run_first_and_shared(smoothing: Small) -> None:
    run, result = made(smoothing())
    needed = run.inputs.aids["mlm"]
    assert roles(run) == ["aid mlm"]
    assert (needed.spec.task.name, needed.spec.student.name, needed.spec.seed) == ("text", "full", 0)
    assert result["inputs"] == {"aid mlm": needed.name}
    assert AutoModelForMaskedLM.from_pretrained(needed.student).config.architectures == ["BertForMaskedLM"]
    for other in (smoothing("seed=4"), smoothing("method.rate=0.2"), smoothing("student=1l")):
        assert planned(other).inputs.aids["mlm"].digest == needed.digest
        assert planned(other).digest != run.digest
    assert planned(smoothing("method.aids.mlm.run.trainer.max_epochs=2")).digest != run.digest


def test_given_model_takes_the_place_of_the_run_and_enters_the_digest(small: Small, mlm: Path, tmp_path: Path) -> None:
    base = small("method=text_smoothing", "teacher=[]", "trainer.max_epochs=1")
    run, result = made([*base, f"method.aids.mlm.model={mlm}"])
    assert (roles(run), result["inputs"]) == ([], {})
    other = save_masked_lm(tmp_path / "other", layers=2)
    again = planned([*base, f"method.aids.mlm.model={other}"])
    assert again.digest != run.digest
    assert str(mlm) not in str(run.digest_inputs)


def test_methods_without_aids_have_the_digests_of_before(small: Small) -> None:
    assert "aids" not in planned(small("method=kd")).digest_inputs["method"]


def test_aids_are_no_part_of_checkpoints_or_of_the_student(small: Small, mlm: Path) -> None:
    before = AutoModelForMaskedLM.from_pretrained(mlm).state_dict()
    run, _ = made(small("method=text_smoothing", "teacher=[]", "trainer.max_epochs=1", f"method.aids.mlm.model={mlm}"))
    saved = torch.load(run.checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("predictions" in name or "aid" in name for name in saved)
    assert same_weights(before, AutoModelForMaskedLM.from_pretrained(mlm).state_dict())


def test_run_resumed_in_mid_epoch_ends_with_the_same_weights(
    small: Small, mlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.training import execute
    from whole_runs import broken_off, last_weights

    overrides = small("method=text_smoothing", "teacher=[]", f"method.aids.mlm.model={mlm}", "method.texts=alternate")
    unbroken, result = made(overrides)
    run = planned([*overrides, f"paths.runs={tmp_path}", "trainer.checkpoint_minutes=0"])
    broken_off(run, 5, monkeypatch)
    assert execute.execute(run)["metrics"] == result["metrics"]
    assert same_weights(last_weights(run), last_weights(unbroken))


def refused(overrides: list[str]) -> None:
    """Plan a run and check it, which raises an error."""
    checked(lambda: planned(overrides))


REFUSED = {
    "no source": (["method.aids.mlm.run=null"], "method.aids.mlm.model"),
    "no mapping": (["method.aids.mlm=folder"], "method.aids.mlm"),
    "no aids": (["method.aids=null"], "method.aids.mlm"),
    "no aid of that name": (["+method.aids.other={model: MLM}"], "method.aids.other"),
    "no key of an aid": (["+method.aids.mlm.head=none"], "method.aids.mlm.head"),
    "no path": (["method.aids.mlm.model=3"], "method.aids.mlm.model"),
    "no such folder": (["method.aids.mlm.model=nowhere"], "method.aids.mlm.model"),
    "classifier": (
        ["method.aids.mlm.run.choose.task=file"],
        "method.aids.mlm.run",
    ),
    "key of the run": (["method.aids.mlm.run.trainer.max_epochs=0"], "method.aids.mlm.run.trainer.max_epochs"),
    "unknown key of the run": (["+method.aids.mlm.run.trainer.epochs=1"], "method.aids.mlm.run.trainer.epochs"),
    "other vocabulary": (["surgery=[cut_vocabulary]"], "surgery"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_aid_is_refused_before_anything_is_trained(case: str, smoothing: Small, reviews: Path, mlm: Path) -> None:
    given, key = REFUSED[case]
    more = [word.replace("MLM", str(mlm)) for word in given]
    if case == "classifier":
        more = [*more, f"method.aids.mlm.run.task.train={reviews / 'train.csv'}"]
    with pytest.raises(InputError) as caught:
        refused(smoothing(*more))
    assert caught.value.key == key, caught.value.message


def test_aid_without_the_head_or_with_another_vocabulary_is_refused(small: Small, backbone: Path, tmp_path: Path) -> None:
    base = small("method=text_smoothing", "teacher=[]")
    with pytest.raises(InputError, match="ForMaskedLM") as caught:
        refused([*base, f"method.aids.mlm.model={backbone}"])
    assert caught.value.key == "method.aids.mlm.model"
    other = save_masked_lm(tmp_path / "other", FILLER[::2])
    with pytest.raises(InputError, match="another vocabulary") as caught:
        refused([*base, f"method.aids.mlm.model={other}"])
    assert caught.value.key == "method.aids.mlm"


def test_aid_with_too_few_positions_is_refused(small: Small, tmp_path: Path) -> None:
    short = save_masked_lm(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(InputError) as caught:
        refused(small("method=text_smoothing", "teacher=[]", f"method.aids.mlm.model={short}"))
    assert caught.value.key == "task.max_length"


def test_the_engine_moves_and_converts_aids() -> None:
    bench = Bench("text_smoothing")
    bench.engine.double()
    assert {parameter.dtype for parameter in bench.aids["mlm"].encoder.parameters()} == {torch.double}


def test_wrappers_have_the_aids_of_the_inner_method() -> None:
    for pool in ("stochastic", "wkd"):
        spec = typed(compose(["method=text_smoothing", f"pool={pool}", "teacher=[minilm,minilm_3l]", "cohort=mutual"]))
        method, _ = build_method(spec.method, spec.pool, spec.cohort, [0.5, 0.5])
        assert method.aids == {"mlm": "masked_lm"} == TextSmoothing().aids


def test_model_takes_precedence_over_the_run_of_the_file() -> None:
    spec = typed(compose(["method=text_smoothing", "method.aids.mlm.model=a/folder"]))
    (found,) = aids_of(spec).values()
    assert (found.model, found.run) == ("a/folder", None)
