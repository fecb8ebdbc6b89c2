"""Declared needs, the outputs that may be read, and when a forward runs."""

import dataclasses

import pytest
import torch

from kd.forward import Forward, Needs, Outputs, Tap, UndeclaredRead
from kd.forward.kinds import KINDS, by_token, split_name, tensor_name

READS = {
    "hidden": lambda outputs, layer: outputs.hidden(layer),
    "query": lambda outputs, layer: outputs.query(layer),
    "key": lambda outputs, layer: outputs.key(layer),
    "scores": lambda outputs, layer: outputs.scores(layer),
    "cls": lambda outputs, layer: outputs.cls(layer),
    "attention": lambda outputs, layer: outputs.attention(layer),
    "value": lambda outputs, layer: outputs.value(layer),
    "relation": lambda outputs, layer: outputs.relation("value", layer, 1),
    "query relation": lambda outputs, layer: outputs.relation("query", layer, 1),
}
DECLARED = {"hidden": "hidden", "cls": "cls", "value": "value", "relation": "value"}  # the others are declared as attention


class Model:
    """Counts its passes; shows whatever is asked for, and more."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, Needs]] = []

    def __call__(self, inputs: object, needs: Needs) -> Outputs:
        self.calls.append((inputs, needs))
        states = {layer: torch.full((1, 2, 4), float(layer)) for layer in range(5)}
        tensors = dict.fromkeys(("hidden", "cls", "query", "key", "value"), states)
        return Outputs(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), needs, heads=2, tensors=tensors)


def test_union_keeps_everything_either_declares() -> None:
    union = Needs(hidden=[1], attention=[2]) | Needs(hidden=[3, 1], value=[2], gradient=True)
    assert union == Needs(hidden=[3, 1], attention=[2], value=[2], gradient=True)
    assert union | Needs() == union


def test_order_and_repetition_do_not_matter() -> None:
    assert Needs(hidden=[2, 1, 2]) == Needs(hidden=(1, 2))
    assert hash(Needs(hidden=[2, 1])) == hash(Needs(hidden=[1, 2]))


def test_needs_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Needs().gradient = True


@pytest.mark.parametrize(
    ("needs", "deepest"),
    [(Needs(), 0), (Needs(hidden=[0]), 0), (Needs(hidden=[3, 1]), 3), (Needs(hidden=[1], attention=[2], value=[4]), 4)],
    ids=str,
)
def test_deepest_layer_is_over_all_kinds(needs: Needs, deepest: int) -> None:
    assert needs.deepest() == deepest


def test_needs_say_what_they_declare() -> None:
    assert str(Needs()) == "logits only"
    assert str(Needs(hidden=[2, 0], value=[1], gradient=True)) == "hidden=[0, 2], value=[1], gradient"


@pytest.mark.parametrize("layers", [{"attention": [0]}, {"value": [0]}, {"hidden": [-1]}], ids=str)
def test_a_layer_that_no_model_has_cannot_be_declared(layers: dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match="layer"):
        Needs(**layers)


def double(model: object, inputs: object) -> torch.Tensor:
    """A function that derives a tensor; it is not called."""
    raise NotImplementedError


EVERYTHING = Needs(hidden=[10, 2], cls=[1], attention=[3, 1], value=[2], pooled=True, derived={"b-1": double, "a": double})


def test_needs_are_a_set_of_taps() -> None:
    assert EVERYTHING.taps == {
        *(Tap("hidden", layer) for layer in (2, 10)),
        Tap("cls", 1),
        *(Tap("attention", layer) for layer in (1, 3)),
        Tap("value", 2),
        Tap("pooled"),
        *(Tap("derived", name) for name in ("a", "b-1")),
    }
    assert Needs(taps=EVERYTHING.taps) == EVERYTHING
    assert EVERYTHING.derived == {"a": double, "b-1": double}
    assert (EVERYTHING | Needs()).derived == EVERYTHING.derived


def test_tensors_have_the_order_of_the_table_and_then_of_the_layers() -> None:
    assert EVERYTHING.tensors == (
        "logits pooled hidden-2 hidden-10 cls-1 query-1 query-3 key-1 key-3 value-2 derived-a derived-b-1".split()
    )
    assert str(EVERYTHING) == "hidden=[2, 10], cls=[1], attention=[1, 3], value=[2], derived=['a', 'b-1'], pooled"


def test_names_of_tensors_are_split_into_what_they_were_joined_from() -> None:
    for tap in EVERYTHING.taps:
        for tensor in KINDS[tap.kind].tensors:
            assert split_name(tensor_name(tensor, tap.layer)) == (tensor, tap.layer)
    assert split_name("derived-7") == ("derived", "7"), "a derived tensor has a name, not a layer"


def test_which_tensors_have_a_row_for_every_token() -> None:
    rows = {name: by_token(name) for name in EVERYTHING.tensors}
    assert {name for name, by in rows.items() if not by} == {"logits", "pooled", "cls-1"}
    assert [Needs(**{kind: [1]}).tokens for kind in ("hidden", "cls", "attention", "value")] == [True, False, True, True]


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="'hiden' is not a kind of tensor; the kinds are pooled, hidden"):
        Tap("hiden", 1)


def test_reasons_to_run_at_every_step_are_joined() -> None:
    assert Needs().uncacheable_reason is None
    assert (Needs() | Needs()).uncacheable_reason is None
    assert Needs(dropout=True).uncacheable_reason == "its dropout is on"
    assert (Needs(dropout=True) | Needs(uncacheable_reason="a")).uncacheable_reason == "its dropout is on; a"


@pytest.mark.parametrize("read", READS)
def test_a_declared_layer_is_read_and_any_other_read_raises(read: str) -> None:
    declared = DECLARED.get(read, "attention")
    needs = Needs(**{declared: [2]})
    outputs = Model()(None, needs)
    assert READS[read](outputs, 2).isfinite().all()
    with pytest.raises(UndeclaredRead, match=rf"layer 3 was read, but needs\(\) declares only: {declared}=\[2\]"):
        READS[read](outputs, 3)
    others = Needs(**{kind: [2] for kind in ("hidden", "attention", "value") if kind != declared})
    with pytest.raises(UndeclaredRead):
        READS[read](Model()(None, others), 2)


def test_other_logits_leave_the_rest_as_it_was() -> None:
    outputs = Model()(None, Needs(hidden=[1]))
    changed = outputs.with_logits(torch.ones(1, 2))
    assert changed.logits.sum() == 2
    assert outputs.logits.sum() == 0
    assert changed.hidden(1) is outputs.hidden(1)
    with pytest.raises(UndeclaredRead):
        changed.hidden(2)


def test_forward_runs_on_first_look_and_only_once() -> None:
    model, inputs, needs = Model(), {"input_ids": torch.zeros(1, 2)}, Needs(hidden=[1])
    forward = Forward(model, inputs, needs)
    assert not forward.ran
    assert model.calls == []
    first = forward.outputs
    assert forward.ran
    assert forward.outputs is first
    assert len(model.calls) == 1
    assert model.calls[0][0] is inputs
    assert model.calls[0][1] is needs


def test_a_further_pass_is_not_cached() -> None:
    model, needs = Model(), Needs(hidden=[1])
    forward = Forward(model, {"input_ids": torch.zeros(1, 2)}, needs)
    other, deeper = {"input_ids": torch.ones(1, 2)}, Needs(hidden=[3])
    forward.run(other, deeper)
    forward.run()
    assert not forward.ran
    assert model.calls[0] == (other, deeper)
    assert model.calls[1] == (forward.inputs, needs)
    assert forward.outputs is forward.outputs
    assert len(model.calls) == 3
