"""The LightningModule of a run and a trial step of its optimizer."""

from dataclasses import fields
from typing import Any

from kd.build.instantiate import arguments_of, build_optimizer, option_names
from kd.config.values import locate, subclass_of
from kd.data.tasks import Task
from kd.engines.base import Engine
from kd.engines.models import Models
from kd.errors import InputError, prefix_error_keys
from kd.runs.run import Run


def build_engine(run: Run, models: Models, task: Task) -> Engine:
    """Return the LightningModule that trains the run.

    Raises:
        InputError: for an engine that does not fit the students, or does not support a key of the trainer.
    """
    trainer = run.spec.trainer
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
