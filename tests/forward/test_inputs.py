"""Passes that start at word embeddings or at the states of a layer give what the pass over the text gives, for every family."""

import contextlib

import pytest
import torch
from encoders import ALL, LAYERS, TOKENS, WIDTH, encoder, families, hooks, inputs
from torch import Tensor

from kd.forward import Forward, Inputs, Needs, Outputs, Tap, UndeclaredRead
from kd.forward.inputs import start_of, tensors_of
from kd.forward.lazy import Detached
from kd.forward.taps import FAMILIES, blocks_above
from kd.models import Encoder, FrozenTeacher

modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
kernels = pytest.mark.parametrize(
    ("family", "attention"),
    [(family, kernel) for family in FAMILIES for kernel in ("sdpa", "eager") if (family, kernel) != ("mpnet", "sdpa")],
)
"""MPNet has no fused attention."""
layers = pytest.mark.parametrize("layer", range(LAYERS + 1))


def ready(family: str, *, training: bool = False, attention: str | None = None) -> Encoder:
    """An encoder without dropout."""
    tapped = encoder(family).train(training)
    for module in tapped.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if attention is not None:
        tapped.model.set_attn_implementation(attention)
        assert tapped.config._attn_implementation == attention
    return tapped


def batch_of(tapped: Encoder) -> dict[str, Tensor]:
    """Sentences without padding, with padding at the end, and with padding before and after; padding has the family's id."""
    batch = inputs(padded=False)
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[1, 6:] = mask[2, :2] = mask[2, 7:] = 0
    padding = tapped.word_embeddings.padding_idx
    ids = batch["input_ids"].masked_fill(mask == 0, padding)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": batch["token_type_ids"] * mask}


def without(batch: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {other: tensor for other, tensor in batch.items() if other != name}


def assert_equal(ours: Outputs, theirs: Outputs, needs: Needs) -> None:
    """Every tensor that `needs` declares is equal to the bit, as is the attention that follows from them."""
    assert torch.equal(ours.mask, theirs.mask)
    for name in needs.tensors:
        assert torch.equal(ours.named()[name], theirs.named()[name]), name
    for layer in needs.attention:
        assert torch.equal(ours.attention(layer), theirs.attention(layer)), f"attention of layer {layer}"


# -- words -------------------------------------------------------------------------------------------------------------------


@kernels
@modes
@pytest.mark.parametrize("ids", [True, False], ids=["ids given", "ids absent"])
def test_looked_up_words_give_what_their_ids_give(family: str, training: bool, ids: bool, attention: str) -> None:
    tapped = ready(family, training=training, attention=attention)
    batch = batch_of(tapped)
    given = {**(batch if ids else without(batch, "input_ids")), "words": tapped.word_embeddings(batch["input_ids"])}
    for needs in (Needs(), ALL, ALL | Needs(pooled=True, gradient=True)):
        assert_equal(tapped(given, needs), tapped(batch, needs), needs)


@families
def test_positions_follow_the_ids_where_they_are_given(family: str) -> None:
    tapped = ready(family)
    batch = batch_of(tapped)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])  # padding ids that are attended to
    given = {**batch, "words": tapped.word_embeddings(batch["input_ids"])}
    assert_equal(tapped(given, ALL), tapped(batch, ALL), ALL)


@families
def test_words_meet_positions_segments_and_layer_norm(family: str) -> None:
    tapped = ready(family)
    batch, parts = batch_of(tapped), tapped.base.embeddings
    words = torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    states = tapped({**without(batch, "input_ids"), "words": words}, Needs(hidden=[0])).hidden(0)
    for example in range(3):
        count = 0
        for token in range(TOKENS):
            real = int(batch["attention_mask"][example, token])
            count += real
            position = token
            if tapped.family.positions_skip_padding:
                position = parts.padding_idx + count * real
            total = words[example, token] + parts.position_embeddings.weight[position]
            if family in ("bert", "roberta"):
                segment = int(batch["token_type_ids"][example, token]) if family == "bert" else 0
                total = total + parts.token_type_embeddings.weight[segment]
            torch.testing.assert_close(states[example, token], parts.LayerNorm(total), rtol=0, atol=1e-12)


@families
@pytest.mark.parametrize("ids", [True, False], ids=["ids given", "ids absent"])
def test_words_count_and_not_the_ids(family: str, ids: bool) -> None:
    tapped = ready(family)
    batch = batch_of(tapped)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, 7, batch["input_ids"])}
    given = {**(batch if ids else without(batch, "input_ids")), "words": tapped.word_embeddings(other["input_ids"])}
    ours, theirs = tapped(given, ALL), tapped(other, ALL)
    assert_equal(ours, theirs, ALL)
    assert not torch.equal(ours.logits, tapped(batch, Needs()).logits)


@families
@modes
def test_gradients_of_words_add_up_to_those_of_the_table(family: str, training: bool) -> None:
    tapped = ready(family, training=training)
    batch, table = batch_of(tapped), tapped.word_embeddings
    tapped(batch, Needs()).logits.square().sum().backward()
    words = table(batch["input_ids"]).detach().requires_grad_()
    given = {**without(batch, "input_ids"), "words": words}
    (gradient,) = torch.autograd.grad(tapped(given, Needs()).logits.square().sum(), words)
    expected = torch.zeros_like(table.weight)
    for example in range(3):
        for token in range(TOKENS):
            if batch["input_ids"][example, token] != table.padding_idx:
                expected[batch["input_ids"][example, token]] += gradient[example, token]
    assert expected.abs().sum() > 0
    torch.testing.assert_close(table.weight.grad, expected, rtol=0, atol=1e-12)


@families
def test_a_mixture_of_words_reaches_every_row_of_the_table(family: str) -> None:
    tapped = ready(family)
    batch, table = batch_of(tapped), tapped.word_embeddings.weight
    sharp = torch.nn.functional.one_hot(batch["input_ids"], len(table)).double()
    for rate, changed in ((0.0, False), (0.5, True)):
        mixture = (1 - rate) * sharp + rate / len(table)
        outputs = tapped({**batch, "words": mixture @ table}, Needs())
        assert torch.equal(outputs.logits, tapped(batch, Needs()).logits) is not changed
        (gradient,) = torch.autograd.grad(outputs.logits.sum(), table)
        assert bool((gradient.abs().sum(dim=1) > 0).all()) is changed


@families
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["looked up", "given"])
def test_declared_words_are_those_that_were_used(family: str, gradient: bool, given: bool) -> None:
    tapped = ready(family)
    batch, needs = batch_of(tapped), ALL | Needs(words=True, gradient=gradient)
    words = tapped.word_embeddings(batch["input_ids"]) * (2 if given else 1)
    outputs = tapped({**batch, "words": words} if given else batch, needs)
    assert torch.equal(outputs.words, words)
    if not given:
        assert_equal(outputs, tapped(batch, ALL | Needs(gradient=gradient)), ALL)
    tapped.word_embeddings.weight.grad = None
    (by_table,) = torch.autograd.grad(outputs.logits.sum(), tapped.word_embeddings.weight, retain_graph=True)
    (by_words,) = torch.autograd.grad(outputs.logits.sum(), outputs.words)
    expected = torch.zeros_like(by_table)
    expected.index_add_(0, batch["input_ids"].flatten(), by_words.flatten(0, 1) * (2 if given else 1))
    expected[tapped.word_embeddings.padding_idx] = 0
    torch.testing.assert_close(by_table, expected, rtol=0, atol=1e-12)


@families
@pytest.mark.parametrize("given", [False, True], ids=["looked up", "given"])
def test_a_frozen_teacher_is_differentiated_by_its_words(family: str, given: bool) -> None:
    tapped = ready(family)
    batch = batch_of(tapped)
    words = tapped.word_embeddings(batch["input_ids"]).detach()
    teacher = FrozenTeacher(tapped)
    outputs = teacher({**batch, "words": words} if given else batch, Needs(words=True, hidden=[0], gradient=True))
    (gradient,) = torch.autograd.grad(outputs.logits[:, 0].sum(), outputs.words, retain_graph=True)
    (states,) = torch.autograd.grad(outputs.logits[:, 0].sum(), outputs.hidden(0))
    assert states.abs().sum() > 0
    for place in [(0, 1, 5), (1, 5, 2), (2, 4, 0)]:
        step, values = 1e-5, []
        for sign in (1, -1):
            moved = words.clone()
            moved[place] += sign * step
            values.append(teacher({**batch, "words": moved}, Needs()).logits[:, 0].sum().item())
        # Central differences are good to about step squared.
        assert gradient[place].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)
    assert all(parameter.grad is None for parameter in tapped.parameters())
    assert not teacher(batch, Needs(words=True)).words.requires_grad


def test_words_are_not_read_undeclared() -> None:
    tapped = ready("bert")
    with pytest.raises(UndeclaredRead, match="words was read"):
        _ = tapped({**batch_of(tapped), "words": tapped.word_embeddings(batch_of(tapped)["input_ids"])}, ALL).words


def test_words_are_a_tensor_of_every_token_without_a_layer() -> None:
    needs = Needs(words=True, pooled=True)
    assert needs == Needs(taps=[Tap("words"), Tap("pooled")])
    assert needs.tensors == ["logits", "pooled", "words"]
    assert (needs.words, Needs().words, needs.tokens) == (True, False, True)
    assert str(needs) == "pooled, words"
    outputs = ready("bert")(batch_of(ready("bert")), needs)
    again = Outputs.from_named(outputs.named(), outputs.mask, needs, outputs.heads)
    assert again.words is outputs.words


@pytest.mark.parametrize("name", ["words", "embedded"])
@pytest.mark.parametrize("shape", [(1, TOKENS, WIDTH), (3, 1, WIDTH), (3, TOKENS, 1), (3, TOKENS)], ids=str)
def test_inputs_that_would_be_broadcast_are_refused(name: str, shape: tuple[int, ...]) -> None:
    tapped = ready("bert")
    with pytest.raises(ValueError, match=rf"'{name}' is .* not \(batch, tokens, width\), which is \(3, 9, 24\)"):
        tapped({**batch_of(tapped), name: torch.zeros(shape).double()}, Needs())


# -- the states of a layer ---------------------------------------------------------------------------------------------------


def above(layer: int) -> Needs:
    """Everything that a pass which starts at a layer has."""
    deeper = range(layer + 1, LAYERS + 1)
    return Needs(hidden=[layer, *deeper], cls=[layer, *deeper], attention=deeper, value=deeper, pooled=True)


@kernels
@layers
@modes
@pytest.mark.parametrize("gradient", [False, True])
def test_a_pass_from_a_layer_continues_the_pass_over_the_text(
    family: str, attention: str, layer: int, training: bool, gradient: bool
) -> None:
    tapped = ready(family, training=training, attention=attention)
    batch, needs = batch_of(tapped), above(layer) | Needs(gradient=gradient)
    theirs = tapped(batch, needs)
    states = theirs.hidden(layer).detach().requires_grad_()
    ours = tapped({"embedded": states, "from_layer": layer, "attention_mask": batch["attention_mask"]}, needs)
    assert_equal(ours, theirs, needs)
    assert torch.equal(ours.hidden(layer), states)
    with_ids = tapped({**batch, "embedded": states, "from_layer": layer}, needs)
    assert_equal(with_ids, theirs, needs)
    (one,) = torch.autograd.grad(ours.logits.square().sum(), states)
    (other,) = torch.autograd.grad(theirs.logits.square().sum(), theirs.hidden(layer))
    assert torch.equal(one, other)


@families
@layers
def test_only_the_blocks_above_the_layer_run(family: str, layer: int) -> None:
    tapped = ready(family)
    batch = batch_of(tapped)
    states = tapped(batch, Needs(hidden=[layer])).hidden(layer).detach()
    blocks, calls = list(tapped.base.get_submodule(tapped.family.blocks)), []
    for index, block in enumerate(blocks, start=1):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    given = {"embedded": states, "from_layer": layer, "attention_mask": batch["attention_mask"]}
    tapped(given, Needs()).logits.square().sum().backward()
    assert calls == list(range(layer + 1, LAYERS + 1))
    for index, block in enumerate(blocks, start=1):
        assert any(parameter.grad is not None for parameter in block.parameters()) is (index > layer)
    assert all(parameter.grad is None for parameter in tapped.base.embeddings.parameters())


@families
def test_layers_can_be_skipped(family: str) -> None:
    tapped = ready(family)
    batch = batch_of(tapped)
    blocks = tapped.base.get_submodule(tapped.family.blocks)
    states = tapped(batch, Needs(hidden=[1])).hidden(1)
    given = {"embedded": states, "from_layer": 2, "attention_mask": batch["attention_mask"]}
    ours = tapped(given, Needs(hidden=[2, 3], attention=[3]))
    assert torch.equal(ours.hidden(2), states)
    del blocks[1]
    tapped.config.num_hidden_layers = 2
    theirs = tapped(batch, Needs(hidden=[2], attention=[2]))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.hidden(3), theirs.hidden(2))
    assert torch.equal(ours.attention(3), theirs.attention(2))


@families
@layers
def test_a_pass_from_a_layer_of_shared_blocks(family: str, layer: int) -> None:
    tapped = ready(family)
    blocks = tapped.base.get_submodule(tapped.family.blocks)
    blocks[2] = blocks[0]
    batch, needs = batch_of(tapped), above(layer)
    theirs = tapped(batch, needs)
    given = {"embedded": theirs.hidden(layer), "from_layer": layer, "attention_mask": batch["attention_mask"]}
    assert_equal(tapped(given, needs), theirs, needs)


@families
def test_a_branch_of_its_own_upper_layers_continues_a_shared_one(family: str) -> None:
    trunk, branch = ready(family), ready(family)
    for block in branch.base.get_submodule(branch.family.blocks)[1:]:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    batch = batch_of(trunk)
    shared = trunk(batch, Needs(hidden=[1])).hidden(1)
    given = {"embedded": shared, "from_layer": 1, "attention_mask": batch["attention_mask"]}
    logits = branch(given, Needs()).logits
    assert torch.equal(logits, branch(batch, Needs()).logits)
    assert not torch.equal(logits, trunk(batch, Needs()).logits)
    logits.sum().backward()
    first, second, *_ = trunk.base.get_submodule(trunk.family.blocks)
    assert any(parameter.grad is not None for parameter in first.parameters())
    assert all(parameter.grad is None for parameter in second.parameters())


def test_the_last_of_text_words_and_states_counts() -> None:
    tapped = ready("roberta")
    batch = batch_of(tapped)
    words, states = (torch.randn(3, TOKENS, WIDTH).double() for _ in range(2))
    expected = tapped({"embedded": states, "attention_mask": batch["attention_mask"]}, Needs(hidden=[0, 3]))
    ours = tapped({**batch, "words": words, "embedded": states}, Needs(hidden=[0, 3]))
    assert_equal(ours, expected, Needs(hidden=[0, 3]))


@families
@pytest.mark.parametrize("fails", [False, True])
def test_a_pass_from_a_layer_leaves_the_model_as_it_was(family: str, fails: bool) -> None:
    tapped = ready(family)
    batch, blocks = batch_of(tapped), tapped.base.get_submodule(tapped.family.blocks)
    before, keys = hooks(tapped), list(tapped.state_dict())
    states = tapped(batch, Needs(hidden=[2])).hidden(2)
    states = states.float() if fails else states  # the weights are in float64
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        tapped({"embedded": states, "from_layer": 2, "attention_mask": batch["attention_mask"]}, above(2))
    assert tapped.base.get_submodule(tapped.family.blocks) is blocks
    assert list(tapped.state_dict()) == keys
    assert hooks(tapped) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"from_layer": 1}, "from_layer=1 was given without 'embedded'"),
        ({"embedded": 0, "from_layer": -1}, "from_layer=-1 is not a layer"),
        ({"embedded": 0, "from_layer": True}, "from_layer=True is not a layer"),
        ({"embedded": 0, "from_layer": torch.tensor(1)}, "is not a layer"),
        ({"embedded": 0, "from_layer": 4}, "the pass starts at layer 4 of a model with 3 layers"),
    ],
    ids=str,
)
def test_a_start_that_does_not_exist_is_refused(given: dict[str, object], message: str) -> None:
    tapped = ready("bert")
    batch = batch_of(tapped)
    if "embedded" in given:
        given = {**given, "embedded": torch.zeros(3, TOKENS, WIDTH).double()}
    with pytest.raises(ValueError, match=message):
        tapped({**batch, **given}, Needs())


@pytest.mark.parametrize(
    "needs",
    [
        Needs(hidden=[1]),
        Needs(cls=[0]),
        Needs(attention=[2]),
        Needs(value=[1]),
        Needs(words=True),
        Needs(derived={"a": abs}),
    ],
    ids=str,
)
def test_what_a_pass_from_a_layer_does_not_have_is_refused_if_declared_and_if_read(needs: Needs) -> None:
    tapped = ready("bert")
    batch, wanted = batch_of(tapped), needs | Needs(hidden=[2, 3], attention=[3], pooled=True, gradient=True)
    given: Inputs = {
        "embedded": torch.zeros(3, TOKENS, WIDTH).double(),
        "from_layer": 2,
        "attention_mask": batch["attention_mask"],
    }
    with pytest.raises(ValueError, match="a pass that starts at the states of layer 2 does not have all of the needs"):
        tapped(given, wanted)
    outputs = Forward(tapped, batch, wanted).run(given)
    assert outputs.needs == Needs(hidden=[2, 3], attention=[3], pooled=True, gradient=True)
    assert set(outputs.named()) == set(outputs.needs.tensors)
    (tap,) = needs.taps
    tensor = {"attention": "query"}.get(tap.kind, tap.kind)
    with pytest.raises(UndeclaredRead, match=r"was read, but .*; this pass started at the states of layer 2$"):
        outputs.read(tensor, tap.layer)
    assert wanted.available_from(None) is wanted


def test_a_detached_forward_runs_from_a_layer_too() -> None:
    tapped = ready("bert")
    forward = Forward(tapped, batch_of(tapped), Needs(hidden=[0, 2]))
    states = forward.outputs.hidden(2)
    given: Inputs = {"embedded": states, "from_layer": 2, "attention_mask": forward.inputs["attention_mask"]}
    again = Detached(forward).run(given)
    assert torch.equal(again.logits, forward.outputs.logits)
    assert not again.logits.requires_grad


def test_tensors_and_the_start_are_told_apart() -> None:
    batch: dict[str, Tensor | int] = {"embedded": torch.zeros(1), "from_layer": 3, "attention_mask": torch.ones(1)}
    assert set(tensors_of(batch)) == {"embedded", "attention_mask"}
    assert start_of(batch) == 3
    assert start_of(without(batch, "from_layer")) == 0
    assert start_of({"attention_mask": torch.ones(1)}) is None


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])  # transformers has no checkpoints in MPNet's blocks
@pytest.mark.parametrize("start", ["text", "words", "states"])
def test_recomputed_blocks_give_the_same_tensors_and_gradients(family: str, start: str) -> None:
    results = []
    for recompute in (False, True):
        tapped = ready(family, training=True)
        shared = tapped.base.get_submodule(f"{tapped.family.blocks}.1.{tapped.family.key}")
        tapped.replace_submodule(f"{tapped.family.base}.{tapped.family.blocks}.2.{tapped.family.query}", shared)
        batch, needs = batch_of(tapped), above(1) | Needs(words=start == "words")
        given: dict[str, Tensor | int] = {**batch}
        if start == "words":
            given["words"] = tapped.word_embeddings(batch["input_ids"])
        if start == "states":
            given |= {"embedded": tapped(batch, needs).hidden(1), "from_layer": 1}
        if recompute:
            tapped.model.activation_checkpointing_enable({"use_reentrant": False})
        calls = []
        shared.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        outputs = tapped(given, needs)
        loss = outputs.logits.square().sum() + sum(tensor.square().mean() for tensor in outputs.named().values())
        loss.backward()
        assert len(calls) == (4 if recompute else 2)
        results.append([*outputs.named().values(), *(parameter.grad for parameter in tapped.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_blocks_above_the_embeddings_are_all_blocks() -> None:
    tapped = ready("bert")
    blocks = tapped.base.get_submodule(tapped.family.blocks)
    with blocks_above(tapped.base, tapped.family, 0):
        assert tapped.base.get_submodule(tapped.family.blocks) is blocks
