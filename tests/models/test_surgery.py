"""Surgeries on embeddings: what they keep, what they cost, what they refuse."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from conftest import BAD, FILLER, GOOD, SPECIAL, tiny_config, tiny_model, tiny_tokenizer
from kd.build.check import check_arguments, check_run
from kd.build.data import build_examples
from kd.build.models import build_models
from kd.build.parts import examples_of
from kd.build.surgeries import prefix_surgery_errors
from kd.config.compose import compose
from kd.config.schema import RunSpec
from kd.data.datamodule import tokenizer_fingerprint
from kd.errors import InputError
from kd.forward import Needs
from kd.methods.base import Method, Step
from kd.models import Encoder
from kd.models.surgery.embeddings import CutVocabulary, Factorized, LearnedVocabulary, SurgeryInputs, truncated_svd
from kd.runs.plan import plan

TEXTS = ["a good film and a great story", "it was a warm and funny film", "dull"]
UNUSED = ["it was a cold story", "Bleak!"]


def characters_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny vocabulary with single characters, as every published one has."""
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    return tiny_tokenizer([*letters, *(f"##{letter}" for letter in letters), *FILLER, *GOOD, *BAD])


def student(head: str = "classifier", seed: int = 0, **sizes: object) -> Encoder:
    tokenizer = characters_tokenizer()
    config = tiny_config(initializer_range=0.2, vocab_size=len(tokenizer), **sizes)
    torch.manual_seed(seed)
    kind = AutoModelForMaskedLM if head == "masked_lm" else AutoModelForSequenceClassification
    return Encoder(kind.from_config(config).eval(), tokenizer)


def inputs(encoder: Encoder, texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(encoder.tokenizer(texts, padding=True, return_tensors="pt"))


def operated(surgery: object, encoder: Encoder, texts: list[str] | None = TEXTS) -> Encoder:
    """The student after a surgery; without texts, the shape that it will have as far as that is known."""
    if texts is None:
        return surgery.shape(encoder)
    made, words = surgery(encoder, SurgeryInputs(texts))
    assert words
    return made


# -- cut_vocabulary --------------------------------------------------------------------------------------------------------


def test_cut_vocabulary_leaves_the_training_texts_and_the_logits_on_them_as_they_were() -> None:
    before = student()
    old, expected = inputs(before, TEXTS), before(inputs(before, TEXTS), Needs()).logits
    words = [before.tokenizer.convert_ids_to_tokens(row) for row in old["input_ids"]]
    after = operated(CutVocabulary(), before)
    new = inputs(after, TEXTS)
    assert [after.tokenizer.convert_ids_to_tokens(row) for row in new["input_ids"]] == words
    assert not torch.equal(new["input_ids"], old["input_ids"])
    assert torch.equal(after(new, Needs()).logits, expected)


def test_cut_vocabulary_keeps_special_tokens_used_ones_and_the_letters_of_the_text() -> None:
    after = operated(CutVocabulary(), student())
    words = set(" ".join(TEXTS).split())
    letters = set("".join(words))
    kept = set(after.tokenizer.get_vocab())
    assert kept == {*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters)}
    assert after.config.vocab_size == after.model.get_input_embeddings().num_embeddings == len(kept)
    assert after.tokenizer.tokenize("stood cold") == ["s", "##t", "##o", "##o", "##d", "[UNK]"]
    assert after.tokenizer.pad_token_id == 0
    assert set(operated(CutVocabulary(min_count=2), student()).tokenizer.get_vocab()) < kept


def test_cut_vocabulary_keeps_the_masked_lm_logits_of_the_kept_tokens() -> None:
    before = student("masked_lm")
    with torch.no_grad():
        before.model.cls.predictions.bias.normal_()
    old, whole = before.tokenizer, before(inputs(before, TEXTS), Needs()).logits
    after = operated(CutVocabulary(), before)
    rows = old.convert_tokens_to_ids(after.tokenizer.convert_ids_to_tokens(range(len(after.tokenizer))))
    assert torch.allclose(after(inputs(after, TEXTS), Needs()).logits, whole[..., rows], atol=1e-6)
    assert after.model.cls.predictions.decoder.weight is after.model.bert.embeddings.word_embeddings.weight


def test_cut_model_is_exported_with_its_own_tokenizer(tmp_path: Path) -> None:
    after = operated(CutVocabulary(), student())
    after.save(tmp_path)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path).eval(),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(after.tokenizer)
    for texts in (TEXTS, UNUSED):
        found = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        assert torch.allclose(found, after(inputs(after, texts), Needs()).logits, atol=1e-6)


def test_vocabularies_that_are_not_wordpiece_are_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"[UNK]": 0, "a": 1, "[MASK]": 2}, [], unk_token="[UNK]")), unk_token="[UNK]"
    )
    surgeries = {"cut_vocabulary": CutVocabulary(), "learned_vocabulary": LearnedVocabulary(50)}
    nodes = {name: {"_target_": f"{type(surgery).__module__}.{type(surgery).__name__}"} for name, surgery in surgeries.items()}
    for name, surgery in surgeries.items():
        for texts in (None, TEXTS):
            with pytest.raises(InputError, match="WordPiece") as caught, prefix_surgery_errors(RunSpec(surgery=nodes), name):
                operated(surgery, Encoder(tiny_model(), tokenizer), texts)
            assert caught.value.key == f"surgery.{name}"


# -- learned_vocabulary ----------------------------------------------------------------------------------------------------


def test_learned_vocabulary_has_the_size_asked_for_and_the_old_rules() -> None:
    before = student()
    rules = before.tokenizer.backend_tokenizer.normalizer.normalize_str("Fílm!")
    after = operated(LearnedVocabulary(60), before)
    assert len(after.tokenizer) == after.config.vocab_size == after.model.get_input_embeddings().num_embeddings == 60
    assert after.tokenizer.backend_tokenizer.normalizer.normalize_str("Fílm!") == rules
    read = after.tokenizer(["A good film"])["input_ids"][0]
    assert (read[0], read[-1]) == (after.tokenizer.cls_token_id, after.tokenizer.sep_token_id)
    assert "".join(after.tokenizer.convert_ids_to_tokens(read[1:-1])).replace("##", "") == "agoodfilm"
    assert after(inputs(after, TEXTS), Needs()).logits.isfinite().all()


def test_more_tokens_than_the_text_supports_are_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"size=5000 is more than the text supports: it gives \d+ tokens") as caught:
        operated(LearnedVocabulary(5000), student())
    assert caught.value.key == "size"
    with pytest.raises(InputError, match=r"size=20 leaves no room"):
        operated(LearnedVocabulary(20), student())


@pytest.mark.ddp
def test_two_processes_learn_the_same_vocabulary() -> None:
    code = (
        "import random; from conftest import tiny_tokenizer; from kd.models.surgery.wordpiece import learned_tokens\n"
        "draw = random.Random(0); words = [''.join(draw.choices('abcdefghijklmnop', k=5)) for _ in range(300)]\n"
        "for _ in range(2): print(learned_tokens(tiny_tokenizer(), [' '.join(words)], 150))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{code}"]
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # of the order of sets, which is another one here
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    with contextlib.redirect_stdout(io.StringIO()) as ours:
        exec(code, {})
    found += ours.getvalue().splitlines()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert "##a" in found.pop()


# -- factorized ------------------------------------------------------------------------------------------------------------


def test_truncated_svd_loses_the_discarded_singular_values_and_nothing_else() -> None:
    table = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svd(table).S
    for rank in (1, 5, 12):
        rows, basis = truncated_svd(table, rank)
        assert (rows.shape, basis.shape) == ((40, rank), (rank, 12))
        lost = (table - rows @ basis).norm() ** 2
        assert torch.allclose(lost, (values[rank:] ** 2).sum(), atol=1e-4)  # float32 sums of 480 squares


@pytest.mark.parametrize("head", ["classifier", "masked_lm"])
def test_factorised_embeddings_of_full_rank_change_no_logit(head: str) -> None:
    before = student(head)
    expected = before(inputs(before, TEXTS), Needs()).logits
    after = operated(Factorized(32), before)
    assert torch.allclose(after(inputs(after, TEXTS), Needs()).logits, expected, atol=1e-4)


@pytest.mark.parametrize("head", ["classifier", "masked_lm"])
def test_factorised_model_counts_its_factors_trains_and_is_exported_multiplied_out(head: str, tmp_path: Path) -> None:
    before = student(head)
    whole, size = before.parameter_count(), before.config.vocab_size
    after = operated(Factorized(4), before)
    assert after.parameter_count() == whole - size * 32 + size * 4 + 4 * 32
    outputs = after(inputs(after, TEXTS), Needs(hidden=[0, 1]))
    assert outputs.hidden(0).shape[-1] == 32
    (outputs.logits**2).sum().backward()
    words = after.model.get_input_embeddings()
    assert words.rows.weight.grad.abs().sum() > 0
    assert words.basis.weight.grad.abs().sum() > 0
    assert sum(p.numel() for p in after.plain().parameters()) == whole
    after.save(tmp_path)
    kind = AutoModelForMaskedLM if head == "masked_lm" else AutoModelForSequenceClassification
    found = kind.from_pretrained(tmp_path).eval()(**inputs(after, TEXTS)).logits
    assert torch.allclose(found, after(inputs(after, TEXTS), Needs()).logits, atol=1e-5)
    assert after.parameter_count() < whole, "the model in training is left as it is"


@pytest.mark.parametrize("head", ["classifier", "masked_lm"])
def test_words_replace_the_product_of_factorised_embeddings(head: str) -> None:
    made = operated(Factorized(rank=5), student(head)).train()
    batch, needs = inputs(made, TEXTS), Needs(words=True, hidden=[0, 4])
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    words = made.word_embeddings.weight[batch["input_ids"]]
    outputs = made(batch, needs)
    torch.testing.assert_close(outputs.words, words)
    again = made({**batch, "words": outputs.words}, needs)
    for name in needs.tensors:
        assert torch.equal(again.named()[name], outputs.named()[name]), name
    gradients = torch.autograd.grad(again.logits.square().sum(), list(made.word_embeddings.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_surgeries_follow_each_other_in_their_order() -> None:
    after = operated(Factorized(4), operated(CutVocabulary(), student()))
    assert after.model.get_input_embeddings().rows.num_embeddings == len(after.tokenizer)
    for texts in (TEXTS, None):
        made = operated(Factorized(4), student(), texts)
        with pytest.raises(InputError, match="cut_vocabulary must come before"):
            operated(CutVocabulary(), made, texts)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: CutVocabulary(0), "min_count"),
        (lambda: LearnedVocabulary("x"), "size"),
        (lambda: Factorized(0), "rank"),
        (lambda: operated(Factorized(33), student()), "rank"),
        (lambda: operated(Factorized(33), student(), None), "rank"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.key == key


@pytest.mark.parametrize("head", ["classifier", "masked_lm"])
def test_the_shape_of_factorised_embeddings_is_that_of_the_student(head: str) -> None:
    expected, made = student(head), operated(Factorized(4), student(head))
    shape = operated(Factorized(4), expected.to("meta"), None)
    assert {parameter.device.type for parameter in shape.parameters()} == {"meta"}
    assert {n: p.shape for n, p in shape.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}


# -- in a run --------------------------------------------------------------------------------------------------------------


class TokenByToken(Method):
    """Reads states of every token of the teacher."""

    def needs(self) -> tuple[Needs, list[Needs]]:
        return Needs(hidden=[1]), [Needs(hidden=[1])]

    def terms(self, step: Step) -> dict[str, torch.Tensor]:
        return {"task": (step.student.outputs.hidden(1) - step.teacher.outputs.hidden(1)).mean()}


def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.methods.finetune.Finetune", TokenByToken)


def test_token_aligned_method_refuses_a_student_with_its_own_vocabulary_before_anything_is_trained(
    small: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy(monkeypatch)
    stage = "student.run={overrides: ['method=finetune','surgery=[cut_vocabulary]','student.init=random']}"
    for more, key in (
        (["surgery=[cut_vocabulary]"], "surgery"),
        (["student.init=run", stage], "student.run"),
    ):
        overrides = small("method=finetune", *more)
        run = plan(compose(overrides), overrides)
        with pytest.raises(InputError, match="token by token") as caught:
            check_run(run, examples_of(run))
        assert caught.value.key == key
        assert "vocabulary of its own" in caught.value.message
    for more in (["surgery=[factorized]", "surgery.factorized.rank=4"], []):
        overrides = small("method=finetune", *more)
        run = plan(compose(overrides), overrides)
        check_run(run, examples_of(run))


@pytest.mark.parametrize("method", ["kd", "pkd"])
def test_methods_that_read_logits_or_cls_states_take_such_a_student(small: Callable[..., list[str]], method: str) -> None:
    overrides = small(f"method={method}", "surgery=[cut_vocabulary]")
    run = plan(compose(overrides), overrides)
    check_run(run, examples_of(run))


def test_surgery_enters_the_digest_in_its_order_and_its_run_only_as_an_input(small: Callable[..., list[str]]) -> None:
    def digest(*more: str) -> str:
        overrides = small("method=finetune", "teacher=[]", *more)
        return plan(compose(overrides), overrides).digest

    found = [digest(), digest("surgery=[cut_vocabulary]"), digest("surgery=[factorized]")]
    found += [digest("surgery=[cut_vocabulary,factorized]"), digest("surgery=[factorized,cut_vocabulary]")]
    found += [digest("surgery=[factorized]", "surgery.factorized.rank=7")]
    assert len(set(found)) == len(found)


class WithoutShape:
    """A surgery that cannot say before training what shape it makes."""

    changes_vocabulary = False

    def __call__(self, encoder: Encoder, inputs: SurgeryInputs) -> tuple[Encoder, str]:
        return encoder, "nothing"


def test_a_surgery_without_a_shape_is_refused(small: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = small("method=finetune", "teacher=[]", "surgery=[cut_vocabulary]")
    run = plan(compose(overrides), overrides)
    monkeypatch.setattr("kd.models.surgery.embeddings.CutVocabulary", WithoutShape)
    with pytest.raises(InputError, match="`changes_vocabulary` and `shape`") as caught:
        check_arguments(run)
    assert caught.value.key == "surgery.cut_vocabulary._target_"


def test_surgery_is_given_the_training_texts_alone(small: Callable[..., list[str]]) -> None:
    overrides = small("method=finetune", "teacher=[]", "surgery=[cut_vocabulary]", "task.limit_train=4")
    run = plan(compose(overrides), overrides)
    examples = build_examples(run)
    made = build_models(run, examples.task, texts=examples.texts["train"])
    used = {word for (text,) in examples.texts["train"] for word in text.split()}
    assert set(made.student.tokenizer.get_vocab()) == used | set(SPECIAL) | ({"a"} & {c for w in used for c in w})
    assert "vocabulary cut from" in made.inits["student"]
