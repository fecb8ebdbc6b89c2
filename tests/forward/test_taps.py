"""Taps: what a forward shows equals what transformers shows, for every family."""

import copy
from collections.abc import Callable

import pytest
import torch
from encoders import ALL, CONTEXT, HEADS, LAYERS, TOKENS, WIDTH, eager, encoder, families, hooks, inputs
from torch import Tensor

from kd.errors import InputError
from kd.forward import Needs, Outputs, Tap, UndeclaredRead
from kd.forward.kinds import KIND_OF, KINDS, Kind, by_token
from kd.forward.taps import family_of
from kd.models import Encoder

paddings = pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])


@families
@paddings
def test_states_attention_and_logits_are_those_of_transformers(family: str, padded: bool) -> None:
    tapped, batch = encoder(family), inputs(padded)
    ours, theirs = tapped(batch, ALL), eager(tapped, batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(ours.mask, real)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-9)
    assert len(theirs.hidden_states) == LAYERS + 1
    for layer, expected in enumerate(theirs.hidden_states):
        torch.testing.assert_close(ours.hidden(layer)[real], expected[real], rtol=0, atol=1e-9)
        torch.testing.assert_close(ours.cls(layer), expected[:, 0], rtol=0, atol=1e-9)
    assert len(theirs.attentions) == LAYERS
    for layer, expected in enumerate(theirs.attentions, start=1):
        found = ours.attention(layer).transpose(1, 2)[real]  # (real tokens, heads, tokens)
        torch.testing.assert_close(found, expected.transpose(1, 2)[real], rtol=0, atol=1e-9)


@families
def test_float32_states_and_attention_are_within_one_millionth(family: str) -> None:
    tapped, batch = encoder(family), inputs()
    for parameter in tapped.parameters():
        parameter.data *= 0.1  # the size of a fresh model's weights
    expected = eager(tapped, batch)
    found = tapped.float()(batch, ALL)
    real = batch["attention_mask"].bool()
    for layer in range(1, LAYERS + 1):
        torch.testing.assert_close(
            found.hidden(layer)[real].double(), expected.hidden_states[layer][real], rtol=1e-6, atol=1e-6
        )
        attention = found.attention(layer).transpose(1, 2)[real].double()
        torch.testing.assert_close(attention, expected.attentions[layer - 1].transpose(1, 2)[real], rtol=0, atol=1e-6)


@families
def test_attention_is_a_distribution_over_real_tokens(family: str) -> None:
    batch = inputs()
    attention = encoder(family)(batch, ALL).attention(1)
    assert attention.shape == (3, HEADS, TOKENS, TOKENS)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, HEADS, TOKENS).double())
    assert attention.masked_select(~batch["attention_mask"].bool()[:, None, None, :]).abs().max() == 0


@families
def test_attention_times_values_is_what_the_block_goes_on_with(family: str) -> None:
    tapped, batch, seen = encoder(family), inputs(), []
    for block in tapped.base.get_submodule(tapped.family.blocks):
        block.get_submodule(CONTEXT[family]).register_forward_pre_hook(lambda _, taken: seen.append(taken[0]))
    outputs = tapped(batch, ALL)
    real = batch["attention_mask"].bool()
    for layer, context in enumerate(seen, start=1):
        values = outputs.value(layer).view(3, TOKENS, HEADS, -1).transpose(1, 2)
        ours = (outputs.attention(layer) @ values).transpose(1, 2).reshape(3, TOKENS, WIDTH)
        torch.testing.assert_close(ours[real], context[real], rtol=0, atol=1e-9)


@families
def test_scores_are_scaled_products_of_queries_and_keys_per_head(family: str) -> None:
    tapped = encoder(family)
    outputs = tapped(inputs(), ALL)
    query, key, size = outputs.query(2), outputs.key(2), WIDTH // HEADS
    bias = torch.zeros(1, HEADS, TOKENS, TOKENS)
    if family == "mpnet":
        bias = tapped.base.encoder.compute_position_bias(outputs.hidden(0))
        assert bias.abs().max() > 0.1
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        expected = query[1, 4, part] @ key[1, 7, part] / size**0.5 + bias[0, head, 4, 7]  # token 7 is padding: scores show it
        torch.testing.assert_close(outputs.scores(2)[1, head, 4, 7], expected)


@pytest.mark.parametrize("heads", [1, 4, 12])
@pytest.mark.parametrize("kind", ["query", "key", "value"])
def test_relations_have_any_number_of_heads_that_divides_the_width(kind: str, heads: int) -> None:
    outputs = encoder()(inputs(), ALL)
    found = outputs.relation(kind, 2, heads)
    assert found.shape == (3, heads, TOKENS, TOKENS)
    states = getattr(outputs, kind)(2)[0].view(TOKENS, heads, WIDTH // heads)
    expected = torch.einsum("ihd,jhd->hij", states, states) / (WIDTH // heads) ** 0.5
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found, found.transpose(-1, -2))


def test_relation_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="5 heads do not divide a width of 24"):
        encoder()(inputs(), ALL).relation("value", 1, heads=5)


@families
def test_shared_block_is_read_at_each_of_its_layers(family: str) -> None:
    tapped, batch = encoder(family), inputs()
    blocks = tapped.base.get_submodule(tapped.family.blocks)
    blocks[2] = blocks[0]  # layers 1 and 3 are one module
    ours, real = tapped(batch, ALL), batch["attention_mask"].bool()
    unshared = copy.deepcopy(tapped)
    copies = unshared.base.get_submodule(tapped.family.blocks)
    copies[2] = copy.deepcopy(copies[0])
    theirs = eager(unshared, batch)
    for layer in range(1, LAYERS + 1):
        torch.testing.assert_close(ours.hidden(layer)[real], theirs.hidden_states[layer][real], rtol=0, atol=1e-9)
        attention = ours.attention(layer).transpose(1, 2)[real]
        torch.testing.assert_close(attention, theirs.attentions[layer - 1].transpose(1, 2)[real], rtol=0, atol=1e-9)
    projection = blocks[0].get_submodule(tapped.family.value)
    torch.testing.assert_close(ours.value(3), projection(ours.hidden(2)))


def projection(tapped: Encoder, layer: int, tensor: str) -> torch.nn.Module:
    """The projection of a layer, 1 and up, whose outputs are `query`, `key` or `value`."""
    block = tapped.base.get_submodule(tapped.family.blocks)[layer - 1]
    return block.get_submodule(getattr(tapped.family, tensor))


def share(tapped: Encoder, layer: int, tensor: str, module: torch.nn.Module) -> None:
    """Replace one projection of one block; blocks that are one module would both change."""
    path = f"{tapped.family.base}.{tapped.family.blocks}.{layer - 1}.{getattr(tapped.family, tensor)}"
    tapped.replace_submodule(path, module)


def exchanged(tapped: Encoder, source: int, layer: int) -> None:
    """Queries of a layer come from the key projection of another, its keys from that one's query projection."""
    query, key = (projection(tapped, source, tensor) for tensor in ("query", "key"))
    share(tapped, layer, "query", key)
    share(tapped, layer, "key", query)


def between_blocks(tapped: Encoder) -> None:
    exchanged(tapped, 1, 3)


def adjacent(tapped: Encoder) -> None:
    exchanged(tapped, 1, 2)
    exchanged(tapped, 2, 3)


def one_attention(tapped: Encoder) -> None:
    blocks = tapped.base.get_submodule(tapped.family.blocks)
    blocks[2].attention = blocks[0].attention


def one_block(tapped: Encoder) -> None:
    blocks = tapped.base.get_submodule(tapped.family.blocks)
    blocks[1] = blocks[2] = blocks[0]


def inside_a_block(tapped: Encoder) -> None:
    """Queries and keys of a block are one projection, which is the value projection of the next."""
    share(tapped, 2, "key", projection(tapped, 2, "query"))
    share(tapped, 3, "value", projection(tapped, 2, "query"))


def everything(tapped: Encoder) -> None:
    """One projection for the queries, keys and values of the last two blocks."""
    for layer in (2, 3):
        for tensor in ("query", "key", "value"):
            share(tapped, layer, tensor, projection(tapped, 1, "query"))


def unshared(tapped: Encoder) -> Encoder:
    """A copy in which no two layers, and no two projections of a layer, are one module."""
    plain = copy.deepcopy(tapped)
    blocks = plain.base.get_submodule(plain.family.blocks)
    for layer in range(1, LAYERS + 1):
        blocks[layer - 1] = copy.deepcopy(blocks[layer - 1])
        for tensor in ("query", "key", "value"):
            share(plain, layer, tensor, copy.deepcopy(projection(plain, layer, tensor)))
    return plain


@families
@pytest.mark.parametrize("sharing", [between_blocks, adjacent, one_attention, one_block, inside_a_block, everything])
def test_shared_projections_are_read_as_those_of_an_unshared_copy(family: str, sharing: Callable[[Encoder], None]) -> None:
    tapped = encoder(family).train()
    for module in tapped.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = unshared(tapped)(inputs(), ALL)
    sharing(tapped)
    plain, batch = unshared(tapped), inputs()
    assert len(list(plain.parameters())) > len(list(tapped.parameters()))
    ours, theirs = tapped(batch, ALL), plain(batch, ALL)
    assert not torch.equal(before.logits, ours.logits)
    for name, tensor in theirs.named().items():
        assert torch.equal(ours.named()[name], tensor), name
    real = batch["attention_mask"].bool()
    reference = eager(plain, batch).attentions
    for layer in range(1, LAYERS + 1):
        for tensor in ("query", "key", "value"):
            expected = projection(plain, layer, tensor)(ours.hidden(layer - 1))
            assert torch.equal(ours.read(tensor, layer), expected), f"{tensor} of layer {layer}"
        found = ours.attention(layer).transpose(1, 2)[real]
        torch.testing.assert_close(found, reference[layer - 1].transpose(1, 2)[real], rtol=0, atol=1e-9)


@families
@pytest.mark.parametrize("sharing", [between_blocks, inside_a_block, everything])
@pytest.mark.parametrize("tensor", ["query", "key", "value"])
def test_gradients_of_shared_projections_are_those_of_the_declared_role(
    family: str, sharing: Callable[[Encoder], None], tensor: str
) -> None:
    tapped = encoder(family)
    sharing(tapped)
    kind, gradients = KIND_OF[tensor], []
    for model in (tapped, unshared(tapped)):
        outputs = model(inputs(), Needs(taps=[Tap(kind, layer) for layer in range(1, LAYERS + 1)]))
        taps = [outputs.read(tensor, layer) for layer in range(1, LAYERS + 1)]
        gradients.append(torch.autograd.grad(outputs.logits.square().sum(), taps))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "needs",
    [Needs(), Needs(hidden=[2]), Needs(hidden=[0]), Needs(cls=[0]), Needs(cls=[2]), Needs(attention=[1]), Needs(value=[3])],
    ids=str,
)
def test_only_what_was_declared_is_kept(needs: Needs) -> None:
    kept = encoder()(inputs(), needs).tensors
    assert set(kept["hidden"]) == needs.hidden
    assert set(kept["cls"]) == needs.cls
    assert set(kept["query"]) == set(kept["key"]) == needs.attention
    assert set(kept["value"]) == needs.value


def test_a_new_row_of_the_table_is_all_that_a_new_kind_of_states_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "mean", Kind(("mean",), lowest=0, by_token=False, of_states=lambda states: states.mean(1)))
    monkeypatch.setitem(KIND_OF, "mean", "mean")
    needs = Needs(hidden=[0, 2], taps=[Tap("mean", 0), Tap("mean", 2)])
    outputs = encoder()(inputs(), needs)
    assert needs.tensors == ["logits", "hidden-0", "hidden-2", "mean-0", "mean-2"] == list(outputs.named())
    for layer in (0, 2):
        assert torch.equal(outputs.read("mean", layer), outputs.hidden(layer).mean(1))
    with pytest.raises(UndeclaredRead, match=r"mean of layer 1 was read, but needs\(\) declares only: .*mean=\[0, 2\]"):
        outputs.read("mean", 1)
    again = Outputs.from_named(outputs.named(), outputs.mask, needs, outputs.heads)
    assert again.read("mean", 2) is outputs.read("mean", 2)
    assert not by_token("mean-2")


@families
def test_hooks_are_gone_after_a_pass(family: str) -> None:
    tapped = encoder(family)
    before, first = hooks(tapped), tapped(inputs(), ALL)
    assert hooks(tapped) == before
    assert torch.equal(tapped(inputs(), ALL).hidden(LAYERS), first.hidden(LAYERS))


def test_hooks_are_gone_after_a_pass_that_failed() -> None:
    tapped, batch = encoder(), inputs()
    before = hooks(tapped)
    with pytest.raises(IndexError):
        tapped({**batch, "input_ids": batch["input_ids"] + 10_000}, ALL)
    assert hooks(tapped) == before


@families
def test_taps_change_no_logits(family: str) -> None:
    tapped = encoder(family)
    expected = tapped(inputs(), Needs()).logits
    assert torch.equal(tapped(inputs(), ALL).logits, expected)
    gradient = Needs(hidden=ALL.hidden, attention=ALL.attention, value=ALL.value, gradient=True)
    torch.testing.assert_close(tapped(inputs(), gradient).logits, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["hidden", "attention", "value"])
def test_needs_deeper_than_the_model_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"layer {LAYERS + 1} of a model with {LAYERS} layers"):
        encoder()(inputs(), Needs(**{kind: [1, LAYERS + 1]}))


def attribution(tapped: Encoder) -> Tensor:
    """Squared length of the gradient of a logit with respect to the embeddings."""
    outputs: Outputs = tapped(inputs(), Needs(hidden=[0], gradient=True))
    (gradient,) = torch.autograd.grad(outputs.logits[:, 1].sum(), outputs.hidden(0), create_graph=True)
    return (gradient**2).sum()


@families
def test_a_gradient_can_be_differentiated_again(family: str) -> None:
    tapped = encoder(family)
    block = tapped.base.get_submodule(tapped.family.blocks)[1]
    for path in (tapped.family.query, tapped.family.value):
        weight = block.get_submodule(path).weight
        (found,) = torch.autograd.grad(attribution(tapped), weight)
        place, step = divmod(int(found.abs().argmax()), WIDTH), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
            values.append(attribution(tapped).item())
            with torch.no_grad():
                weight[place] -= sign * step
        # Central differences are good to about step squared.
        assert found[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_an_unknown_family_is_refused_by_its_key() -> None:
    with pytest.raises(InputError, match="'electra' is not one of bert, roberta, distilbert, mpnet") as caught:
        family_of("electra", "teacher.x.model")
    assert caught.value.key == "teacher.x.model"
