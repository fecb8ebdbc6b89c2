"""Transport: the card's numbers, another solver, and masses that stay finite."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from kd.functional.transport import MASS_UPDATES, SMALLEST_SHARE, cost_attention, shared_cost_attention, transport_plan


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def uniform(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Costs of any scale, and masses far from even."""
    numbers = np.random.default_rng(seed)
    rows, columns = numbers.integers(1, 9, size=2)
    scale = 10.0 ** numbers.integers(-6, 7)
    masses = [tensor(numbers.dirichlet(np.full(count, 0.5))) for count in (rows, columns)]
    return tensor(scale * numbers.random((rows, columns))), *masses


@pytest.mark.parametrize("seed", range(25))
def test_plan_is_as_cheap_as_another_solvers_and_moves_all_mass(seed: int) -> None:
    cost, source, target = drawn(seed)
    flow, (rows, columns) = transport_plan(cost, source, target), cost.shape
    sums = [np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))]
    scale = float(cost.max())
    other = linprog(
        (cost / scale).flatten().numpy(), A_eq=np.vstack(sums), b_eq=np.concatenate([source, target]), bounds=(0, None)
    )
    assert float((flow * cost).sum()) / scale == pytest.approx(other.fun, abs=1e-8)
    torch.testing.assert_close(flow.sum(1), source, rtol=0, atol=1e-8)
    torch.testing.assert_close(flow.sum(0), target, rtol=0, atol=1e-8)
    assert (flow >= 0).all()
    assert int((flow > 0).sum()) <= rows + columns - 1
    assert (flow * cost).sum() <= (torch.outer(source, target) * cost).sum() + 1e-12


@pytest.mark.parametrize(
    ("cost", "flow", "distance"),
    [
        ([[1, 3]], [[0.5, 0.5]], 2.0),
        ([[1, 2], [3, 1]], [[0.5, 0], [0, 0.5]], 1.0),
        ([[0, 1, 2, 3], [3, 2, 1, 0]], [[0.25, 0.25, 0, 0], [0, 0, 0.25, 0.25]], 0.5),
    ],
    ids=["one to two", "diagonal", "two to four"],
)
def test_plans_and_distances_are_those_of_the_card(cost: list, flow: list, distance: float) -> None:
    costs = tensor(cost).double()
    found = transport_plan(costs, uniform(costs.shape[0]), uniform(costs.shape[1]))
    torch.testing.assert_close(found, tensor(flow).double(), rtol=0, atol=1e-9)
    assert (found * costs).sum().item() == pytest.approx(distance, abs=1e-9)


@pytest.mark.parametrize(
    ("update", "tau", "masses"),
    [
        ("sum", 1.0, [0.75, 0.25]),
        ("softmax", 1.0, [0.93503, 0.06497]),
        ("softmax", 5.0, [0.63026, 0.36974]),
        ("softmax2", 1.0, [0.70476, 0.29524]),
    ],
)
def test_masses_are_those_of_the_card(update: str, tau: float, masses: list[float]) -> None:
    cost, one = tensor([[1.0, 3.0]]), uniform(1)
    flow = transport_plan(cost, one, uniform(2))
    found = cost_attention(flow.T, cost.T, uniform(2), update, tau)
    torch.testing.assert_close(found, tensor(masses), rtol=0, atol=5e-6)  # the card has five decimals
    torch.testing.assert_close(cost_attention(flow, cost, one, update, tau), one)
    if update == "sum":
        assert (transport_plan(cost, one, found) * cost).sum().item() == pytest.approx(1.5, abs=1e-9)


def cheapest(cost: Tensor, counts: tuple[Sequence[int], Sequence[int]]) -> Fraction:
    """The least price of moving sixths, some to a row and some to a column, by trying all ways; exact."""
    rows, columns = ([index for index, count in enumerate(side) for _ in range(count)] for side in counts)
    costs = [[Fraction(value) for value in row] for row in cost.tolist()]
    ways = itertools.permutations(columns)
    return min(sum(costs[i][j] for i, j in zip(rows, way, strict=True)) for way in ways) / len(rows)


@pytest.mark.parametrize("counts", [((1,) * 6, (1,) * 6), ((3, 3), (1, 2, 1, 2)), ((4, 1, 1), (1, 5))], ids=str)
@pytest.mark.parametrize(
    "exponents", [(power, power) for power in (-300, -20, -13, 0, 13, 200)] + [(-13, 0), (-13, 13)], ids=str
)
def test_no_other_plan_is_cheaper_whatever_the_size_of_the_costs(
    counts: tuple[Sequence[int], Sequence[int]], exponents: tuple[int, int]
) -> None:
    numbers = np.random.default_rng(0)
    source, target = (torch.tensor(side).double() / 6 for side in counts)
    for _ in range(4):
        powers = numbers.uniform(*exponents, (len(source), len(target)))
        cost = torch.from_numpy(numbers.uniform(1, 2, powers.shape) * 10.0**powers)
        cost[numbers.random(powers.shape) < 0.1] = 0
        flow, least = transport_plan(cost, source, target), cheapest(cost, counts)
        price = sum(Fraction(f) * Fraction(c) for f, c in zip(flow.flatten().tolist(), cost.flatten().tolist(), strict=True))
        # the masses are rounded: of a plan as cheap as the cheapest every part is off by a few units in the last place
        assert least * (1 - Fraction(1e-12)) <= price <= least * (1 + Fraction(1e-12))
        torch.testing.assert_close(flow.sum(1), source)
        torch.testing.assert_close(flow.sum(0), target)


def test_masses_of_a_hundred_millionth_are_moved_whole() -> None:
    source, target = tensor([1e-8, 1 - 1e-8]), tensor([0.5, 1e-13, 0.5 - 1e-13])
    flow = transport_plan(tensor([[1e-13, 1e13, 1.0], [1.0, 1e-13, 1e13]]), source, target)
    torch.testing.assert_close(flow.sum(1), source, rtol=1e-7, atol=0)  # 1 has 16 digits, of which 8 are left for 1e-8
    torch.testing.assert_close(flow.sum(0), target, rtol=1e-3, atol=0)  # and 3 for 1e-13


def test_costs_in_half_precision_are_planned_in_single() -> None:
    for kind in (torch.float16, torch.bfloat16):
        flow = transport_plan(torch.tensor([[1.0, 3.0]], dtype=kind), torch.ones(1), torch.tensor([0.3, 0.7]))
        assert flow.dtype == torch.float32
        torch.testing.assert_close(flow, torch.tensor([[0.3, 0.7]]))


@pytest.mark.parametrize("update", MASS_UPDATES)
def test_equal_costs_leave_equal_masses(update: str) -> None:
    cost = tensor([[1.0, 2.0], [3.0, 1.0]])
    flow = transport_plan(cost, uniform(2), uniform(2))
    torch.testing.assert_close(cost_attention(flow, cost, uniform(2), update), uniform(2))
    torch.testing.assert_close(cost_attention(flow.T, cost.T, uniform(2), update), uniform(2))


def test_layers_that_match_perfectly_lose_their_mass_by_sums_and_come_back() -> None:
    cost = tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    flow = transport_plan(cost, uniform(2), uniform(4))
    masses = cost_attention(flow.T, cost.T, uniform(4), "sum")
    torch.testing.assert_close(masses, tensor([0.0, 0.5, 0.5, 0.0]), rtol=0, atol=1e-6)
    cost = cost + 1
    again = cost_attention(transport_plan(cost, uniform(2), masses).T, cost.T, masses, "sum")
    assert again[0] == pytest.approx(float(again[3]))
    assert again[0] > again[1] > 0.1


def naive(flow: Tensor, cost: Tensor, mass: Tensor, update: str, tau: float) -> list[float]:
    rows, columns = range(cost.shape[0]), range(cost.shape[1])
    unit = [sum(float(flow[i, j] * cost[i, j]) for j in columns) / float(mass[i]) for i in rows]
    inverse = [sum(unit) / u for u in unit]
    if update == "sum":
        return [v / sum(inverse) for v in inverse]
    for scale in (tau, 1.0)[: 2 if update == "softmax2" else 1]:
        powers = [np.exp(v / scale) for v in inverse]
        inverse = [power / sum(powers) for power in powers]
    return inverse


def test_two_transports_share_the_second_softmax_of_the_mean_of_their_first() -> None:
    flow, half = torch.eye(2).double() / 2, uniform(2)
    costs = (tensor([[1.0, 0.0], [0.0, 3.0]]), tensor([[1.0, 0.0], [0.0, 1.0]]))
    # unit costs 1 and 3, and 1 and 1: first softmaxes of (4, 4/3) and of (2, 2)
    mean = (0.9350305 + 0.5) / 2
    expected = 1 / (1 + np.exp(1 - 2 * mean))
    found = shared_cost_attention([(flow, cost, half) for cost in costs], "softmax2")
    torch.testing.assert_close(found, tensor([expected, 1 - expected]), rtol=0, atol=1e-7)
    apart = torch.stack([cost_attention(flow, cost, half, "softmax2") for cost in costs]).mean(dim=0)
    assert abs(float(apart[0]) - expected) > 4e-3
    for update in ("softmax", "sum"):
        apart = torch.stack([cost_attention(flow, cost, half, update) for cost in costs]).mean(dim=0)
        torch.testing.assert_close(shared_cost_attention([(flow, cost, half) for cost in costs], update), apart)


@pytest.mark.parametrize("update", MASS_UPDATES)
@pytest.mark.parametrize("tau", [1.0, 5.0])
def test_masses_equal_the_equations_written_as_loops(update: str, tau: float) -> None:
    numbers = torch.Generator().manual_seed(0)
    cost = 1 + torch.rand(3, 5, generator=numbers, dtype=torch.float64)
    source, target = (torch.rand(n, generator=numbers, dtype=torch.float64).add(0.1) for n in (3, 5))
    source, target = source / source.sum(), target / target.sum()
    flow = transport_plan(cost, source, target)
    for arguments in ((flow, cost, source), (flow.T, cost.T, target)):
        expected = naive(*arguments, update, tau)
        torch.testing.assert_close(cost_attention(*arguments, update, tau), tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("update", MASS_UPDATES)
@pytest.mark.parametrize(
    "costs",
    [
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        [[0.0, 0.0, 0.0], [2.0, 1.0, 3.0]],
        [[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]],
        [[1e-310, 1.0, 2.0], [2.0, 1.0, 1e-12]],
        [[1e30, 1.0, 2e30], [2.0, 1e20, 1.0]],
    ],
    ids=["all zero", "a row", "two", "tiny", "huge"],
)
def test_masses_stay_positive_and_add_up_to_one_over_many_steps(
    costs: list[list[float]], update: str, tau: float, kind: torch.dtype
) -> None:
    cost = torch.tensor(costs, dtype=kind)
    source, target = uniform(2).to(kind), uniform(3).to(kind)
    for step in range(6):
        now = cost if step % 2 == 0 else cost.flip(0, 1)
        flow = transport_plan(now, source, target)
        source, target = cost_attention(flow, now, source, update, tau), cost_attention(flow.T, now.T, target, update, tau)
        for mass in (source, target):
            assert mass.isfinite().all()
            assert (mass >= 0.9 * SMALLEST_SHARE).all()
            assert float(mass.sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("update", MASS_UPDATES)
def test_costs_of_zero_give_equal_masses_and_a_mass_of_zero_is_survived(update: str) -> None:
    zeros, flow = torch.zeros(2, 2), torch.eye(2) / 2
    torch.testing.assert_close(cost_attention(flow, zeros, torch.tensor([0.9, 0.1]), update), torch.tensor([0.5, 0.5]))
    gone = torch.tensor([0.0, 1.0])
    found = cost_attention(transport_plan(1 - zeros, gone, torch.tensor([0.5, 0.5])), 1 - zeros, gone, update)
    assert found.isfinite().all()
    assert float(found.sum()) == pytest.approx(1)


def test_plan_has_the_type_of_the_costs_and_no_gradient() -> None:
    cost = torch.rand(2, 3, requires_grad=True)
    flow = transport_plan(cost, torch.tensor([0.5, 0.5]), torch.full((3,), 1 / 3))
    assert flow.dtype == torch.float32
    assert not flow.requires_grad


def test_masses_that_are_rounded_are_moved_whole() -> None:
    flow = transport_plan(tensor([[1.0, 2.0]]), tensor([1 + 8e-6]), tensor([0.5, 0.5 - 8e-6]))
    assert float(flow.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("cost", "source", "target", "words"),
    [
        ([[1.0, float("nan")]], [1.0], [0.5, 0.5], "a cost is not finite"),
        ([[1.0, float("inf")]], [1.0], [0.5, 0.5], "a cost is not finite"),
        ([[1.0, 2.0]], [0.9], [0.5, 0.5], "masses of the source do not add up to 1"),
        ([[1.0, 2.0]], [1.0], [1.5, -0.5], "masses of the target do not add up to 1, or one is negative"),
        ([[1.0, 2.0]], [1.0], [0.5, float("nan")], "masses of the target"),
        ([[1.0, 2.0]], [0.5, 0.5], [0.5, 0.5], r"shape \(1, 2\) does not fit 2 sources and 2 targets"),
    ],
)
def test_what_no_plan_exists_for_is_refused(cost: list, source: list, target: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        transport_plan(tensor(cost), tensor(source), tensor(target))


def test_unknown_update_is_refused() -> None:
    with pytest.raises(ValueError, match="update 'mean' is not one of softmax2, softmax, sum"):
        cost_attention(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), "mean")


@pytest.mark.thorough
def test_solver_is_imported_when_it_is_used_and_brings_no_other_array_library() -> None:
    code = (
        "import sys, torch; from kd.functional.transport import transport_plan; assert 'ot' not in sys.modules\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        assert name.split('.')[0] not in ('jax', 'cupy', 'tensorflow'), name\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "transport_plan(torch.ones(1, 1), torch.ones(1), torch.ones(1)); assert 'ot' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
