"""Whole runs on unlabelled text: masked language models, a mixed-vocabulary chain, surgeries in a run."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from conftest import BAD, FILLER, GOOD, tiny_tokenizer
from kd.data.datamodule import tokenizer_fingerprint
from kd.errors import InputError
from kd.runs.run import Run
from kd.training import execute
from whole_runs import broken_off, last_weights, made, planned, roles, same_weights, torchrun

Small = Callable[..., list[str]]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some lines of text."""
    draw = random.Random(0)
    words = FILLER + GOOD + BAD
    often = [1 / (1 + place) for place in range(len(words))]  # as in a language, so that there is something to learn
    lines = [" ".join(draw.choices(words, often, k=draw.randint(4, 30))) for _ in range(120)]
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def masked(small: Small, story: Path) -> Small:
    """Overrides of a masked language model on the story."""

    def overrides(*more: str) -> list[str]:
        plain = [word for word in small() if not word.startswith(("task", "teacher", "student"))]
        return [*plain, "task=text", f"task.train={story}", "task.max_length=16", "method=finetune", "student=2l", *more]

    return overrides


def test_masked_language_model_learns_and_is_exported_for_transformers_alone(masked: Small) -> None:
    run, result = made(masked("teacher=[]", "trainer.max_epochs=3", "trainer.batch_size=8"))
    assert not list(run.directory.glob("predictions*")), "its logits are those of tokens"
    assert set(result["metrics"]["validation"]) == {"loss", "accuracy"}
    assert result["metrics"]["validation"]["loss"] < 3.4 < torch.log(torch.tensor(41.0))
    assert result["selection"]["by"] == "chosen by validation loss over 3 epoch(s)"
    assert result["export_difference"] <= 1e-5
    assert (result["labels"], result["pipeline"]) == (None, "fill-mask")
    card = (run.student / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "masked language model" in card
    answers = pipeline("fill-mask", model=str(run.student))("a [MASK] film")
    assert len(answers) == 5
    AutoModelForMaskedLM.from_pretrained(run.student)


def test_teacher_of_a_masked_language_model_is_made_by_its_own_run_and_distilled_from(masked: Small, backbone: Path) -> None:
    teacher = [f"teacher.minilm.backbone={backbone}", "teacher.minilm.run.trainer.max_epochs=1"]
    run, result = made(masked(*teacher, "method=pkd", "trainer.max_epochs=1"))
    first = run.inputs.teachers["minilm"]
    assert first.spec.task.kind == "masked_lm"
    assert AutoModelForMaskedLM.from_pretrained(first.student).config.architectures == ["BertForMaskedLM"]
    assert 0 <= result["agreement"]["validation"]["minilm"] <= 1
    assert result["teacher_forward_examples"] > 0


def test_teacher_without_a_masked_lm_head_or_with_another_vocabulary_is_refused(masked: Small, backbone: Path) -> None:
    ready = ["teacher=[hub]", f"teacher.hub.model={backbone}"]
    with pytest.raises(InputError, match="ForMaskedLM") as caught:
        made(masked(*ready))
    assert caught.value.key == "teacher.hub.model"
    with pytest.raises(InputError, match="over its vocabulary") as caught:
        made(masked(f"teacher.minilm.backbone={backbone}", "surgery=[learned_vocabulary]"))
    assert caught.value.key == "surgery"


@pytest.mark.parametrize("more", [(), ("surgery=[mixed_stage]", "surgery.mixed_stage.size=70", "student.dropout=0")])
def test_masked_run_stopped_in_mid_epoch_ends_with_the_weights_of_an_unbroken_one(
    masked: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    overrides = masked("teacher=[]", *more)
    unbroken, result = made(overrides)
    run = planned([*overrides, f"paths.runs={tmp_path}", "trainer.checkpoint_minutes=0"])
    broken_off(run, 14, monkeypatch)
    again = execute.execute(run)
    assert again["metrics"] == result["metrics"]
    assert same_weights(last_weights(run), last_weights(unbroken))


@pytest.mark.ddp
def test_two_ranks_learn_one_vocabulary_and_give_the_result_of_one(masked: Small, tmp_path: Path) -> None:
    more = ["teacher=[]", "surgery=[mixed_stage]", "surgery.mixed_stage.size=70", "student.dropout=0", "trainer.max_epochs=1"]
    one_run, one = made(masked(*more))
    arguments = masked(*more, f"paths.runs={tmp_path}", "trainer=ddp", "trainer.accelerator=cpu")
    torchrun(arguments, interpreters=True)  # sets must not decide which tokens are learned
    run = planned(arguments)
    assert run.digest == one["digest"]
    assert run.result["ranks"] == 2
    assert run.result["metrics"]["validation"] == pytest.approx(one["metrics"]["validation"], abs=1e-3)
    ours, theirs = last_weights(run), last_weights(one_run)
    assert ours.keys() == theirs.keys()
    # A bias of the keys shifts all scores of a query alike: its gradient is rounding, which AdamW makes as large as any.
    far = [name for name in ours if not torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-4)]  # over 7 steps
    assert all(name.endswith("key.bias") for name in far), far


# -- mixed vocabulary ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(small: Small, story: Path) -> Small:
    """Overrides of a run on the toy task whose student is pre-trained with a small vocabulary."""
    pretraining = ["pretrain.text=text", f"pretrain.file={story}", "pretrain.size=70", "pretrain.max_length=32"]
    shape = ["student.width=16", "student.heads=2", "student.intermediate=32"]
    return lambda *more: small(*more, *pretraining, "pretrain.texts=60", "pretrain.student_texts=80", *shape)


@pytest.fixture(scope="module")
def chain(words: Small) -> tuple[Run, dict]:
    """`method=mixed_vocab`, every stage of it."""
    return made(words("method=mixed_vocab", "teacher=[]"))


def test_mixed_vocabulary_makes_its_three_stages_first(chain: tuple[Run, dict]) -> None:
    run, result = chain
    second = run.inputs.stage
    first = second.inputs.surgeries["mixed_vocab"]
    language = first.inputs.stage
    assert [roles(needed) for needed in (run, second, first, language)] == [
        ["stage"],
        ["surgery mixed_vocab"],
        ["stage"],
        [],
    ]
    assert [needed.spec.task.name for needed in (run, second, first, language)] == ["file", "text", "text", "text"]
    assert [needed.spec.task.limit_train for needed in (second, first, language)] == [80, 60, 60]
    assert list(first.spec.surgery) == ["mixed_stage"]
    assert (first.spec.surgery["mixed_stage"]["size"], first.spec.surgery["mixed_stage"]["width"]) == (70, 16)
    assert language.spec.surgery == {}
    assert second.spec.student.init == "random"
    assert result["init"].startswith("run mixed_vocab")
    assert result["inputs"] == {"stage": second.name}


def test_mixed_vocabulary_student_is_exported_with_its_own_tokenizer(chain: tuple[Run, dict], backbone: Path) -> None:
    run, result = chain
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(run.student),
        AutoTokenizer.from_pretrained(run.student),
    )
    assert len(tokenizer) == model.config.vocab_size == 70
    second = run.inputs.stage
    learned = second.inputs.surgeries["mixed_vocab"].student / "vocabulary"
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(AutoTokenizer.from_pretrained(learned))
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(AutoTokenizer.from_pretrained(backbone))
    assert AutoModelForMaskedLM.from_pretrained(second.student).config.vocab_size == 70
    assert result["parameters"]["student"] == sum(p.numel() for p in model.parameters()) == result["parameters"]["exported"]
    assert pipeline("text-classification", model=str(run.student))("a good film")[0]["label"] in ("negative", "positive")


def test_first_stage_is_exported_as_the_plain_large_model(chain: tuple[Run, dict], backbone: Path) -> None:
    first = chain[0].inputs.stage.inputs.surgeries["mixed_vocab"]
    model = AutoModelForMaskedLM.from_pretrained(first.student)
    assert model.config.vocab_size == len(tiny_tokenizer())
    assert first.result["export_difference"] <= 1e-5
    assert first.result["parameters"]["exported"] == sum(p.numel() for p in model.parameters())
    assert first.result["parameters"]["student"] > first.result["parameters"]["exported"]
    assert "in this folder" in (first.student / "README.md").read_text()


def test_pretraining_is_shared_by_methods_seeds_and_what_is_said_of_the_task(
    chain: tuple[Run, dict], words: Small, backbone: Path
) -> None:
    def stage(*more: str) -> str:
        return planned(words(*more)).inputs.stage.digest

    own = chain[0].inputs.stage.digest
    for more in (["seed=3"], ["optimizer.lr=1e-3", "optimizer.warmup=0"], ["task.limit_train=20"], ["trainer.max_epochs=9"]):
        assert stage("method=mixed_vocab", "teacher=[]", *more) == own
    assert stage("method=kd", "pretrain=mixed_vocab", f"teacher.minilm.backbone={backbone}") == own
    assert stage("method=mixed_vocab", "teacher=[]", "pretrain.probability=0.25") != own


def test_any_method_takes_a_pretrained_student(chain: tuple[Run, dict], words: Small) -> None:
    run, result = made(words("method=kd", "pretrain=mixed_vocab", "trainer.max_epochs=1"))
    assert run.inputs.stage.digest == chain[0].inputs.stage.digest
    assert result["method"] == "kd"
    assert set(result["agreement"]["validation"]) == {"minilm"}


def test_a_student_without_a_width_of_its_own_has_small_embeddings_of_the_backbones(small: Small, story: Path) -> None:
    run = planned(small("method=mixed_vocab", "pretrain.text=text", f"pretrain.file={story}"))
    assert run.inputs.stage.inputs.surgeries["mixed_vocab"].spec.surgery["mixed_stage"]["width"] is None


def test_a_vocabulary_larger_than_the_text_supports_is_refused(small: Small) -> None:
    with pytest.raises(InputError, match="more than the text supports") as caught:
        made(small("method=finetune", "teacher=[]", "surgery=[learned_vocabulary]"))
    assert caught.value.key == "surgery.learned_vocabulary.size"


# -- surgeries in a run ----------------------------------------------------------------------------------------------------


def test_factorised_student_states_both_sizes_and_is_exported_as_a_plain_model(small: Small) -> None:
    more = ["surgery=[cut_vocabulary,factorized]", "surgery.factorized.rank=4", "trainer.max_epochs=1"]
    run, result = made(small("method=finetune", "teacher=[]", *more))
    model = AutoModelForSequenceClassification.from_pretrained(run.student)
    sizes = result["parameters"]
    assert sizes["student"] < sizes["exported"] == sum(p.numel() for p in model.parameters())
    assert json.loads((run.directory / "result.json").read_text())["parameters"] == sizes
    assert f"{sizes['exported']:,} in this folder" in (run.student / "README.md").read_text()
    assert "vocabulary cut from" in result["init"]
    assert "rank 4" in result["init"]
    assert len(AutoTokenizer.from_pretrained(run.student)) == model.config.vocab_size
    assert result["export_difference"] <= 1e-5


def test_a_runs_own_vocabulary_goes_to_the_run_that_begins_from_it(small: Small) -> None:
    stage = "student.run={overrides: ['surgery=[cut_vocabulary]','student.init=first','trainer.max_epochs=1']}"
    run, _ = made(small("method=finetune", "teacher=[]", "student.init=run", stage, "trainer.max_epochs=1", "seed=5"))
    first = run.inputs.stage
    assert first.spec.surgery
    assert not run.spec.surgery
    one, other = (AutoTokenizer.from_pretrained(r.student) for r in (run, first))
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(tiny_tokenizer())
    checkpoint, _ = made(
        small("method=finetune", "teacher=[]", "student.init=checkpoint", f"student.checkpoint={run.student}", "seed=5")
    )
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(checkpoint.student)) == tokenizer_fingerprint(one)


def test_a_chain_of_stages_needs_no_nested_quotes(small: Small) -> None:
    nested = "run: {overrides: ['student.init=every','seed=9']}"
    chain = f"student.run={{overrides: ['student.init=run','seed=8'], {nested}}}"
    run = planned(small("method=finetune", "teacher=[]", "student.init=run", chain))
    first = run.inputs.stage
    assert (run.spec.seed, first.spec.seed, first.inputs.stage.spec.seed) == (0, 8, 9)
    assert first.inputs.stage.spec.student.init == "every"
    for wrong in ("student.run=x", "student.run={run: {overrides: [a=b]}}", "student.run=[]"):
        with pytest.raises(InputError) as caught:
            planned(small("method=finetune", "student.init=run", wrong))
        assert caught.value.key == "student.run"
