"""Instantiation of configuration nodes.

A node names its class as `_target_`. Its key determines which classes are allowed: a method, a schedule, an optimiser. The
class is imported and checked before anything is called.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from kd.config.schema import CohortSpec, PoolSpec, RunSpec
from kd.config.values import TINY, locate, number, one_line, returns, shown, subclass_of, switch
from kd.engines.base import check_terms
from kd.engines.optimizer import OptimizerFactory
from kd.errors import InputError, prefix_error_keys
from kd.methods.base import Bound, Method
from kd.schedules import Schedule, ScheduleNode, as_schedule, extremes

BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
"""Kinds of parameters that a node can set."""

BOOLEAN_ANNOTATIONS = ("<class 'bool'>", "bool", "bool | None", "typing.Optional[bool]")
"""Annotations of boolean arguments, as text."""


def instantiate(target: Callable[..., Any], node: Mapping[str, Any], key: str, *given: Any) -> Any:
    """Call a class with the arguments of a node; nodes of schedules among them are instantiated first.

    Args:
        target: the class, as `locate` returns it.
        node: arguments by name.
        key: configuration key of the node.
        given: positional arguments before those of the node.

    Raises:
        InputError: for arguments that the class does not accept, naming their keys.
    """
    arguments = arguments_of(target, node, key, len(given))
    try:
        with prefix_error_keys(key, option_names(target, node)):
            return target(*given, **arguments)
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise InputError(f"{node.get('_target_')} cannot be instantiated: {one_line(error)}", key) from error


def arguments_of(target: Callable[..., Any], node: Mapping[str, Any], key: str, given: int = 0) -> dict[str, Any]:
    """Return the arguments of a node, with nodes of schedules among them instantiated.

    Raises:
        InputError: naming an argument that the class does not accept, or that holds a node of anything but a schedule.
    """
    arguments = {}
    try:
        parameters = list(inspect.signature(target).parameters.values())[given:]
    except (TypeError, ValueError):
        parameters = None
    names = [parameter.name for parameter in parameters or [] if parameter.kind in BY_KEYWORD]
    hints = {parameter.name: parameter.annotation for parameter in parameters or []}
    any_name = parameters is None or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    for name, value in node.items():
        if name in ("_target_", "_partial_"):
            continue
        where = f"{key}.{name}"
        if name not in names and not any_name:
            accepted = f"it takes {', '.join(names)}" if names else "it takes none"
            raise InputError(f"{getattr(target, '__name__', target)} takes no argument '{name}'; {accepted}", where)
        if value is not None and str(hints.get(name)) in BOOLEAN_ANNOTATIONS:
            switch(value, where)
        arguments[name] = made_schedules(value, where)
    return arguments


def option_names(target: Callable[..., Any], node: Mapping[str, Any]) -> set[str]:
    """Return the names that errors of a class may use for the keys of its node: those in the node, and all it might have.

    A class may pass arguments on to its bases, so their arguments count too.
    """
    names = set(node)
    for base in inspect.getmro(target) if inspect.isclass(target) else (target,):
        with contextlib.suppress(TypeError, ValueError):  # some built-in classes have no signature
            names |= {
                parameter.name for parameter in inspect.signature(base).parameters.values() if parameter.kind in BY_KEYWORD
            }
    return names


def made_schedules(value: object, key: str) -> Any:
    """Return a value with its nodes of schedules instantiated.

    Raises:
        InputError: for a node of anything else.
    """
    if isinstance(value, Mapping):
        if "_target_" in value:
            return make_schedule(value, key)
        return {name: made_schedules(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [made_schedules(inner, key) for inner in value]
    return value


def make_schedule(node: Mapping[str, Any], key: str) -> ScheduleNode:
    """Instantiate a schedule from its node.

    Raises:
        InputError: for another class, or arguments that it does not accept.
    """
    expected = "a schedule, as kd.schedules.Linear: a class that inherits from kd.schedules.ScheduleNode"
    target = locate(node, key, subclass_of(ScheduleNode), expected)
    try:
        schedule: ScheduleNode = instantiate(target, node, key)
    except InputError as error:  # name the schedule's key: its arguments depend on each other
        raise InputError(error.message, key) from error
    return schedule


def build_method(
    node: Mapping[str, Any], pool: PoolSpec | None = None, cohort: CohortSpec | None = None, chances: Sequence[float] = ()
) -> tuple[Method, dict[str, Schedule]]:
    """Build a method, not yet bound to models, and the schedules of its weights.

    Args:
        node: configuration node of the method.
        pool: its wrapper, if it has one, is put around the method.
        cohort: its peers, if it has any, add a loss term.
        chances: probability of each teacher of the pool.

    Raises:
        InputError: for an unknown argument, or weights and terms that do not match.
    """
    is_method = subclass_of(Method)
    arguments = {name: value for name, value in node.items() if name not in ("name", "weights", "before", "aids")}
    method: Method = instantiate(locate(node, "method", is_method, "a Method"), arguments, "method")
    if pool is not None and pool.wrapper is not None:
        wrapper = locate(pool.wrapper, "pool.wrapper", is_method, "a Method")
        method = instantiate(wrapper, pool.wrapper, "pool.wrapper", method, chances)
    if cohort is not None and cohort.peers is not None:
        peers = locate(cohort.peers, "cohort.peers", is_method, "a Method")
        method = instantiate(peers, cohort.peers, "cohort.peers", method)
    weights = node.get("weights")
    if not isinstance(weights, Mapping):
        raise InputError(f"method.weights={shown(weights)} is not a mapping of terms to numbers", "method.weights")
    check_terms(method.names, weights)
    schedules = {name: build_schedule(value, f"method.weights.{name}") for name, value in weights.items()}
    if not any(any(extremes(schedule)) for schedule in schedules.values()):
        raise InputError("all weights are zero throughout training, so nothing would be learnt", "method.weights")
    return method, schedules


def method_of(spec: RunSpec) -> tuple[Method, dict[str, Schedule]]:
    """Return the method of a run and the schedules of its weights, before the scores of its teachers are known.

    Raises:
        InputError: as `build_method`.
    """
    chances = [1 / max(len(spec.teacher), 1)] * len(spec.teacher)
    return build_method(spec.method, spec.pool, spec.cohort, chances)


def learns_from_labels_alone(weights: Mapping[str, Schedule]) -> bool:
    """Return whether the loss against the labels is the only term that ever counts."""
    return not any(any(extremes(weight)) for term, weight in weights.items() if term != "task")


def bind_method(method: Method, node: Mapping[str, Any], bound: Bound) -> None:
    """Bind a method to its models.

    Args:
        method: as `build_method` returns it, possibly in wrappers. Wrappers check their own options when they are built, so
            errors of `bind` are about the method inside.
        node: configuration node of the method.
        bound: the models and the task.

    Raises:
        InputError: for a method that cannot work with these models.
    """
    target = locate(node, "method", subclass_of(Method), "a Method")
    with prefix_error_keys("method", option_names(target, node)):
        method.bind(bound)


LARGEST_WEIGHT = 1e9
"""Largest weight of a loss term. The largest published for any method here is 1000; float32 ends at 3e38."""


def build_schedule(value: object, key: str) -> Schedule:
    """Return a weight, given as a number or as a node of `kd.schedules`, as a schedule.

    Raises:
        InputError: for anything else, or a number that is out of range for a weight.
    """
    weight_or_schedule: Any = make_schedule(value, key) if isinstance(value, Mapping) else value
    try:
        schedule = as_schedule(weight_or_schedule)
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}={shown(value)} is neither a finite number nor a schedule of such", key) from error
    weights = [number(weight, key, 0.0, LARGEST_WEIGHT) for weight in extremes(schedule)]
    number(max(weights), key, TINY, LARGEST_WEIGHT, zero=True)  # only the largest: a decaying weight may approach zero
    return schedule


def makes_optimizer(found: object) -> bool:
    """Return whether an object is an optimiser class, or a function that may return an optimiser, without calling it.

    A function must accept parameter groups and `lr`. Its return annotation must be an optimiser; without one, the type of the
    result is checked when it is called, in `make_optimizer`.
    """
    if inspect.isclass(found):
        return subclass_of(Optimizer)(found)
    try:
        signature = inspect.signature(found, eval_str=True)  # type: ignore[arg-type]
        signature.bind_partial([], lr=0.0)
    except Exception:  # noqa: BLE001 - not callable, other arguments, or any error from evaluating annotations
        return False
    returned = signature.return_annotation
    return returned is signature.empty or (inspect.isclass(returned) and issubclass(returned, Optimizer))


def make_optimizer(target: Callable[..., Any], groups: list[dict[str, Any]], lr: float, **options: Any) -> Optimizer:
    """Call an optimiser class or a function.

    Args:
        target: the class or function.
        groups: parameter groups.
        lr: learning rate.
        **options: further arguments of the target.

    Raises:
        InputError: if the function returns something else than an optimiser.
    """
    optimizer = target(groups, lr=lr, **options)
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise InputError(f"optimizer.factory made a {kind}, not a torch.optim.Optimizer", "optimizer.factory._target_")
    return optimizer


def build_optimizer(spec: RunSpec) -> OptimizerFactory:
    """Build the factory of the optimiser.

    Raises:
        InputError: for an invalid value or a combination that cannot work.
    """
    part = spec.optimizer
    if spec.trainer.precision == "16-mixed" and part.factory.get("fused"):
        raise InputError(
            "trainer.precision=16-mixed scales gradients, which a fused optimiser undoes before they can be clipped; "
            "use bf16-mixed, or optimizer.factory.fused=false",
            "trainer.precision",
        )
    kind = "an optimiser: a class of torch.optim.Optimizer, or a function of parameter groups and `lr` that returns one"
    target = locate(part.factory, "optimizer.factory", makes_optimizer, kind, partial=True)
    options = {name: value for name, value in part.factory.items() if name not in ("_target_", "_partial_")}
    if taken := [name for name in ("params", "lr", "weight_decay") if name in options]:
        where = {"params": "optimizer.factory.params"}.get(taken[0], f"optimizer.{taken[0]}")
        raise InputError(f"optimizer.factory.{taken[0]} is set elsewhere: {where}", f"optimizer.factory.{taken[0]}")
    arguments_of(target, options, "optimizer.factory", given=1)
    make = functools.partial(make_optimizer, target, **options)
    return OptimizerFactory(make, part.lr, part.weight_decay, part.schedule, part.warmup)


def logger_makers(spec: RunSpec) -> "dict[str, functools.partial[Logger]]":
    """Return functions of the run (`kd.training.trackers.base.TrackedRun`) that create its loggers beside the history, by name.

    Raises:
        InputError: for a target that is not a logger, or options that it does not accept.
    """
    is_logger, makes_logger = subclass_of(Logger), returns(Logger)
    what = "a logger of Lightning, or a function that is annotated to return one"
    makers = {}
    for name, node in spec.logger.extra.items():
        key = f"logger.extra.{name}"
        target = locate(node, key, lambda found: is_logger(found) or makes_logger(found), what, partial=True)
        makers[name] = functools.partial(target, **arguments_of(target, node, key, given=1))
    return makers
