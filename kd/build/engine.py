"""The LightningModule of a run and a trial step of its optimizer."""

from dataclasses import fields
from typing import Any

from kd.build.instantiate import arguments_of, build_optimizer, option_names
from kd.config.schema import GRAPHS, padding_multiple
from kd.config.values import locate, subclass_of
from kd.data.tasks import Task
from kd.data.tokenized import padded_lengths
from kd.engines.base import Engine
from kd.engines.models import Models
from kd.errors import InputError, prefix_error_keys
from kd.runs.run import Run

MOST_LENGTHS = 64
"""Largest number of padded lengths with CUDA graphs: recording them takes time and memory for each. Our choice."""


def check_graphs(run: Run, models: Models) -> None:
    """Check that the blocks of students can run as CUDA graphs, of few shapes.

    Raises:
        InputError: for a method that reads inside the blocks of a student, or takes gradients that are differentiated again:
            such passes run uncompiled. Or if batches may have too many lengths.
    """
    key, name = "trainer.compile", run.spec.method["name"]
    for method in models.methods.values():
        needs, _ = method.needs()
        if needs.gradient or needs.inside_blocks:
            what = "takes gradients of the student's pass" if needs.gradient else "reads queries, keys or values of the student"
            raise InputError(
                f"trainer.compile={GRAPHS} runs the student's blocks as CUDA graphs, and method={name} {what}, which they do "
                "not have; use trainer.compile=false",
                key,
            )
    lengths = len(padded_lengths(padding_multiple(run.spec.trainer), run.spec.task.max_length))
    if lengths > MOST_LENGTHS:
        raise InputError(
            f"trainer.pad_multiple={run.spec.trainer.pad_multiple} with task.max_length={run.spec.task.max_length} gives "
            f"batches of {lengths} lengths, and trainer.compile={GRAPHS} records CUDA graphs for each; a multiple of at least "
            f"{-(-run.spec.task.max_length // MOST_LENGTHS)} gives {MOST_LENGTHS} or fewer",
            "trainer.pad_multiple",
        )


def build_engine(run: Run, models: Models, task: Task) -> Engine:
    """Return the LightningModule that trains the run.

    Raises:
        InputError: for an engine that does not fit the students, or an engine or a method that does not support a key of the
            trainer.
    """
    trainer = run.spec.trainer
    if trainer.compile == GRAPHS:
        check_graphs(run, models)
    given: dict[str, Any] = {
        "models": models,
        "task": task,
        "optimizer": build_optimizer(run.spec),
        "seed": run.spec.seed,
        "clip": trainer.clip,
    }
    follows = {*given, *(field.name for field in fields(Models))}
    if reserved := [name for name in run.spec.engine if name in follows]:
        raise InputError(f"engine.{reserved[0]} follows from the rest of the configuration", f"engine.{reserved[0]}")
    target = locate(run.spec.engine, "engine", subclass_of(Engine), "an engine: a class of kd.engines.base.Engine")
    options = arguments_of(target, run.spec.engine, "engine")
    try:
        with prefix_error_keys("engine", option_names(target, run.spec.engine) - set(given)):
            engine: Engine = target(**given, **options)
    except TypeError as error:
        raise InputError(f"the engine cannot be instantiated: {error}", "engine") from error
    if not engine.automatic_optimization:  # it calls the optimiser itself after every batch
        if trainer.accumulate > 1:
            raise InputError("this engine does not accumulate gradients; use trainer.accumulate=1", "trainer.accumulate")
        if trainer.precision == "16-mixed":
            raise InputError("this engine has no gradient scaler; use trainer.precision=bf16-mixed", "trainer.precision")
    return engine
