"""Parts of a run: data, models and an engine for each of its tasks, and the engine and loaders of all together."""

from collections.abc import Mapping
from dataclasses import dataclass

from kd.build.data import build_data, build_examples, prefit_methods
from kd.build.engine import build_engine
from kd.build.models import BuiltModels, build_models
from kd.config.mixture import is_mixture, rename_task_error_keys
from kd.data.datamodule import KDDataModule
from kd.data.examples import Examples
from kd.data.mixture import MixedData, Mixture
from kd.data.texts import JoinedTexts
from kd.engines.base import Engine
from kd.engines.distiller import Distiller
from kd.engines.mixed import MixedEngine
from kd.errors import InputError, prefix_error_keys
from kd.runs.members import members
from kd.runs.run import Run


@dataclass(frozen=True)
class Part:
    """One task of a run.

    Attributes:
        run: the run as that of this task alone.
        examples: examples of the task.
        models: students, methods and teachers of the task; students of a mixture share their bodies.
        data: loaders over the task.
        engine: the engine that trains the students on the task.
    """

    run: Run
    examples: Examples
    models: BuiltModels
    data: KDDataModule
    engine: Engine


def examples_of(run: Run, *, planned: bool = False) -> dict[str, Examples]:
    """Return the examples of each task of a run, by name; arguments as for `build_examples`.

    Raises:
        InputError: for an error in the data, in the configuration of a task, or in an edit.
    """
    examples = {}
    for name, one in members(run).items():
        with rename_task_error_keys(run.spec.task, name):
            examples[name] = build_examples(one, planned=planned)
    return examples


def mixture_of(run: Run, examples: Mapping[str, Examples]) -> Mixture:
    """Return the mixture of a run's tasks.

    Raises:
        InputError: for a monitored metric that does not choose a checkpoint.
    """
    task = run.spec.task
    with prefix_error_keys("task", {"monitor"}):
        return Mixture(task.name, {name: one.task for name, one in examples.items()}, task.monitor)


def build_models_of(run: Run, examples: Mapping[str, Examples]) -> dict[str, BuiltModels]:
    """Return the models of each task; the students of all tasks share the bodies of the first one's.

    A surgery may learn a vocabulary from the texts of all tasks.

    Raises:
        InputError: for models, teachers, methods or surgeries that do not fit each other.
    """
    texts = JoinedTexts(*(one.texts["train"] for one in examples.values()))
    built: dict[str, BuiltModels] = {}
    for name, one in members(run).items():
        body = next(iter(built.values()), None)
        with rename_task_error_keys(run.spec.task, name):
            built[name] = build_models(one, examples[name].task, texts=texts, body=body)
    return built


def build_parts(run: Run, examples: Mapping[str, Examples]) -> dict[str, Part]:
    """Build data, models and engine of each task of a run whose inputs are done.

    Raises:
        InputError: for parts that do not fit each other, or a teacher that cannot be loaded.
    """
    parts, models = {}, build_models_of(run, examples)
    for name, one in members(run).items():
        with rename_task_error_keys(run.spec.task, name):
            data, built = build_data(one, examples[name], models[name])
            prefit_methods(one, data, built)
            parts[name] = Part(one, examples[name], built, data, build_engine(one, built, examples[name].task))
    return parts


def engine_of(run: Run, engines: Mapping[str, Engine], examples: Mapping[str, Examples]) -> Engine:
    """Return the engine that trains a run: that of its task, or for a mixture one for those of all tasks.

    Raises:
        InputError: for a mixture with an engine that is not `kd.engines.distiller.Distiller`.
    """
    if not is_mixture(run.spec.task):
        return next(iter(engines.values()))
    distillers = {name: engine for name, engine in engines.items() if isinstance(engine, Distiller)}
    if len(distillers) < len(engines):
        raise InputError("a mixture of tasks is trained by kd.engines.distiller.Distiller", "engine")
    return MixedEngine(distillers, mixture_of(run, examples))


def data_of(run: Run, parts: Mapping[str, Part]) -> KDDataModule | MixedData:
    """Return the loaders of a run: those of its task, or for a mixture those over all tasks."""
    data = {name: part.data for name, part in parts.items()}
    if not is_mixture(run.spec.task):
        return next(iter(data.values()))
    return MixedData(data, run.spec.task.tau, run.spec.seed)
