"""Heads and layers that are left out: what remains is a model without them, for every family, and no module is changed."""

import copy
from collections.abc import Callable

import pytest
import torch
from encoders import ALL, CONTEXT, HEADS, LAYERS, WIDTH, encoder, families, hooks, inputs
from torch import nn

from conftest import tiny_model
from kd.forward import Needs
from kd.forward.inputs import tensors_of
from kd.forward.taps import LeftOut
from kd.models import Encoder, compiled
from kd.models.surgery.embeddings import SurgeryInputs
from kd.models.surgery.sharing import ShuffledSharing


def blocks(model: Encoder) -> nn.ModuleList:
    return model.base.get_submodule(model.family.blocks)


def own(model: Encoder) -> Encoder:
    """A copy that leaves nothing out, and in which no two layers are one module, nor share one."""
    plain = copy.deepcopy(model)
    plain.left_out = LeftOut()
    found = blocks(plain)
    for index in range(len(found)):
        found[index] = copy.deepcopy(found[index])
    return plain


def headless(model: Encoder, *heads: tuple[int, int]) -> Encoder:
    """A copy whose projections read nothing of these heads: their columns of the weights are zero."""
    plain, size = own(model), model.width // model.heads
    for layer, head in heads:
        projection = blocks(plain)[layer - 1].get_submodule(CONTEXT[model.config.model_type])
        projection.weight.data[:, head * size : (head + 1) * size] = 0
    return plain


def shorter(model: Encoder, *layers: int) -> Encoder:
    """A copy without these blocks."""
    plain = own(model)
    path, _, name = plain.family.blocks.rpartition(".")
    kept = [block for number, block in enumerate(blocks(plain), start=1) if number not in layers]
    setattr(plain.base.get_submodule(path), name, nn.ModuleList(kept))
    plain.config.num_hidden_layers = len(kept)
    return plain


def logits(model: Encoder) -> torch.Tensor:
    return model(inputs(), Needs()).logits


@families
def test_a_model_without_a_head_is_one_whose_projection_does_not_read_it(family: str) -> None:
    model = encoder(family)
    assert model.family.context == CONTEXT[family]
    found = {}
    for layer in range(1, LAYERS + 1):
        for head in range(HEADS):
            with model.without(head=(layer, head)):
                found[layer, head] = logits(model)
            torch.testing.assert_close(found[layer, head], logits(headless(model, (layer, head))), rtol=0, atol=1e-12)
    assert len({tuple(values.flatten().tolist()) for values in (*found.values(), logits(model))}) == LAYERS * HEADS + 1


@families
def test_a_model_without_a_layer_is_one_without_its_block(family: str) -> None:
    model = encoder(family)
    for layer in range(1, LAYERS + 1):
        with model.without(layer=layer):
            outputs = model(inputs(), ALL)
        plain = shorter(model, layer)
        theirs = plain(inputs(), Needs(hidden=range(LAYERS)))
        assert torch.equal(outputs.logits, theirs.logits)
        assert torch.equal(outputs.hidden(layer), outputs.hidden(layer - 1)), "the output of a layer is its input"
        for other in range(LAYERS + 1):
            assert torch.equal(outputs.hidden(other), theirs.hidden(other - (other >= layer))), other
        assert not torch.equal(outputs.logits, logits(model))


@families
def test_without_nothing_logits_are_equal_bit_for_bit(family: str) -> None:
    for model in (encoder(family), encoder(family).float()):
        before, count = logits(model), hooks(model)
        with model.without() as same:
            assert same is model
            assert torch.equal(logits(model), before)
        with model.without(head=(2, 1)), model.without(layer=1):
            assert not torch.equal(logits(model), before)
            assert hooks(model) == count, "hooks are there during a pass alone"
        assert torch.equal(logits(model), before)
        assert hooks(model) == count


@families
def test_contexts_in_one_another_leave_out_all_that_they_name(family: str) -> None:
    model = encoder(family)
    with model.without(head=(1, 0)), model.without(head=(1, 2)), model.without(head=(3, 1)):
        torch.testing.assert_close(logits(model), logits(headless(model, (1, 0), (1, 2), (3, 1))), rtol=0, atol=1e-12)
    with model.without(layer=1), model.without(layer=3):
        assert torch.equal(logits(model), logits(shorter(model, 1, 3)))
    with model.without(head=(2, 1), layer=3):
        torch.testing.assert_close(logits(model), logits(shorter(headless(model, (2, 1)), 3)), rtol=0, atol=1e-12)
        with model.without(layer=1), pytest.raises(RuntimeError, match="inside"):
            raise RuntimeError("inside")
        torch.testing.assert_close(logits(model), logits(shorter(headless(model, (2, 1)), 3)), rtol=0, atol=1e-12)


def one_block(model: Encoder) -> None:
    blocks(model)[2] = blocks(model)[0]


def one_attention(model: Encoder) -> None:
    blocks(model)[2].attention = blocks(model)[0].attention


def one_projection(model: Encoder) -> None:
    path = CONTEXT[model.config.model_type]
    blocks(model)[1].set_submodule(path, blocks(model)[0].get_submodule(path))


@families
@pytest.mark.parametrize("sharing", [one_block, one_attention, one_projection])
def test_of_a_shared_module_only_the_layer_that_is_named_is_changed(family: str, sharing: Callable[[Encoder], None]) -> None:
    model = encoder(family)
    sharing(model)
    for layer in range(1, LAYERS + 1):
        with model.without(head=(layer, 1)):
            torch.testing.assert_close(logits(model), logits(headless(model, (layer, 1))), rtol=0, atol=1e-12)
        with model.without(layer=layer):
            assert torch.equal(logits(model), logits(shorter(model, layer)))


def test_of_layers_that_a_surgery_repeats_only_the_one_that_is_named_is_changed() -> None:
    model, _ = ShuffledSharing("all")(encoder(), SurgeryInputs([]))
    assert model.depth == 2 * LAYERS
    for layer in (1, LAYERS + 1, 2 * LAYERS):
        with model.without(head=(layer, 2)):
            torch.testing.assert_close(logits(model), logits(headless(model, (layer, 2))), rtol=0, atol=1e-12)
        with model.without(layer=layer):
            assert torch.equal(logits(model), logits(shorter(model, layer)))


@families
def test_a_pass_from_the_states_of_a_layer_counts_layers_as_a_whole_pass(family: str) -> None:
    model, batch = encoder(family), inputs()
    for start in range(LAYERS):
        states = model(batch, Needs(hidden=[start])).hidden(start)
        upper = {"embedded": states, "from_layer": start, "attention_mask": batch["attention_mask"]}
        assert set(tensors_of(upper)) == {"embedded", "attention_mask"}
        for layer in range(start + 1, LAYERS + 1):
            for left_out in ({"head": (layer, 1)}, {"layer": layer}):
                with model.without(**left_out):
                    assert torch.equal(model(upper, Needs()).logits, logits(model)), (start, left_out)


def test_a_head_is_left_out_of_gradients_too() -> None:
    model, size = encoder(), WIDTH // HEADS
    with model.without(head=(2, 1)):
        logits(model).square().sum().backward()
    part = slice(size, 2 * size)
    assert blocks(model)[1].get_submodule(model.family.value).weight.grad[part].abs().max() == 0
    assert blocks(model)[1].get_submodule(model.family.value).weight.grad[: part.start].abs().max() > 0
    assert blocks(model)[0].get_submodule(model.family.value).weight.grad[part].abs().min() > 0


def test_blocks_run_uncompiled_where_a_part_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    plain, model.compiled = logits(model), True
    monkeypatch.setattr(compiled, "compiled_forward", lambda kind: lambda block, *given, **named: kind.forward(block, *given))
    monkeypatch.setattr("kd.models.encoder.compiled_blocks", lambda found: pytest.fail("blocks were compiled"))
    with model.without(head=(1, 0)):
        assert not torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ({"layer": 0}, "layer 0 cannot be left out of a model with layers 1 to 3"),
        ({"layer": LAYERS + 1}, "layer 4 cannot"),
        ({"head": (0, 0)}, "layer 0 cannot"),
        ({"head": (1, HEADS)}, "head 3 cannot be left out of a layer with heads 0 to 2"),
        ({"head": (1, -1)}, "head -1 cannot"),
    ],
)
def test_what_a_model_does_not_have_cannot_be_left_out(left_out: dict, words: str) -> None:
    model = encoder()
    with pytest.raises(ValueError, match=words), model.without(**left_out):
        pass
    assert not model.left_out


def test_heads_of_a_width_that_they_share_evenly() -> None:
    model = Encoder(tiny_model(model_type="bert", layers=1, width=8, heads=8)).double()
    for head in range(8):
        with model.without(head=(1, head)):
            torch.testing.assert_close(logits(model), logits(headless(model, (1, head))), rtol=0, atol=1e-12)
