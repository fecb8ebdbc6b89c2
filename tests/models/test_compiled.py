"""Compiled blocks: the same numbers, the same taps, nothing left behind."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from overwriting import Overwriting, overwriting

from conftest import tiny_model
from kd.errors import InputError
from kd.forward import Needs
from kd.models import Encoder
from kd.models import compiled as compilation
from kd.models.compiled import GraphShapes, check_compiler, uncompiled
from kd.training import execute
from whole_runs import planned

Small = Callable[..., list[str]]
__all__ = ["overwriting"]


def inputs(batch: int, tokens: int, seed: int = 0, padded: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    if padded:
        mask[0, tokens // 2 :] = 0
    return {"input_ids": torch.randint(5, 40, (batch, tokens), generator=generator) * mask, "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_compiled_blocks_show_the_states_of_this_step_and_give_the_same_gradients(family: str) -> None:
    plain = Encoder(tiny_model(model_type=family))
    compiled = copy.deepcopy(plain)
    compiled.compiled = True
    for step, (batch, tokens, padded) in enumerate([(4, 9, True), (3, 12, True), (5, 7, False), (4, 9, True)]):
        given = inputs(batch, tokens, step, padded)
        needs = Needs(hidden=[0, 1 + step % 3, 4], cls=[2])
        found = []
        for encoder in (plain, compiled):
            encoder.zero_grad()
            outputs = encoder(given, needs)
            loss = outputs.logits.square().sum() + sum(outputs.hidden(layer).square().mean() for layer in needs.hidden)
            loss.backward()
            tensors = [outputs.logits, *(outputs.hidden(layer) for layer in sorted(needs.hidden)), outputs.cls(2)]
            gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
            found.append([*tensors, *gradients])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # other kernels, summed in another order
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    assert not any("forward" in module.__dict__ for module in compiled.modules())


def test_what_needs_gradients_or_taps_inside_a_block_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compiled_forward(kind: type, mode: str | None) -> Callable[..., object]:
        seen.append(kind)
        return kind.forward

    monkeypatch.setattr(compilation, "compiled_forward", compiled_forward)
    encoder = Encoder(tiny_model())
    encoder.compiled = True
    given = inputs(2, 6)
    for needs in (Needs(gradient=True), Needs(attention=[1]), Needs(value=[2])):
        encoder(given, needs)
        assert not seen
    encoder(given, Needs(hidden=[1]))
    assert len(seen) == 4
    encoder.compiled = False
    encoder(given, Needs(hidden=[1]))
    assert len(seen) == 4


def test_a_pass_has_graphs_if_its_shape_is_one_of_them_and_runs_plain_if_not(overwriting: Overwriting) -> None:
    encoder = Encoder(tiny_model())
    encoder.graphs = GraphShapes(frozenset({4, 3}), frozenset({8, 16}))
    expected = {}
    for shape in ((4, 8), (3, 16), (4, 9), (2, 8)):
        given = inputs(*shape)
        overwriting.events.clear()
        outputs = encoder(given, Needs(hidden=[2]))
        expected[shape] = len(overwriting.events)
        with uncompiled(encoder):
            assert torch.equal(encoder(given, Needs(hidden=[2])).hidden(2), outputs.hidden(2))
        assert len(overwriting.events) == expected[shape], "and none where compilation is off"
    assert expected == {(4, 8): 4, (3, 16): 4, (4, 9): 0, (2, 8): 0}
    assert overwriting.asked == [{"dynamic": True, "mode": "reduce-overhead"}], "compiled once, for all blocks and shapes"
    overwriting.events.clear()
    for needs in (Needs(gradient=True), Needs(attention=[1]), Needs(value=[2])):
        encoder(inputs(4, 8), needs)
    assert overwriting.events == []
    encoder.graphs, encoder.compiled = None, True
    encoder(inputs(2, 9), Needs())
    assert overwriting.asked[1:] == [{"dynamic": True, "mode": None}], "without graphs any shape is compiled"


def test_a_mode_is_tried_before_training_until_its_graph_has_been_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, mode: asked.append(mode) or (lambda values: asked.append("call")))
    check_compiler("cpu", "reduce-overhead")
    assert asked == ["reduce-overhead", "call", "call", "call"]


def test_an_error_leaves_no_block_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tiny_model())
    encoder.compiled = True

    def broken(*given: object, **more: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(compilation, "compiled_forward", lambda kind, mode: broken)
    with pytest.raises(ValueError, match="broken"):
        encoder(inputs(2, 6), Needs())
    assert not any("forward" in module.__dict__ for module in encoder.modules())


def test_without_a_compiler_the_key_is_named() -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(InputError, match=r"trainer\.compile=false") as caught,
    ):
        check_compiler("cpu")
    assert caught.value.key == "trainer.compile"


def test_a_pass_from_a_layer_compiles_the_blocks_that_run_and_leaves_none_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compiled_forward(kind: type, mode: str | None) -> Callable[..., object]:
        return lambda block, *given, **more: (calls.append(block), kind.forward(block, *given, **more))[1]

    monkeypatch.setattr(compilation, "compiled_forward", compiled_forward)
    encoder = Encoder(tiny_model())
    given = inputs(2, 6)
    expected = encoder(given, Needs(hidden=[3]))
    encoder.compiled = True
    blocks = list(encoder.base.encoder.layer)
    for start in ({"embedded": expected.hidden(3), "from_layer": 3}, {"words": encoder.word_embeddings(given["input_ids"])}):
        calls.clear()
        outputs = encoder({**given, **start}, Needs(hidden=[3]))
        assert torch.equal(outputs.logits, expected.logits)
        assert torch.equal(outputs.hidden(3), expected.hidden(3))
        assert calls == (blocks[3:] if "from_layer" in start else blocks)
        assert not any("forward" in module.__dict__ for module in encoder.modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_compiled_passes_from_words_and_layers_give_what_plain_ones_give(family: str) -> None:
    plain = Encoder(tiny_model(model_type=family))
    compiled = copy.deepcopy(plain)
    compiled.compiled = True
    given = inputs(3, 8)
    states = plain(given, Needs(hidden=[2])).hidden(2).detach()
    words = plain.word_embeddings(given["input_ids"]).detach()
    for start in ({}, {"words": words}, {"embedded": states, "from_layer": 2}):
        found = []
        for encoder in (plain, compiled):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.items() if name != "from_layer"}
            outputs = encoder({**given, **start, **leaves}, Needs(hidden=[3], cls=[2]))
            loss = outputs.logits.square().sum() + outputs.hidden(3).square().mean()
            gradients = torch.autograd.grad(loss, [*leaves.values(), plain_parameter(encoder)])
            found.append([outputs.logits, outputs.hidden(3), outputs.cls(2), *gradients])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # other kernels, summed in another order


def plain_parameter(encoder: Encoder) -> torch.nn.Parameter:
    """A weight of the last block."""
    block = encoder.base.get_submodule(encoder.family.blocks)[-1]
    return block.get_submodule(encoder.family.value).weight


@pytest.mark.slow
def test_a_compiled_run_gives_what_the_plain_one_gives_up_to_rounding(small: Small, tmp_path: Path) -> None:
    words = ("method=pkd", "teacher=[hub]", "student.dropout=0", "trainer.max_epochs=1", f"paths.runs={tmp_path}")
    first = execute.execute(planned(small("method=finetune", "teacher=[]", f"paths.runs={tmp_path}")))
    teacher = f"teacher.hub.model={next(tmp_path.glob('finetune-*')) / 'student'}"
    losses = []
    for compile_ in ("false", "true"):
        run = planned(small(*words, teacher, f"trainer.compile={compile_}"))
        result = execute.execute(run)
        assert result["export_difference"] < 1e-5
        losses.append(result["metrics"]["validation"])
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
    assert first["metrics"]
