"""Nodes of a configuration to objects."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from kd.engines.base import check_weights
from kd.errors import InputError
from kd.methods.base import Method
from kd.optimizers import OptimizerFactory
from kd.schedules import Schedule, as_schedule
from kd.schema import CohortSpec, PoolSpec, RunSpec


def make(node: Mapping[str, Any], key: str, **extra: Any) -> Any:
    """Instantiate a `_target_` node.

    Raises:
        InputError: for a class that does not exist, or arguments that it does not take.
    """
    try:
        return instantiate(dict(node), _convert_="all", **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from error
        cause = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{node.get('_target_')} cannot be made: {cause}", key) from error


def build_method(
    node: Mapping[str, Any], pool: PoolSpec | None = None, cohort: CohortSpec | None = None, chances: Sequence[float] = ()
) -> tuple[Method, dict[str, Schedule]]:
    """A method, unbound, and the schedules of its weights.

    Args:
        node: of the method.
        pool: wraps it, if it has a wrapper.
        cohort: adds the peers' term, if there are peers.
        chances: a probability for each teacher of the pool.

    Raises:
        InputError: for an unknown argument, or weights and terms that do not match.
    """
    arguments = {name: value for name, value in node.items() if name not in ("name", "weights", "before")}
    method: Method = make(arguments, "method")
    if not isinstance(method, Method):
        raise InputError(f"{node.get('_target_')} is not a Method", "method._target_")
    if pool is not None and pool.wrapper is not None:
        method = called(make({**pool.wrapper, "_partial_": True}, "pool.wrapper"), method, chances, key="pool.wrapper")
    if cohort is not None and cohort.peers is not None:
        method = called(make({**cohort.peers, "_partial_": True}, "cohort.peers"), method, key="cohort.peers")
    weights = node.get("weights", {})
    if not isinstance(weights, Mapping):
        raise InputError(f"method.weights={weights!r} is not a mapping of terms to numbers", "method.weights")
    check_weights(method.names, weights)
    return method, {name: build_schedule(value, f"method.weights.{name}") for name, value in weights.items()}


def called(maker: Any, *arguments: Any, key: str) -> Any:
    """What a partial makes of these arguments.

    Raises:
        InputError: for options that it does not take.
    """
    try:
        return maker(*arguments)
    except TypeError as error:
        raise InputError(f"{maker.func.__name__} cannot be made: {error}", key) from error


def build_schedule(value: Any, key: str) -> Schedule:
    """A number, or a node of `kd.schedules`, as a schedule.

    Raises:
        InputError: for anything else.
    """
    made = make(value, key) if isinstance(value, Mapping) else value
    try:
        schedule = as_schedule(made)
        finite = all(math.isfinite(schedule(step / 100)) for step in range(101))
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}={value!r} is neither a number nor a schedule of numbers", key) from error
    if not finite:
        raise InputError(f"{key}={value!r} is not finite throughout training", key)
    return schedule


def build_optimizer(spec: RunSpec) -> OptimizerFactory:
    """The optimiser's factory.

    Raises:
        InputError: for a value that cannot work.
    """
    part = spec.optimizer
    if spec.trainer.precision == "16-mixed" and part.factory.get("fused"):
        raise InputError(
            "trainer.precision=16-mixed scales gradients, which a fused optimiser undoes before they can be clipped; "
            "use bf16-mixed, or optimizer.factory.fused=false",
            "trainer.precision",
        )
    return OptimizerFactory(make(part.factory, "optimizer.factory"), part.lr, part.weight_decay, part.schedule, part.warmup)
