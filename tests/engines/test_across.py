"""Losses that compare the examples of a batch with each other: two ranks have the result of one."""

from typing import Any

import pytest
import torch
from engines.relational import CASES, LOCAL, TYPES, Case, plain_batch, rows_of, save_rank, step_of, trained

from kd.system import distributed
from processes import fork_server, free_port

SUMS = 1e-9
"""Sums of float64 in another order, through two steps; without the other rank's rows results are off by 1e-4."""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the parameters and gathered rows of each of two ranks."""
    folder, port, server = tmp_path_factory.mktemp("ranks"), free_port(), fork_server()
    ranks = [server.Process(target=save_rank, args=(rank, port, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
        process.kill()  # one that waits for the other for good
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def name_of(case: Case) -> str:
    return f"{case.examples} by {case.size}, {case.turns} turns, {case.accumulate} accumulated"


@pytest.mark.ddp
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_two_ranks_with_rows_of_both_equal_one(case: Case, two_ranks: list) -> None:
    exact = trained(case)
    one, other = (rank["trained"][case] for rank in two_ranks)
    for name, tensor in exact.items():
        assert torch.equal(one[name], other[name]), f"{name}: the ranks drifted apart"
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=SUMS, msg=name)


@pytest.mark.ddp
@pytest.mark.parametrize("case", LOCAL, ids=name_of)
def test_two_ranks_with_rows_of_their_own_alone_differ_from_one(case: Case, two_ranks: list) -> None:
    exact, found = trained(case), two_ranks[0]["trained"][case]
    for part in ("student.model.", "method.before.weight", "method.after.weight"):
        names = [name for name in exact if name.startswith(part)]
        assert max(float((found[name] - exact[name]).abs().max()) for name in names) > 1e-4


def test_with_one_process_across_changes_nothing() -> None:
    assert all(torch.equal(*pair) for pair in zip(trained(CASES[0]).values(), trained(LOCAL[0]).values(), strict=True))
    rows = torch.randn(3, 2)
    assert step_of(plain_batch(3)).across(rows) is rows


@pytest.mark.ddp
def test_rows_of_any_type_stand_in_the_order_of_ranks(two_ranks: list) -> None:
    for found in (rank["gathered"] for rank in two_ranks):
        for kind in TYPES:
            assert torch.equal(found["types"][str(kind)], torch.cat([rows_of(rank, kind) for rank in range(2)])), kind
        assert found["one axis"].tolist() == [0, 1, 2, 10, 11]
        assert found["strided"].tolist() == [[0, 3], [1, 4], [2, 5], [0, 2], [1, 3]]
        assert [part.shape for part in found["none"]] == [(0, 2), (1, 2)]
    assert [rank["gathered"]["own"].tolist() for rank in two_ranks] == [[True] * 3 + [False] * 2, [False] * 3 + [True] * 2]


@pytest.mark.ddp
def test_gradient_is_that_of_the_sum_times_all_rows_by_own_rows_and_other_uses_keep_theirs(two_ranks: list) -> None:
    slope = 2 * (3 * 1.0 + 2 * 2.0)
    for rank, count in enumerate((3, 2)):
        expected = torch.full((count, 1), slope * 5 / count + 7)
        torch.testing.assert_close(two_ranks[rank]["gathered"]["gradient"], expected)
        assert two_ranks[rank]["gathered"]["no graph"] is False


@pytest.mark.ddp
def test_nothing_is_exchanged_where_one_rank_works_alone(two_ranks: list) -> None:
    assert [rank["gathered"]["alone"] for rank in two_ranks] == [True, True]


@pytest.mark.ddp
def test_rows_of_different_shapes_or_types_are_refused_on_every_rank(two_ranks: list) -> None:
    for found in (rank["gathered"] for rank in two_ranks):
        assert found["tokens"].endswith("(3, 4) torch.float32; (2, 5) torch.float32")
        assert found["type"].endswith("(3, 2) torch.float32; (2, 2) torch.int32")


def test_nothing_is_exchanged_before_there_is_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    rows = torch.randn(3, 2)
    assert distributed.world() == 2
    assert step_of(plain_batch(3)).across(rows) is rows


@pytest.mark.parametrize("shape", [(2, 4), (), (4, 3)])
def test_rows_that_are_not_one_for_each_example_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one row for each of the 3 examples"):
        step_of(plain_batch(3)).across(torch.zeros(shape))
