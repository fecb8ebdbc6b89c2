"""Masks that are made without reading their values: the outputs are those of transformers' own."""

from collections.abc import Callable

import pytest
import torch
from encoders import ALL, TOKENS, encoder, families, inputs
from torch import Tensor

from kd.forward import Needs, Outputs
from kd.models import Encoder
from kd.models.masks import expanded_mask
from kd.system import hardware

paddings = pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])


def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Outputs]) -> Outputs:
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "is_asynchronous", lambda tensor: True)
        return run()


def with_gradients(tapped: Encoder, outputs: Outputs) -> dict[str, Tensor]:
    loss = outputs.logits.square().sum() + sum(outputs.hidden(layer).square().sum() for layer in outputs.needs.layers("hidden"))
    weights = dict(tapped.named_parameters())
    gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {**outputs.named(), **{name: g for name, g in zip(weights, gradients, strict=True) if g is not None}}


@families
@paddings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", ["ids", "words", "embedded"])
def test_outputs_and_gradients_are_equal_to_the_bit(
    family: str, padded: bool, dtype: torch.dtype, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tapped, batch = encoder(family).to(dtype), inputs(padded)
    with torch.no_grad():
        given = {
            "ids": {},
            "words": {"words": tapped.word_embeddings(batch["input_ids"])},
            "embedded": {"embedded": tapped(batch, Needs(hidden=[1])).hidden(1), "from_layer": 1},
        }[start]
    needs = ALL.available_from(1 if start == "embedded" else None)
    theirs = with_gradients(tapped, tapped({**batch, **given}, needs))
    ours = with_gradients(tapped, as_on_an_accelerator(monkeypatch, lambda: tapped({**batch, **given}, needs)))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@families
@paddings
def test_the_mask_is_that_of_the_models_attention(family: str, padded: bool) -> None:
    tapped, real = encoder(family), inputs(padded)["attention_mask"].bool()
    mask = expanded_mask(tapped.model, real.long())
    assert mask.shape == (len(real), 1, TOKENS, TOKENS)
    shown = mask if mask.dtype == torch.bool else mask == 0
    assert mask.dtype == (torch.bool if tapped.config._attn_implementation == "sdpa" else torch.float64)
    assert torch.equal(shown, real[:, None, None, :].expand(-1, -1, TOKENS, -1))


@families
def test_a_pass_with_it_reads_no_value_and_one_without_does(family: str) -> None:
    tapped, batch = encoder(family).to("meta"), {name: tensor.to("meta") for name, tensor in inputs().items()}
    for needs in (ALL, Needs(hidden=[0, 1], gradient=True), Needs(pooled=True, words=True)):
        assert tapped(batch, needs).logits.is_meta
    own = {name: batch[name] for name in tapped.family.inputs}
    with pytest.raises(RuntimeError, match="item"):
        tapped.model(**own)
