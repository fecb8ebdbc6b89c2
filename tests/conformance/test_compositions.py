"""The contract of a plug-in for what is composed of several files, with each option that it offers, and on two ranks."""

import copy

import pytest
import torch
import torch.multiprocessing as mp

from conformance import test_contract as contract
from conformance.bench import (
    CASES,
    GENERATED,
    SUMS,
    Bench,
    case_name,
    option_cases,
    refusal,
    save_two_rank_updates,
    shortest,
    specification,
    take,
    two_rank_cases,
)
from processes import free_port


@pytest.mark.thorough
@pytest.mark.parametrize("name", GENERATED)
def test_method_composes_or_is_refused_with_the_key_to_change(name: str) -> None:
    if (error := refusal(name)) is None:
        for check in contract.CHECKS:
            check(name)
    else:
        groups = ("pool", "cohort", "surgery", "student", "task", "teacher", "method")
        assert str(error.key).partition(".")[0] in groups, f"refused without the key to change: {error}"


@pytest.mark.parametrize(("name", "option"), option_cases())
def test_what_depends_on_the_batch_says_so(name: str, option: str) -> None:
    """The mean of a term over the halves of a batch is the term, unless the method declares a dependence, which then shows."""
    if (error := refusal(name, option)) is not None:
        assert error.key is not None, f"refused without the key to change: {error}"
        return
    bench = Bench(name, more=[option], double=True)
    bench.update(bench.batch(seed=1))  # after which a baseline differs from the latest reward
    batch = bench.batch()
    batch = take(batch, batch.student["attention_mask"].sum(dim=1).argsort())  # so that the halves are padded differently
    halves = [shortest(take(batch, rows)) for rows in torch.arange(8).split(4)]
    whole, parts = bench.terms(batch), [bench.terms(half) for half in halves]
    means = {term: sum(part[term] for part in parts) / 2 for term in whole}
    # The update may have made a sum over width and tokens as large as 1e10, whose rounding in float64 is 1e-6.
    apart = max(float((value - means[term]).abs() / value.abs().clamp(min=1)) for term, value in whole.items())
    assert (apart <= SUMS) == (bench.batch_dependence() is None), f"{apart}: {bench.batch_dependence()}"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Return the parameters after one step of every method, on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    # New interpreters, not forks of one: sets have other orders in each, and methods must not depend on them.
    cases = two_rank_cases()
    specifications = {(name, more): specification(name, more) for name, more, _ in cases}
    mp.spawn(save_two_rank_updates, args=(2, free_port(), folder, cases, specifications), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", [*CASES, *GENERATED])
@pytest.mark.ddp
def test_two_ranks_with_their_shares_equal_one_with_the_whole(name: str, two_ranks: list) -> None:
    cases = [case for case in two_rank_cases() if case[0] == name]
    assert cases or refusal(name) is not None
    for _, more, count in cases:
        case, bench = case_name(name, more, count), Bench(name, more=more, double=True)
        before = copy.deepcopy(bench.engine.state_dict())
        bench.update(bench.batch(count))
        moved = 0.0
        for key, tensor in bench.engine.state_dict().items():
            one, other = (rank[case][key] for rank in two_ranks)
            assert torch.equal(one, other), f"{case}, {key}: the ranks drifted apart"
            step = float((tensor - before[key]).abs().max())
            moved = max(moved, step)
            if bench.split_matters():
                continue
            assert float((one - tensor).abs().max()) <= SUMS * max(1.0, step), f"{case}, {key}"
        assert moved > 1e-4
