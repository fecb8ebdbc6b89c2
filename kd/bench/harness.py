"""A candidate that trains as `kd-train` does: the same models, data, engine, trainer and loop."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

from kd.bench.cost import DTYPES, device_of, training_flops
from kd.bench.workers import Gate, Job
from kd.build.check import check_compilation
from kd.build.data import build_data, build_examples, prefit_methods
from kd.build.engine import build_engine
from kd.build.inputs import prefix_student_errors
from kd.build.models import BuiltModels, build_models
from kd.config.compose import compose
from kd.data.batch import Batch
from kd.data.datamodule import KDDataModule, why_later
from kd.data.examples import HEAD_OF_KIND, LIMIT_SEED, Examples
from kd.engines.base import Engine
from kd.errors import InputError
from kd.models.students import plan_student
from kd.runs.identity import backbone_of
from kd.runs.inputs import student_of
from kd.runs.plan import plan
from kd.runs.run import Run, RunInputs
from kd.system.hardware import keep_memory
from kd.training.progress_bar import ProgressBar
from kd.training.rows import TrainOccurringRows, plan_tables, readers_of
from kd.training.trainer import build_trainer, quieten


@dataclass
class Prepared:
    """A run that is ready to be measured.

    Attributes:
        run: the run; its directory is in the job's folder.
        examples: the examples of a turn.
        models: the students and teachers of the run.
        data: loaders over `examples`.
        texts: training texts of the task: the rows of the embedding table that they have are trained, as in a run.
        later: reason why a run has not all of their tokens before the training, and trains all rows; None if it has.
        turns_in_epoch: number of training examples of the task, divided by those of a turn.
        began: start of its preparation, in seconds of `time.perf_counter`.
    """

    run: Run
    examples: Examples
    models: BuiltModels
    data: KDDataModule
    texts: Sequence[tuple[str, ...]]
    later: str | None
    turns_in_epoch: float
    began: float

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example that a turn trains on, with the student's tokenizer."""
        lengths: np.ndarray = self.data.tokens["train"][self.data.student_key].lengths[self.data.trained]
        return lengths

    def facts(self, precision: str) -> dict[str, Any]:
        """Return the description of the run that the parent process needs for its figures."""
        spec = self.run.spec
        classifier = self.examples.task.head == "classifier"
        return {
            "precision": precision,
            "dtype": DTYPES[precision],
            "accelerator": spec.trainer.accelerator,
            "device": device_of(spec.trainer.accelerator),
            "examples": len(self.lengths),
            "tokens": int(self.lengths.sum()),
            "turns_in_epoch": self.turns_in_epoch,
            "steps": -(-len(self.data.sampler("train", spec.seed)) // spec.trainer.accumulate),
            "flops": sum(training_flops(one, self.lengths) for one in self.models.students.values()) if classifier else None,
            "students": list(self.models.inits.values()),
            "caches": {name: asdict(cache) for name, cache in self.models.caches.items()},
            "setup_seconds": time.perf_counter() - self.began,
        }


def prepare(job: Job) -> Prepared:
    """Plan and build a candidate's run over a turn's examples, without training anything or changing the runs' folder.

    The runs that this one needs are not trained either: teachers that it would fine-tune are used untrained, with a new head,
    as are aids, and a student that would start from another run is initialised at random, with the backbone's vocabulary.

    Raises:
        InputError: for a run that cannot be built, or that needs another run which a benchmark does not train.
    """
    began = time.perf_counter()
    quieten()
    run = plan(compose(job.overrides), job.overrides)
    # For a method with two runs, measure the first: the second is plain distillation or fine-tuning.
    run = run.inputs.before or run
    check_compilation(run.spec)  # a row with graphs that cannot be recorded here is left out, and does not end the benchmark
    folder = job.folder / job.candidate.name
    spec = replace(
        run.spec,
        paths=replace(run.spec.paths, runs=str(folder)),  # stored tokens and cached outputs of trained teachers go there
        # Training is stopped before the epoch after the last turn, or earlier.
        trainer=replace(run.spec.trainer, max_epochs=job.turns + 1, progress="none"),
        logger=replace(run.spec.logger, extra={}),
        student=replace(run.spec.student, init="random") if run.inputs.stage else run.spec.student,
    )
    for role, _ in run.inputs:
        if role.kind not in ("teacher", "stage", "aid"):
            raise InputError(
                f"the {role} needs a run that kd-bench does not train", "task.edits" if role.kind == "edit" else "surgery"
            )
    teachers, aids = (
        {name: replace(needed, directory=folder / f"{kind}_{name}") for name, needed in runs.items()}
        for kind, runs in (("teacher", run.inputs.teachers), ("aid", run.inputs.aids))
    )
    run = replace(run, spec=spec, directory=folder / run.name, inputs=RunInputs(teachers, aids=aids))
    run.directory.mkdir(parents=True)
    examples = build_examples(run)
    whole, later = examples.texts["train"], why_later(examples)
    examples = some(examples, job.steps * spec.trainer.accumulate * spec.trainer.batch_size)
    for needed in teachers.values():
        save_untrained(needed, examples.task.labels, examples.task.head, spec.seed)
    for needed in aids.values():
        save_untrained(needed, None, HEAD_OF_KIND[needed.spec.task.kind], spec.seed)
    models = build_models(run, examples.task, texts=examples.texts["train"])
    if job.candidate.bare:
        models = replace(models, teachers=[])
    data, models = build_data(run, examples, models)
    if not job.candidate.bare:
        prefit_methods(run, data, models)
    return Prepared(run, examples, models, data, whole, later, len(whole) / len(examples.texts["train"]), began)


def some(examples: Examples, count: int) -> Examples:
    """Return the examples with at most `count` training examples, drawn as `task.limit_train` draws them."""
    return examples.with_train(np.random.default_rng(LIMIT_SEED).permutation(len(examples.texts["train"]))[:count])


def save_untrained(needed: Run, labels: Sequence[str] | None, head: str, seed: int) -> None:
    """Save an untrained teacher or aid in place of a finished run: layers of its backbone with a newly initialised head.

    Raises:
        InputError: if the backbone cannot be loaded.
    """
    student = student_of(needed)
    source, key = backbone_of(needed.spec, student)
    torch.manual_seed(seed)
    with prefix_student_errors():
        initial = None if student.init == "random" else source
        plan_student(student, source, labels, initial, key=key, head=head).materialise().save(needed.student)


class Turns(pl.Callback):
    """Callback that makes every training epoch one turn: the candidate waits until it is its turn, trains, and reports."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.examples = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the next turn."""
        self.examples = 0
        self.gate.open()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Count the examples of the batch."""
        self.examples += len(batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the turn to the parent process."""
        self.gate.close(self.examples)


def occurring_rows(prepared: Prepared, engine: Engine) -> TrainOccurringRows:
    """Return the callback that trains the rows of embedding tables that occur in the whole of train: a turn has few of them."""
    data, texts = prepared.data, prepared.texts

    def words(tokenizer: Any) -> np.ndarray:
        ids: np.ndarray = data.read(tokenizer, texts, data.max_length).words()
        return ids

    readers = readers_of(prepared.models, data)
    whole = [replace(one, later=prepared.later, words=partial(words, one.encoder.tokenizer)) for one in readers]
    return TrainOccurringRows(plan_tables(whole, engine, prepared.run.spec.trainer))


def train_candidate(job: Job, gate: Gate) -> None:
    """Run a candidate's turns: the steps of `kd.training.fit` from preflight to evaluation, without checkpoints.

    Raises:
        Finished: when there are no more turns.
        InputError: for a run that cannot be built.
    """
    prepared = prepare(job)
    keep_memory()  # as `kd.training.fit.fit` does
    run = prepared.run
    engine = build_engine(run, prepared.models, prepared.examples.task)
    gate.ready(prepared.facts(run.spec.trainer.precision), run.spec.trainer.accelerator)
    rows = occurring_rows(prepared, engine)
    callbacks = [ProgressBar(run.name, run.spec.trainer.progress), Turns(gate), rows]
    trainer = build_trainer(run, engine, None, callbacks=callbacks, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(engine, datamodule=prepared.data)
