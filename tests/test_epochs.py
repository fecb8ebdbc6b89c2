"""The batches of a run's epochs, as the trainer hands them to the engine."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import FILLER, GOOD
from kd.data.batch import Batch
from kd.engines.distiller import Distiller
from kd.training import execute
from whole_runs import planned

Small = Callable[..., list[str]]


def epochs_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[list[Batch]]:
    """Train a run, and return the training batches of each epoch."""
    epochs: dict[int, list[Batch]] = {}

    def record(engine: Distiller, batch: Batch, batch_idx: int) -> None:
        epochs.setdefault(engine.current_epoch, []).append(batch)

    run = planned(words)
    for _, needed in run.inputs:
        execute.execute(needed)
    monkeypatch.setattr(Distiller, "on_train_batch_start", record)
    execute.execute(run)
    return list(epochs.values())


def indices(batches: list[Batch]) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


@pytest.mark.parametrize("more", [(), ("trainer.batch_tokens=130",), ("trainer.num_workers=1",)], ids=str)
def test_every_epoch_has_all_examples_in_batches_of_its_own(
    small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: tuple[str, ...]
) -> None:
    words = small("method=finetune", "teacher=[]", "trainer.max_epochs=3", f"paths.runs={tmp_path}", *more)
    epochs = [indices(batches) for batches in epochs_of(words, monkeypatch)]
    assert len(epochs) == 3
    for batches in epochs:
        assert sorted(index for batch in batches for index in batch) == list(range(96))
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert epochs[one] != epochs[other]
        assert {frozenset(batch) for batch in epochs[one]} != {frozenset(batch) for batch in epochs[other]}


def test_every_epoch_of_a_masked_language_model_has_masks_of_its_own(
    small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(" ".join([*FILLER[n % 5 :], *GOOD[n % 3 :]]) for n in range(40)))
    words = small("method=finetune", "teacher=[]", "trainer.max_epochs=2", f"paths.runs={tmp_path}")
    words = [word for word in words if not word.startswith("task.")]
    words = [word.replace("task=file", "task=text") for word in words]
    first, second = epochs_of([*words, f"task.train={file}", "task.max_length=32"], monkeypatch)

    def predicted(batches: list[Batch]) -> dict[int, torch.Tensor]:
        rows = ((int(index), labels) for batch in batches for index, labels in zip(batch.index, batch.labels, strict=True))
        return {index: (labels != -100).nonzero() for index, labels in rows}

    one, other = predicted(first), predicted(second)
    assert one.keys() == other.keys()
    assert sum(not torch.equal(one[index], other[index]) for index in one) > len(one) / 2
