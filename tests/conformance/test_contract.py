"""The contract of a plug-in (design, section 6), applied to every file in `conf/method`."""

import copy
import pickle
import socket

import pytest
import torch
import torch.multiprocessing as mp

from conformance.bench import (
    METHODS,
    Bench,
    Recorded,
    batch_of,
    case_name,
    more_padding,
    save_two_rank_updates,
    take,
    two_rank_cases,
)
from kd.config import compose
from kd.errors import InputError
from kd.forward.needs import KINDS, Needs

pytestmark = pytest.mark.parametrize("name", METHODS)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for term in one:
        assert float((one[term] - other[term]).abs()) <= tolerance, f"{term}: {one[term]} and {other[term]}"


def test_configuration_carries_the_name_of_its_file_and_refuses_unknown_keys(name: str) -> None:
    assert compose([f"method={name}"]).method.name == name
    with pytest.raises(InputError) as error:
        compose([f"method={name}", "method.no_such_key=1"])
    assert error.value.key == "method.no_such_key"


def test_method_survives_pickling(name: str) -> None:
    bench = Bench(name)
    copied = pickle.loads(pickle.dumps(bench.method))
    assert copied.needs() == bench.method.needs()
    assert copied.names == bench.method.names


def test_terms_are_finite_scalars_named_like_the_weights(name: str) -> None:
    terms = Bench(name).engine.loss(batch_of()).terms
    weights = compose([f"method={name}"]).method.weights
    assert list(terms) == list(weights)
    for term in terms.values():
        assert term.shape == ()
        assert torch.isfinite(term)


def test_every_trainable_parameter_gets_a_gradient_and_the_teacher_none(name: str) -> None:
    bench = Bench(name, dropout=0.1)
    before = copy.deepcopy(bench.teacher.encoder.state_dict())
    bench.update(batch_of())
    for parameter_name, parameter in bench.engine.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
        else:
            assert parameter.grad is None, parameter_name
    for parameter in bench.teacher.encoder.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    for key, tensor in bench.teacher.encoder.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_every_declared_need_is_used_and_nothing_else_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, reads = Bench(name), Recorded(monkeypatch)
    step = bench.engine.loss(batch_of()).step
    ours, theirs = bench.method.needs()
    for forward, needs in zip((step.student, *step.teachers), (ours, *(theirs or [Needs()])), strict=True):
        if not forward.ran:
            assert not needs.tokens | bool(needs.cls)
            continue
        used = reads.of(forward.outputs)
        assert used == {kind: set(getattr(needs, kind)) for kind in KINDS}
        kept = {kind: set(layers) for kind, layers in forward.outputs.tensors.items()}
        assert kept == {
            "hidden": used["hidden"],
            "cls": used["cls"],
            "query": used["attention"],
            "key": used["attention"],
            "value": used["value"],
        }


def test_padding_changes_no_term(name: str) -> None:
    bench, batch = Bench(name), batch_of()
    close(bench.terms(batch), bench.terms(more_padding(batch)), 1e-5)


def test_a_student_that_equals_its_teacher_is_at_every_minimum(name: str) -> None:
    bench = Bench(name, same=True)
    bench.engine.eval()
    terms = {term: value for term, value in bench.engine.loss(batch_of()).terms.items() if term != "task"}
    for term, value in terms.items():
        at_identity = float(value.detach())
        parameters = [p for p in bench.student.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        largest = max(float(g.abs().max()) for g in gradients if g is not None)
        assert largest < 1e-5, f"{term} is not stationary at the teacher: gradient {largest}"
        moved = Bench(name, same=True)
        with torch.no_grad():
            for parameter in moved.student.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        assert float(moved.terms(batch_of())[term]) > at_identity + 1e-6, f"{term} does not rise away from the teacher"


def test_order_of_the_batch_changes_no_term(name: str) -> None:
    bench, batch = Bench(name), batch_of()
    shuffled = take(batch, torch.randperm(len(batch), generator=torch.Generator().manual_seed(1)))
    close(bench.terms(batch), bench.terms(shuffled), 1e-6)


def test_checkpoint_holds_no_teacher_and_restores_the_next_loss(name: str) -> None:
    bench = Bench(name)
    bench.update(batch_of())
    state = copy.deepcopy(bench.engine.state_dict())
    size = sum(tensor.numel() for tensor in state.values())
    own = sum(t.numel() for module in (bench.student, bench.method) for t in module.state_dict().values())
    assert size == own
    assert not any("teacher" in key for key in state)
    other = Bench(name, seed=5)
    other.teacher.encoder.load_state_dict(bench.teacher.encoder.state_dict())
    other.engine.load_state_dict(state, strict=True)
    close(bench.terms(batch_of(seed=4)), other.terms(batch_of(seed=4)), 0.0)


def test_teachers_stay_in_eval_mode_and_dropout_does_not_reach_them(name: str) -> None:
    bench = Bench(name, dropout=0.5)
    for module in bench.teacher.encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    bench.engine.train()
    step = bench.engine.loss(batch_of()).step
    assert bench.student.training
    assert not any(module.training for module in bench.teacher.encoder.modules())
    again = bench.engine.loss(batch_of()).step
    for one, other in zip(step.teachers, again.teachers, strict=True):
        assert torch.equal(one.outputs.logits, other.outputs.logits)
    assert not torch.equal(step.student.outputs.logits, again.student.outputs.logits)


def test_step_in_bf16_autocast_is_finite(name: str) -> None:
    bench = Bench(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = bench.engine.loss(batch_of())
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert all(torch.isfinite(p.grad).all() for p in bench.engine.parameters() if p.grad is not None)


def test_one_seed_gives_one_result(name: str) -> None:
    def trained() -> dict[str, torch.Tensor]:
        bench = Bench(name, dropout=0.1)
        torch.manual_seed(11)
        bench.update(batch_of())
        return bench.engine.state_dict()

    one, other = trained(), trained()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What one step of every method makes of the parameters, on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(save_two_rank_updates, args=(2, port, folder), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.ddp
def test_two_ranks_with_their_shares_equal_one_with_the_whole(name: str, two_ranks: list) -> None:
    for method, more, count in two_rank_cases():
        if method != name:
            continue
        case, bench = case_name(method, more, count), Bench(name, more=more)
        before = copy.deepcopy(bench.engine.state_dict())
        bench.update(batch_of(count))
        moved = 0.0
        for key, tensor in bench.engine.state_dict().items():
            one, other = (rank[case][key] for rank in two_ranks)
            assert torch.equal(one, other), f"{case}, {key}: the ranks drifted apart"
            # float32 sums in another order: a few units in the last place of the largest update
            step = float((tensor - before[key]).abs().max())
            assert float((one - tensor).abs().max()) <= 1e-6 * max(1.0, step), f"{case}, {key}"
            moved = max(moved, step)
        assert moved > 1e-4
