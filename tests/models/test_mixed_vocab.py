"""Mixed-vocabulary training: the checks of the paper's card, on pure modules and on small models."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertModel

from conftest import FILLER, GOOD, tiny_config, tiny_tokenizer
from kd.data.batch import Batch
from kd.data.examples import Examples
from kd.data.masked_lm.datamodule import MaskedLMDataModule
from kd.data.masked_lm.task import NOT_PREDICTED, MaskedLM
from kd.errors import InputError
from kd.forward import Needs
from kd.models import Encoder
from kd.models.surgery.embeddings import SurgeryInputs
from kd.models.surgery.mixed_vocab import LiftedEmbedding, MixedEmbedding, MixedOutputs, MixedStage, MixedVocab, separate
from kd.results.export import largest_difference

TASK = MaskedLM("toy", ["loss", "accuracy"], "loss")
TEXTS = [" ".join((FILLER + GOOD)[n : n + 12]) for n in range(14)]
LARGE = tiny_config().vocab_size


def plain(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(AutoModelForMaskedLM.from_config(tiny_config(initializer_range=0.2)).eval(), tiny_tokenizer())


def staged(probability: float = 0.5, **options: object) -> Encoder:
    made, _ = MixedStage(size=70, **{"width": 16, **options}, probability=probability)(plain(), SurgeryInputs(TEXTS))
    return made.eval()


def data(encoder: Encoder) -> MaskedLMDataModule:
    texts = [(text,) for text in TEXTS]
    examples = Examples(TASK, {"train": texts, "validation": texts}, {})
    return MaskedLMDataModule(examples, [encoder.tokenizer], [], 14, 14, 64, seed=0)


def batch_of(encoder: Encoder) -> Batch:
    return next(iter(data(encoder).train_dataloader()))


def loss_of(encoder: Encoder, batch: Batch) -> torch.Tensor:
    return TASK.hard(encoder(batch.student, Needs()).logits, batch.labels)


# -- the card's checks -----------------------------------------------------------------------------------------------------


def test_hand_example_of_the_two_tied_softmaxes() -> None:
    large = torch.nn.Linear(2, 3)
    small = LiftedEmbedding(torch.tensor([[2.0], [0.0]]), 2)
    with torch.no_grad():
        large.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        large.bias.zero_()
        small.lift.weight.copy_(torch.tensor([[1.0], [0.0]]))
    states = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    logits = separate(MixedOutputs(large, small)(states), 3, torch.tensor([False, True]))
    losses = F.cross_entropy(logits, torch.tensor([0, 3]), reduction="none")
    assert losses.tolist() == pytest.approx([0.551445, 0.126928], abs=1e-6)


def test_without_small_words_it_is_the_ordinary_model_and_the_small_table_learns_nothing() -> None:
    ordinary, mixed = plain(), staged(probability=0.0)
    one, other = batch_of(ordinary), batch_of(mixed)
    assert torch.equal(one.labels, other.labels)
    losses = loss_of(ordinary, one), loss_of(mixed, other)
    assert torch.allclose(*losses, atol=1e-6)
    for loss in losses:
        loss.backward()
    small = mixed.model.get_input_embeddings().small
    for parameter in small.parameters():
        assert parameter.grad is not None, "DDP needs every parameter in every step's graph"
        assert not parameter.grad.any()
    expected = ordinary.model.get_input_embeddings().weight.grad
    assert torch.allclose(mixed.model.get_input_embeddings().large.weight.grad, expected, atol=1e-6)


def test_with_small_words_alone_the_large_table_learns_nothing_but_the_special_tokens() -> None:
    mixed = staged(probability=1.0)
    loss_of(mixed, batch_of(mixed)).backward()
    moved = mixed.model.get_input_embeddings().large.weight.grad.abs().sum(dim=1) > 0
    assert set(moved.nonzero()[:, 0].tolist()) <= {0, 2, 3}
    for name, parameter in mixed.named_parameters():
        assert parameter.grad is not None, name
    assert mixed.model.get_input_embeddings().small.table.grad.abs().sum() > 0


def test_every_masked_position_contributes_to_exactly_one_softmax() -> None:
    mixed = staged()
    batch = batch_of(mixed)
    logits, wanted = mixed(batch.student, Needs()).logits, batch.labels[batch.labels != NOT_PREDICTED]
    first, second = wanted < LARGE, wanted >= LARGE
    assert first.any()
    assert second.any()
    assert int(first.sum() + second.sum()) == len(wanted) == len(logits)
    chances = logits.softmax(dim=-1)
    assert torch.allclose(chances[first][:, :LARGE].sum(dim=1), torch.ones(int(first.sum())))
    assert torch.allclose(chances[second][:, LARGE:].sum(dim=1), torch.ones(int(second.sum())))
    assert not chances[first][:, LARGE:].any()
    assert not chances[second][:, :LARGE].any()
    assert loss_of(mixed, batch).isfinite()


@pytest.mark.parametrize(("layers", "parameters"), [(6, 6_198_016), (12, 10_936_576)])
def test_published_students_have_the_published_number_of_parameters(layers: int, parameters: int) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 1024}
    config = BertConfig(vocab_size=4928, **sizes)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in BertModel(config).parameters()) == parameters


def test_words_and_states_replace_both_vocabularies_where_the_ids_tell_them_apart() -> None:
    mixed = staged()
    given, needs = batch_of(mixed).student, Needs(words=True, hidden=[0, 2])
    expected = mixed(given, needs)
    assert torch.equal(expected.words, mixed.word_embeddings(given["input_ids"]))
    again = mixed({**given, "words": expected.words}, needs)
    for name in needs.tensors:
        assert torch.equal(again.named()[name], expected.named()[name]), name
    start = {"embedded": expected.hidden(2), "from_layer": 2}
    assert torch.equal(mixed({**given, **start}, Needs()).logits, expected.logits)
    blind = {name: tensor for name, tensor in given.items() if name != "input_ids"}
    for replacement in ({"words": expected.words}, start):
        with pytest.raises(ValueError, match="a model with two vocabularies needs 'input_ids' beside 'words' or 'embedded'"):
            mixed({**blind, **replacement}, Needs())


def test_predicted_positions_of_one_vocabulary_need_no_ids() -> None:
    ordinary = plain()
    given = batch_of(ordinary).student
    expected = ordinary(given, Needs(words=True, hidden=[2]))
    blind = {name: tensor for name, tensor in given.items() if name != "input_ids"}
    for replacement in ({"words": expected.words}, {"embedded": expected.hidden(2), "from_layer": 2}):
        assert torch.equal(ordinary({**blind, **replacement}, Needs()).logits, expected.logits)


# -- modules -----------------------------------------------------------------------------------------------------------------


def test_small_words_are_embedded_through_the_affine_map() -> None:
    words = MixedEmbedding(torch.nn.Embedding(5, 4), LiftedEmbedding(torch.randn(3, 2), 4))
    found = words(torch.tensor([[1, 5, 7, 4]]))[0]
    lift = words.small.lift
    for row, number in ((1, 0), (2, 2)):
        assert torch.allclose(found[row], lift.weight @ words.small.table[number] + lift.bias)
    assert torch.equal(found[[0, 3]], words.large.weight[[1, 4]])


def test_tied_small_logits_are_products_with_the_lifted_embeddings_without_their_offset() -> None:
    torch.manual_seed(0)
    small, states = LiftedEmbedding(torch.randn(5, 3), 4), torch.randn(2, 4)
    naive = [[sum(h[i] * small.lift.weight[i] @ e for i in range(4)) for e in small.table] for h in states]
    assert torch.allclose(small.logits(states), torch.tensor(naive), atol=1e-6)


def test_a_free_small_softmax_is_a_matrix_of_its_own() -> None:
    tied, free = staged(), staged(tied=False)
    assert free.parameter_count() - tied.parameter_count() == 70 * 32
    batch = batch_of(free)
    loss_of(free, batch).backward()
    assert all(parameter.grad is not None for parameter in free.parameters())


def test_step_in_bf16_autocast_is_finite() -> None:
    mixed = staged()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(mixed, batch_of(mixed))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in mixed.parameters())


# -- from stage to stage ---------------------------------------------------------------------------------------------------


def test_stage_one_is_exported_as_the_plain_large_model_with_the_small_vocabulary_beside_it(tmp_path: Path) -> None:
    mixed = staged()
    with torch.no_grad():
        for parameter in mixed.parameters():
            parameter += 0.01
    mixed.save(tmp_path)
    assert largest_difference(mixed, tmp_path, data(mixed).probe("validation", 6).student, "masked_lm") <= 1e-5
    model = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == LARGE
    assert torch.equal(model.get_input_embeddings().weight, mixed.model.get_input_embeddings().large.weight)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tiny_tokenizer().get_vocab()
    kept = load_file(tmp_path / "vocabulary/embeddings.safetensors")
    small = mixed.model.get_input_embeddings().small
    words = torch.arange(5, 70)
    assert torch.equal(kept["embeddings"][words], small.table[words])
    assert torch.equal(kept["lift"], small.lift.weight)
    assert torch.equal(kept["offset"], small.lift.bias)
    assert isinstance(mixed.model.get_input_embeddings(), MixedEmbedding), "the model in training is left as it is"


def test_exported_text_of_both_vocabularies_would_not_agree_with_the_plain_model(tmp_path: Path) -> None:
    mixed = staged()
    mixed.save(tmp_path)
    with pytest.raises((RuntimeError, IndexError)):
        largest_difference(mixed, tmp_path, batch_of(mixed).student, "masked_lm")


def test_stage_two_begins_with_the_learned_vocabulary_and_its_embeddings(tmp_path: Path) -> None:
    mixed = staged(width=32)
    mixed.save(tmp_path)
    student, _ = MixedVocab()(plain(seed=9), SurgeryInputs(TEXTS, tmp_path))
    kept = load_file(tmp_path / "vocabulary/embeddings.safetensors")["embeddings"]
    assert torch.equal(student.model.get_input_embeddings().weight, kept)
    assert student.model.cls.predictions.decoder.weight is student.model.get_input_embeddings().weight
    assert student.config.vocab_size == len(student.tokenizer) == 70
    assert student.tokenizer.get_vocab() == mixed.tokenizer.second.get_vocab()
    assert not kept[student.tokenizer.pad_token_id].any()
    student.save(tmp_path / "second")
    assert largest_difference(student, tmp_path / "second", batch_of(student).student, "masked_lm") <= 1e-6


def test_special_tokens_are_mapped_once_to_the_nearest_small_embedding(tmp_path: Path) -> None:
    mixed = staged()
    mixed.save(tmp_path)
    words = mixed.model.get_input_embeddings()
    kept = load_file(tmp_path / "vocabulary/embeddings.safetensors")
    wanted = words.large.weight[2]

    def distance(small: torch.Tensor) -> float:
        return float((kept["lift"] @ small + kept["offset"] - wanted).norm())

    best = kept["embeddings"][2]
    assert all(distance(best) < distance(best + 0.01 * torch.eye(16)[axis] * sign) for axis in range(16) for sign in (1, -1))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    from conftest import tiny_model

    with pytest.raises(InputError, match="more than the text supports"):
        MixedStage(size=9000)(plain(), SurgeryInputs(TEXTS))
    with pytest.raises(InputError, match="masked language model"):
        MixedStage(size=70).shape(Encoder(tiny_model(), tiny_tokenizer()))
    with pytest.raises(InputError, match="masked language model"):
        MixedStage(size=70)(Encoder(tiny_model(), tiny_tokenizer()), SurgeryInputs(TEXTS))
    with pytest.raises(InputError, match="must be at least 0 and at most 1"):
        MixedStage(size=70, probability=1.5)
    with pytest.raises(InputError, match=r"surgery=\[mixed_stage\]"):
        MixedVocab()(plain(), SurgeryInputs(TEXTS, tmp_path))
    staged(width=16).save(tmp_path)
    with pytest.raises(InputError, match="have width 16, the student has 32"):
        MixedVocab()(copy.deepcopy(plain()), SurgeryInputs(TEXTS, tmp_path))
