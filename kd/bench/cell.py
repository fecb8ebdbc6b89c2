"""A candidate that takes the training steps of a run whose inputs are done, as the run itself would."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from kd.bench.harness import Turns
from kd.bench.workers import Gate, Job
from kd.build.models import plan_models
from kd.build.parts import examples_of
from kd.config.compose import compose
from kd.data.batch import Batch
from kd.data.datamodule import KDDataModule, ResumableData
from kd.data.mixture import MixedData
from kd.runs.members import members
from kd.runs.plan import plan
from kd.training.fit import prepare
from kd.training.rows import TrainOccurringRows
from kd.training.trainer import build_trainer


class ChosenBatches(list[list[int]]):
    """Batches of example indices that are there already, in the place of the sampler that gave them.

    Args:
        batches: the batches.
        sizes: as the sampler's `sizes` has them, which CUDA graphs are recorded for (`kd.training.graphs`).
    """

    def __init__(self, batches: Iterable[list[int]], sizes: set[int]) -> None:
        super().__init__(batches)
        self._sizes = sizes

    def sizes(self) -> set[int]:
        """Return the numbers of examples that batches of an epoch have."""
        return self._sizes


class FirstBatches(ResumableData):
    """The first training batches of other data, the same ones in every epoch, so that all turns take the same steps.

    Args:
        data: the data.
        count: number of batches; all of an epoch if it has fewer.
    """

    def __init__(self, data: KDDataModule | MixedData, count: int) -> None:
        super().__init__()
        self._loader = data.train_dataloader()
        sampler: Any = self._loader.batch_sampler
        self.batches = ChosenBatches(islice(iter(sampler), count), sampler.sizes())
        self.padded_lengths = data.padded_lengths
        """Numbers of tokens that batches may have after padding."""

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of training batches."""
        loader = self._loader
        return DataLoader(
            loader.dataset,
            batch_sampler=self.batches,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            persistent_workers=loader.persistent_workers,
        )


def train_cell(job: Job, gate: Gate) -> None:
    """Run the turns of a run: the steps of `kd.training.fit`, over the first batches of an epoch.

    A turn has whole optimiser steps. What the run shares with others, tokenised texts and outputs of teachers, is made where it
    is missing; nothing is written to the directory of the run.

    Raises:
        Finished: when there are no more turns.
        InputError: for a run that cannot be built.
    """
    run = plan(compose(job.overrides), job.overrides)
    prepared = prepare(run, examples_of(run))
    trainer = replace(run.spec.trainer, max_epochs=job.turns + 1, progress="none")
    run = replace(run, spec=replace(run.spec, trainer=trainer), directory=job.folder / run.name)
    run.directory.mkdir(parents=True)
    data = FirstBatches(prepared.data, -(-job.steps // trainer.accumulate) * trainer.accumulate)
    prepared.data.close()  # these batches have their tokens; those of further text are made once, and not in every step
    gate.ready({"steps": len(data.batches)}, trainer.accelerator)
    callbacks = [Turns(gate), TrainOccurringRows(prepared.tables)]
    lightning = build_trainer(run, prepared.engine, None, callbacks=callbacks, limit_val_batches=0, enable_checkpointing=False)
    lightning.fit(prepared.engine, datamodule=data)


def count_parameters(job: Job, gate: Gate) -> None:
    """Send the number of parameters of a run's students, surgeries included; nothing is trained or loaded.

    Raises:
        InputError: for a run that cannot be planned.
    """
    run = plan(compose(job.overrides), job.overrides)
    name, member = next(iter(members(run).items()))
    students = plan_models(member, examples_of(run, planned=True)[name].task).shapes.students
    gate.ready({"parameters": sum(student.parameter_count() for student in students.values())}, "cpu")
