"""Taps: what a forward shows equals what transformers shows, for every family."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from conftest import tiny_model
from kd.errors import InputError
from kd.forward import Needs, Outputs, Tap, UndeclaredRead
from kd.forward.kinds import KIND_OF, KINDS, Kind, by_token
from kd.forward.taps import FAMILIES, family_of
from kd.models import Encoder

LAYERS, WIDTH, HEADS, TOKENS = 3, 24, 3, 9
ALL = Needs(hidden=range(LAYERS + 1), cls=range(LAYERS + 1), attention=range(1, LAYERS + 1), value=range(1, LAYERS + 1))
CONTEXT = {  # the projection that takes attention times values
    "bert": "attention.output.dense",
    "roberta": "attention.output.dense",
    "distilbert": "attention.out_lin",
    "mpnet": "attention.attn.o",
}

families = pytest.mark.parametrize("family", FAMILIES)
paddings = pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])


def inputs(padded: bool = True) -> dict[str, Tensor]:
    """Three sentences, two of them shorter; of two segments."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30, (3, TOKENS), generator=generator)
    lengths = torch.tensor([TOKENS, 6, 4] if padded else [TOKENS] * 3)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    segments = (torch.arange(TOKENS) >= 3).long().expand(3, TOKENS)
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": segments * mask}


def encoder(family: str = "bert", seed: int = 0, **more: object) -> Encoder:
    """In float64, with weights large enough that attention is far from uniform."""
    model = tiny_model(seed, model_type=family, layers=LAYERS, width=WIDTH, heads=HEADS, **more).double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Encoder(model)


def eager(tapped: Encoder, batch: dict[str, Tensor]) -> object:
    """Return the outputs of Transformers' own eager attention with the same weights."""
    config = copy.deepcopy(tapped.config)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").double().eval()
    model.load_state_dict(tapped.model.state_dict())
    segments = {} if config.model_type == "bert" else {"token_type_ids"}  # the other families have none
    taken = {name: value for name, value in batch.items() if name not in segments}
    return model(**taken, output_hidden_states=True, output_attentions=True)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


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
