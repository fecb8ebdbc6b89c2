"""Which students learn together."""

from dataclasses import replace
from typing import Any

from kd import config as composition
from kd.errors import InputError, one_of
from kd.schema import RunSpec, StudentSpec


def check_cohort(spec: RunSpec) -> None:
    """Whether a cohort can be.

    Raises:
        InputError: for fewer than two students, or a teacher that cannot be trained with them.
    """
    cohort = spec.cohort
    count = len(students_of(spec))
    if cohort.peers is not None and count < 2:
        raise InputError(
            f"cohort={cohort.name} needs two students or more, cohort.students={cohort.students} has {count}", "cohort.students"
        )
    if cohort.peers is None and count > 1:
        raise InputError(f"cohort={cohort.name} has one student; for {count} use cohort=mutual", "cohort")
    if cohort.teacher not in ("frozen", "online"):
        raise one_of(cohort.teacher, ("frozen", "online"), "cohort.teacher")
    if cohort.teacher == "online":
        backbones = [teacher.backbone for teacher in spec.teacher.values()]
        if cohort.peers is None or len(backbones) != 1 or backbones[0] is None:
            raise InputError(
                "a teacher is trained online together with two students or more (cohort=mutual), and it is one that begins "
                "from a backbone: teacher=[minilm]",
                "cohort.teacher",
            )


VARIED = ("name", "layers", "width", "heads", "intermediate", "init", "init_from", "dropout")
"""What may differ between the students of a cohort."""


def students_of(spec: RunSpec) -> dict[str, StudentSpec]:
    """Name -> student, for every student of the cohort; the first one's seed is the run's.

    `cohort.students` is a number of students alike, or a list with an entry for each: a name of `conf/student`, or a mapping
    of keys that are laid over `student`.

    Raises:
        InputError: for something else.
    """
    given = spec.cohort.students
    if isinstance(given, int) and not isinstance(given, bool):
        entries: list[Any] = [{}] * given
    elif isinstance(given, list):
        entries = given
    else:
        raise InputError(f"cohort.students={given} is neither a number nor a list of students", "cohort.students")
    if not entries:
        raise InputError(f"cohort.students={given} leaves nobody to train", "cohort.students")
    found: dict[str, StudentSpec] = {}
    for entry in entries:
        changes = named_student(entry) if isinstance(entry, str) else entry
        if not isinstance(changes, dict) or not set(changes) <= set(VARIED):
            raise InputError(
                f"cohort.students: '{entry}' is neither a name of conf/student nor a mapping of {', '.join(VARIED)}",
                "cohort.students",
            )
        if changes and spec.student.init == "run":
            raise InputError("students that begin from one run are all alike: cohort.students=2", "cohort.students")
        student = replace(spec.student, **changes)
        name, number = student.name.replace(".", "_"), 1
        while name in found:
            number += 1
            name = f"{student.name.replace('.', '_')}_{number}"
        found[name] = student
    return found


def named_student(name: str) -> dict[str, Any]:
    """Sizes and initialisation of a student of `conf/student`."""
    if not (composition.conf_folder() / "student" / f"{name}.yaml").is_file():
        known = tuple(sorted(path.stem for path in (composition.conf_folder() / "student").glob("*.yaml")))
        raise one_of(name, known, "cohort.students")
    student = composition.compose([f"student={name}"]).student
    return {key: student[key] for key in ("name", "layers", "width", "heads", "intermediate", "init")}
