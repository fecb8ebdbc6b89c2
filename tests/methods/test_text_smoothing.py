"""Text smoothing: the mixture as loops over the vocabulary, its limits, its baselines, and where its gradient goes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance.bench import aid
from torch import Tensor, nn

from conftest import tiny_model, tiny_tokenizer
from kd.data.batch import Batch
from kd.data.tasks import Classification
from kd.errors import InputError
from kd.forward import Forward, Needs
from kd.functional.logits import kl_divergence
from kd.functional.smoothing import drawn_words, likely_words, mean_embedding
from kd.methods.base import Bound, Progress, Step
from kd.methods.text_smoothing import TextSmoothing
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Linear

TASK = Classification("toy", ["no", "yes"], {}, ["accuracy"], "accuracy")
LENGTHS = (7, 5, 4)
TOKENIZER = tiny_tokenizer()
CLS, SEP = TOKENIZER.cls_token_id, TOKENIZER.sep_token_id


def encoder(seed: int, width: int = 16, **more: object) -> Encoder:
    model = tiny_model(seed, layers=2, width=width, **more).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Encoder(model, TOKENIZER)


def inputs_of(padding: int = 0) -> dict[str, Tensor]:
    """Three sentences of other lengths, with special tokens; padding is filled with a word that would show."""
    ids = torch.randint(5, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
    ids[:, 0] = CLS
    for example, length in enumerate(LENGTHS):
        ids[example, length - 1] = SEP
    ids = torch.where(mask.bool(), ids, 7)
    return {
        "input_ids": nn.functional.pad(ids, (0, padding), value=8),
        "attention_mask": nn.functional.pad(mask, (0, padding)),
    }


def bound(
    padding: int = 0, progress: Progress | None = None, teachers: int = 1, **arguments: Any
) -> tuple[TextSmoothing, Step]:
    """A method bound to a student, a teacher and a masked language model, and a step over three sentences."""
    student, frozen = encoder(1), [FrozenTeacher(encoder(2 + n, width=32)) for n in range(teachers)]
    mlm = FrozenTeacher(aid(0, "masked_lm").double(), "mlm")
    method = TextSmoothing(**arguments)
    method.bind(Bound(student, frozen, TASK, {"mlm": mlm}))
    inputs = inputs_of(padding)
    ours, theirs = method.needs()
    batch = Batch(inputs, (inputs,) * teachers, torch.tensor([0, 1, 1]), torch.arange(3))
    passes = [Forward(one, inputs, needs) for one, needs in zip(frozen, theirs, strict=True)]
    step = Step(Forward(student, inputs, ours), passes, batch, TASK, progress or Progress())
    return method, step.replace(aids={"mlm": Forward(mlm, inputs, Needs())})


def terms_of(method: TextSmoothing, step: Step) -> dict[str, Tensor]:
    return method.terms(step)


def smoothed(method: TextSmoothing, step: Step) -> dict[str, Tensor]:
    """The student's smoothed text."""
    return method.smoothed(step.student, step, *method.likely(step))


def naive_words(
    step: Step, table: Tensor, rate: float, temperature: float = 1.0, topk: int | None = None, everywhere: bool = False
) -> Tensor:
    """Mixed word embeddings, (batch, tokens, width): loops over positions and the vocabulary, transformers' own model."""
    inputs: Mapping[str, Tensor] = step.batch.student
    model: Any = step.aids["mlm"].model
    with torch.no_grad():
        logits = model.encoder.model(**inputs).logits
    words = []
    for ids, mask, of_tokens in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), logits, strict=True):
        row = []
        for token, real, scores in zip(ids, mask, of_tokens, strict=True):
            one_hot = [1.0 if word == token else 0.0 for word in range(len(table))]
            if everywhere or (real and token not in TOKENIZER.all_special_ids):
                exponentials = [float((score / temperature).exp()) for score in scores]
                if topk is not None:
                    least = sorted(exponentials)[-topk]
                    exponentials = [value if value >= least else 0.0 for value in exponentials]
                q = [value / sum(exponentials) for value in exponentials]
                one_hot = [rate * p + (1 - rate) * o for p, o in zip(q, one_hot, strict=True)]
            assert abs(sum(one_hot) - 1) < 1e-12
            assert min(one_hot) >= 0
            row.append(sum(p * table[word] for word, p in enumerate(one_hot)))
        words.append(torch.stack(row))
    return torch.stack(words)


CASES = {
    "published": {"topk": None},
    "ten words": {},
    "three words, tempered": {"topk": 3, "temperature": 2.5},
    "rate": {"rate": 0.2},
    "everywhere": {"positions": "all", "topk": None},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_is_that_of_the_mixture_written_as_loops(case: str) -> None:
    arguments = CASES[case]
    method, step = bound(**arguments)
    table = step.student.model.word_embeddings.weight
    everywhere = arguments.get("positions") == "all"
    topk = arguments.get("topk", 10)
    words = naive_words(step, table, arguments.get("rate", 0.5), arguments.get("temperature", 1.0), topk, everywhere)
    mask = step.batch.student["attention_mask"]
    logits = step.student.model.model(inputs_embeds=words, attention_mask=mask).logits
    expected = nn.functional.cross_entropy(logits, step.batch.labels)
    assert torch.allclose(method.terms(step)["task"], expected, rtol=0, atol=1e-9)


def test_mixture_of_two_words_has_the_worked_numbers() -> None:
    # V=2, E=I, the word 0, Q=[.7, .3], rate .5 -> [.85, .15]
    ids, probabilities = likely_words(torch.tensor([[0.7, 0.3]], dtype=torch.double).log(), None)
    table = nn.Embedding.from_pretrained(torch.eye(2).double())
    mixed = 0.5 * mean_embedding(table, ids, probabilities) + 0.5 * table(torch.tensor([0]))
    assert torch.allclose(mixed, torch.tensor([[0.85, 0.15]], dtype=torch.double), rtol=0, atol=1e-12)


def test_all_words_and_as_many_likely_ones_are_the_same_distribution() -> None:
    logits = torch.randn(4, 9).double()
    whole, some = (likely_words(logits, count, 1.7) for count in (None, 9))
    dense = torch.zeros(4, 9).double().scatter(1, some[0], some[1])
    assert torch.allclose(dense, whole[1], rtol=0, atol=1e-12)


def test_rate_zero_is_plain_text_to_the_bit() -> None:
    method, step = bound(rate=0.0)
    with torch.no_grad():
        plain = step.student.run().logits
        assert torch.equal(step.student.run(smoothed(method, step)).logits, plain)


def test_rate_one_and_a_high_temperature_read_the_mean_embedding_everywhere() -> None:
    method, step = bound(rate=1.0, temperature=1e4, topk=None, positions="all")
    words = smoothed(method, step)["words"]
    mean = step.student.model.word_embeddings.weight.mean(dim=0)
    assert torch.allclose(words, mean.expand_as(words), rtol=0, atol=1e-3)


def test_rate_and_temperature_are_schedules() -> None:
    early, late = (bound(progress=Progress(step, 10), rate=Linear(0.0, 1.0), temperature=Linear(4.0, 1.0)) for step in (0, 10))
    constant = bound(rate=1.0, temperature=1.0)
    assert torch.equal(terms_of(*late)["task"], terms_of(*constant)["task"])
    assert torch.equal(terms_of(*early)["task"], terms_of(*bound(rate=0.0))["task"])


def test_special_tokens_and_padding_keep_their_embeddings() -> None:
    method, step = bound()
    inputs = step.batch.student
    words, plain = smoothed(method, step)["words"], step.student.model.word_embeddings(inputs["input_ids"])
    kept = (words == plain).all(dim=-1)
    special = torch.isin(inputs["input_ids"], torch.tensor([CLS, SEP])) | ~inputs["attention_mask"].bool()
    assert torch.equal(kept, special)


@pytest.mark.parametrize("replace", ["mixed", "drawn"])
def test_padding_changes_nothing(replace: str) -> None:
    one, other = (terms_of(*bound(padding, replace=replace, soft="smoothed")) for padding in (0, 3))
    for name, term in one.items():
        assert torch.allclose(term, other[name], rtol=0, atol=1e-10)


def test_head_in_chunks_is_the_head_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = terms_of(*bound())["task"]
    monkeypatch.setattr("kd.methods.text_smoothing.CHUNK", 2 * len(TOKENIZER))
    assert torch.allclose(terms_of(*bound())["task"], whole, rtol=0, atol=1e-12)


# -- which texts -----------------------------------------------------------------------------------------------------------


def test_both_texts_are_two_terms() -> None:
    both = terms_of(*bound(texts="both"))
    assert list(both) == ["task", "smoothed"]
    assert torch.equal(both["task"], terms_of(*bound(rate=0.0))["task"])
    assert torch.equal(both["smoothed"], terms_of(*bound())["task"])


def test_alternate_reads_smoothed_text_in_even_steps() -> None:
    even, odd = (terms_of(*bound(progress=Progress(step, 10), texts="alternate"))["task"] for step in (2, 3))
    assert torch.equal(even, terms_of(*bound())["task"])
    assert torch.equal(odd, terms_of(*bound(rate=0.0))["task"])


def test_drawn_words_are_as_frequent_as_the_mixture_says() -> None:
    method, step = bound(replace="drawn", rate=0.3)
    tokens, counts, table = step.batch.student["input_ids"], torch.zeros(3, 7, len(TOKENIZER)), torch.eye(len(TOKENIZER))
    ids, probabilities, replaced = method.likely(step)
    for number in range(2000):
        later = step.replace(progress=Progress(number, 2000))
        drawn = method.smoothed(step.student, later, ids, probabilities, replaced)["input_ids"]
        counts += nn.functional.one_hot(drawn, len(TOKENIZER))
    mean = mean_embedding(nn.Embedding.from_pretrained(table), ids, probabilities)
    expected = 0.3 * mean + 0.7 * table[tokens[replaced]]
    assert (counts[replaced] / 2000 - expected).abs().max() < 5 * (0.25 / 2000) ** 0.5
    assert torch.equal(counts[~replaced] / 2000, table[tokens[~replaced]])


def test_drawing_stays_among_the_likely_words_at_the_ends() -> None:
    ids, probabilities = torch.tensor([[4, 9]] * 3), torch.tensor([[0.25, 0.75]] * 3)
    assert drawn_words(ids, probabilities, torch.tensor([0.0, 0.25, 1 - 2**-53]).double()).tolist() == [4, 9, 9]
    assert drawn_words(ids, probabilities / 2, torch.tensor([0.9] * 3)).tolist() == [9, 9, 9]


# -- soft labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", ["smoothed", "both"])
@pytest.mark.parametrize("soft", ["plain", "smoothed"])
def test_soft_labels_are_of_the_text_that_the_teacher_reads(texts: str, soft: str) -> None:
    method, step = bound(texts=texts, soft=soft, soft_temperature=3.0)
    found = method.terms(step)["logits"]
    mask = step.batch.student["attention_mask"]

    def logits(model: Any, rate: float) -> Tensor:
        encoder = getattr(model, "encoder", model)
        words = naive_words(step, encoder.word_embeddings.weight, rate, topk=10)
        return encoder.model(inputs_embeds=words, attention_mask=mask).logits

    theirs = logits(step.teachers[0].model, 0.5 if soft == "smoothed" else 0.0)
    expected = kl_divergence(logits(step.student.model, 0.5), theirs, 3.0)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)


def test_only_a_teacher_of_smoothed_text_runs_at_every_step() -> None:
    for soft, reason in (("none", None), ("plain", None), ("smoothed", "it reads smoothed text")):
        method, _ = bound(soft=soft)
        assert method.needs() == (Needs(), [Needs(uncacheable_reason=reason)])
        assert method.uses_teachers is (soft != "none")


@pytest.mark.parametrize("teachers", [0, 1, 2])
def test_without_soft_labels_there_may_be_any_number_of_teachers_that_do_not_run(teachers: int) -> None:
    method, step = bound(teachers=teachers)
    method.terms(step)
    assert not any(teacher.ran for teacher in step.teachers)


# -- gradients -------------------------------------------------------------------------------------------------------------


def test_words_that_the_text_lacks_get_a_gradient_and_the_masked_language_model_none() -> None:
    for rate, dense in ((0.5, True), (0.0, False)):
        method, step = bound(rate=rate, topk=None, soft="smoothed")
        sum(method.terms(step).values()).backward()
        rows = step.student.model.word_embeddings.weight.grad.abs().sum(dim=1)
        present = {TOKENIZER.pad_token_id, *step.batch.student["input_ids"].flatten().tolist()}  # padding has no gradient
        absent = sorted(set(range(len(TOKENIZER))) - present)
        assert (rows[absent] > 0).all() if dense else (rows[absent] == 0).all()
        frozen: Any = [step.aids["mlm"].model, step.teachers[0].model]
        assert all(parameter.grad is None for model in frozen for parameter in model.encoder.parameters())


def test_held_step_has_the_masked_language_model_over_the_held_text() -> None:
    _, step = bound()
    inputs = {name: rows[:2] for name, rows in inputs_of().items()}
    held = Batch(inputs, (inputs,), torch.tensor([0, 1]), torch.arange(3, 5))
    aids = step.replace(batch=replace(step.batch, held=held)).on_held().aids
    assert aids["mlm"].inputs is inputs
    assert aids["mlm"].model is step.aids["mlm"].model


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("texts", "plain"),
        ("rate", 1.5),
        ("rate", "half"),
        ("temperature", 0.0),
        ("topk", 0),
        ("positions", "nouns"),
        ("replace", "swap"),
        ("soft", "both"),
        ("soft_temperature", -1.0),
        ("loss", "l1"),
        ("reduction", "sum"),
    ],
)
def test_option_out_of_range_is_refused_by_its_name(option: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        TextSmoothing(**{option: value})
    assert caught.value.key == option
