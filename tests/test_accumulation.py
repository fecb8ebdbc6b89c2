"""An optimiser step over several batches is a step over one batch of their examples, whatever is left at an epoch's end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd.data.sampler import LengthBatches, TokenBatches
from kd.engines.base import Engine
from kd.engines.distiller import Distiller
from kd.training import execute
from whole_runs import last_weights, made, planned, same_weights

Small = Callable[..., list[str]]

LENGTHS = [3 + place * 7 % 11 for place in range(94)]
SGD = [
    "optimizer.factory._target_=torch.optim.SGD",
    *(f"~optimizer.factory.{key}" for key in ("betas", "eps", "fused")),
    "optimizer.lr=0.5",
    "optimizer.schedule=constant",
    "optimizer.warmup=0",
]


def samplers(accumulate: int, world: int) -> list[list[LengthBatches]]:
    """For each rank: by count and by tokens."""
    return [
        [
            LengthBatches(LENGTHS, 16, 0, rank, world, accumulate),
            TokenBatches(LENGTHS, 130, (1, 32), 0, rank, world, accumulate),
        ]
        for rank in range(world)
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 4, 6, 64])
def test_weighted_means_over_batches_and_ranks_are_the_mean_over_the_examples_of_the_step(accumulate: int, world: int) -> None:
    for shards in zip(*samplers(accumulate, world), strict=True):
        losses = torch.arange(len(LENGTHS), dtype=torch.float64).exp2().remainder(97)
        batches = list(zip(*(list(shard) for shard in shards), strict=True))
        for begin in range(0, len(batches), accumulate):
            step = [rows for batch in batches[begin : begin + accumulate] for rows in batch]
            found = sum(losses[rows].mean() * rows.weight / accumulate / world for rows in step)
            assert float(found) == pytest.approx(float(losses[[row for rows in step for row in rows]].mean()), rel=1e-12)


def test_equal_batches_that_fill_every_step_have_a_weight_of_exactly_one() -> None:
    for accumulate in (1, 2, 3, 6):
        assert {rows.weight for rows in LengthBatches(LENGTHS[:90], 16, 0, accumulate=accumulate)} == {1.0}


def test_an_epoch_that_goes_on_in_the_middle_weighs_its_batches_as_an_unbroken_one() -> None:
    whole, rest = (LengthBatches(LENGTHS, 16, 0, accumulate=4) for _ in range(2))
    rest.skip = 4
    assert [(list(rows), rows.weight) for rows in rest] == [(list(rows), rows.weight) for rows in list(whole)[4:]]


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.accumulate=4", "method=pkd"),
        ("trainer.accumulate=3", "method=pkd", "trainer.batch_tokens=130"),
        ("trainer.accumulate=4", "method=dml", "teacher=[]", "cohort.students=2"),
    ],
    ids=" ".join,
)
def test_gradient_of_a_step_is_that_of_one_batch_of_its_examples(
    small: Small, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    rows: list[int] = []
    steps: list[int] = []

    def before(engine: Engine, batch: Any, batch_idx: int) -> None:
        rows.extend(batch.index.tolist())

    def compare(engine: Engine, optimizer: object) -> None:
        parameters = [parameter for group in engine.trained() for parameter in group]
        batch = engine.trainer.datamodule.collate("train")(rows)  # type: ignore[attr-defined]
        expected = torch.autograd.grad(engine.loss(batch, engine.progress()).total, parameters)
        for parameter, wanted in zip(parameters, expected, strict=True):
            assert parameter.grad is not None
            # Another padding and order of summation; 1e-5 of the largest gradient is their rounding in float32.
            assert float((parameter.grad - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max()) + 1e-7
        steps.append(len(rows))
        rows.clear()

    for _, needed in planned(small(*words)).inputs:
        execute.execute(needed)
    monkeypatch.setattr(Distiller, "on_train_batch_start", before)
    monkeypatch.setattr(Distiller, "on_before_optimizer_step", compare)
    # 96 examples in batches of 19 and 20: four, and the one that is left.
    common = ("trainer.batch_size=20", "student.dropout=0", "trainer.max_epochs=1", "trainer.clip=null", "preflight=false")
    result = execute.execute(run := planned(small(*words, *common)))
    assert (sum(steps), len(steps)) == (96, result["steps"])
    if run.spec.trainer.batch_tokens is None:
        assert (min(steps), max(steps), result["batch_size"]) == (19, 77, 80)


def test_more_batches_than_an_epoch_has_are_one_step_of_the_epoch_and_the_record_says_so(small: Small, tmp_path: Path) -> None:
    words = ("student.dropout=0", "task.limit_train=94", "trainer.max_epochs=1", "preflight=false")
    common = small("method=finetune", "teacher=[]", *words, *SGD)
    found = {}
    for name, words in {
        "one batch": ["trainer.batch_size=94"],
        "a larger batch": ["trainer.batch_size=512"],
        "six": ["trainer.accumulate=6"],
        "more": ["trainer.accumulate=64"],
    }.items():
        run, result = made([*common, *words, f"paths.runs={tmp_path}"])
        found[name] = last_weights(run)
        steps, batches = result["steps"], 1 if "batch" in name else 6
        assert (result["batch_size"], result["accumulate"], steps) == (94, batches, 1), name
    assert same_weights(found["one batch"], found["a larger batch"])
    for name, tensor in found["six"].items():
        torch.testing.assert_close(tensor, found["more"][name])  # a loss that is divided by 6 or by 64
        # Other batches are padded and summed otherwise.
        torch.testing.assert_close(tensor, found["one batch"][name], rtol=1e-4, atol=1e-5, msg=name)
