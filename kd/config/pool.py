"""Checks and digest of a pool: which of several teachers' outputs a method can read, by the configuration alone."""

from typing import Any

from kd.config.cohort import students_of
from kd.config.schema import RunSpec, check_share
from kd.config.values import number, shown
from kd.errors import InputError, one_of


def teachers_of(spec: RunSpec) -> list[str]:
    """Return the names of the teachers whose outputs a method can read; of a chain only the last one."""
    return list(spec.teacher)[-1:] if spec.pool.chain else list(spec.teacher)


RANKED = ("teacher_rank", "best", "student_rank")
"""Distributions that depend on the teachers' metrics on a held-out part of train."""


def pool_identity(spec: RunSpec) -> dict[str, Any]:
    """Return the settings of a pool that enter a run's digest."""
    pool = spec.pool
    if pool.wrapper is None:
        return {"chain": True} if pool.chain else {}
    ranked = {"sharpness": pool.sharpness, "holdout": pool.holdout} if pool.distribution in RANKED else {}
    if pool.distribution == "best":
        ranked.pop("sharpness")
    return {"wrapper": pool.wrapper, "distribution": pool.distribution, **ranked}


def check_pool(spec: RunSpec) -> None:
    """Check that a pool and its teachers fit together.

    Raises:
        InputError: for a pool of one teacher, an invalid distribution, or teachers that do not fit.
    """
    pool, names = spec.pool, list(spec.teacher)
    number(pool.sharpness, "pool.sharpness", 0, 100)
    check_share(pool.holdout, "pool.holdout")
    if pool.wrapper is None and pool.distribution is not None:
        raise InputError(
            f"pool={pool.name} has no distribution: the method sees all teachers, or the last of a chain. "
            "pool=stochastic and pool=wkd have one",
            "pool.distribution",
        )
    if pool.wrapper is None and not pool.chain:
        return
    if len(names) < 2:
        raise InputError(
            f"pool={pool.name} needs two teachers or more, teacher={names} has {len(names)}; list more, or use pool=none",
            "teacher",
        )
    if pool.chain:
        for name in names[1:]:
            if spec.teacher[name].model is not None:
                raise InputError(
                    f"in a chain every teacher but the first is taught by the one before it; '{name}' is a ready classifier: "
                    "list it first, or give its backbone",
                    f"teacher.{name}.model",
                )
        return
    given = pool.distribution
    if isinstance(given, list):
        numbers = [value for value in given if type(value) in (int, float) and value >= 0]
        if len(numbers) != len(names) or len(given) != len(names):
            raise InputError(
                f"pool.distribution={given} must give a probability, not negative, for each teacher of {names}",
                "pool.distribution",
            )
        if abs(sum(numbers) - 1) > 1e-6:
            raise InputError(f"pool.distribution={given} adds up to {sum(numbers):g}, not 1", "pool.distribution")
    elif given not in ("uniform", *RANKED):
        raise one_of(shown(given), ("uniform", *RANKED, "[probability, ...]"), "pool.distribution")
    if given in RANKED and spec.task.holdout is not None:
        raise InputError("a pilot cannot have pilots of its own: task.holdout is set already", "task.holdout")
    if given in RANKED and given != "student_rank":
        for name, teacher in spec.teacher.items():
            if teacher.model is not None:
                raise InputError(
                    f"pool.distribution={given} fine-tunes each teacher on a part of train and scores it on the rest; "
                    f"'{name}' is a ready classifier. Give the probabilities instead: 'pool.distribution=[...]'",
                    "pool.distribution",
                )
    if given == "student_rank" and len(students_of(spec)) > 1:
        raise InputError("pool.distribution=student_rank ranks teachers by one student; use teacher_rank", "pool.distribution")
