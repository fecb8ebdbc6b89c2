"""Cohorts: the students that are trained together in one run."""

import re
from dataclasses import asdict, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd.config import compose as composition
from kd.config.nodes import nested
from kd.config.schema import RunSpec, StudentSpec, check_student
from kd.config.values import shown, word
from kd.errors import InputError, one_of


def check_cohort(spec: RunSpec) -> None:
    """Check that a cohort can be trained.

    Raises:
        InputError: if the number of students does not fit the cohort, or a teacher cannot be trained together with them.
    """
    cohort = spec.cohort
    count = len(students_of(spec))
    if cohort.share is not None:
        word(cohort.share, SHARES, "cohort.share")
    together = cohort.peers is not None or cohort.share is not None
    if together and count < 2:
        cause = f"cohort={cohort.name}" if cohort.share is None else f"cohort.share={cohort.share}, of cohort={cohort.name},"
        raise InputError(
            f"{cause} needs two students or more, cohort.students={cohort.students} has {count}", "cohort.students"
        )
    if not together and count > 1:
        cure = "several students need cohort=mutual, or cohort=joint, which sets cohort.share"
        raise InputError(f"cohort={cohort.name} without peers takes one student, not {count}; {cure}", "cohort")
    if count > 1 and spec.method.get("before"):
        raise InputError(
            f"method={spec.method['name']} starts with another run, for one student; use cohort=single, or leave that run "
            "out with method.before=null",
            "cohort",
        )
    if cohort.teacher not in ("frozen", "online"):
        raise one_of(cohort.teacher, ("frozen", "online"), "cohort.teacher")
    if cohort.teacher == "online":
        backbones = [teacher.backbone for teacher in spec.teacher.values()]
        if cohort.peers is None or len(backbones) != 1 or backbones[0] is None:
            raise InputError(
                "a teacher is trained online together with two students or more (cohort=mutual), and starts from a backbone: "
                "teacher=[minilm]",
                "cohort.teacher",
            )
        if any(student.init_from == "teacher" for student in students_of(spec).values()):
            raise InputError(
                "students cannot start from a teacher that is trained with them; use student.init_from=pretrained",
                "student.init_from",
            )
        ((name, teacher),) = spec.teacher.items()
        begins = nested(teacher.run, "student.init") or "first"
        if begins in WHOLE_MODEL_INITS or teacher.run.get("surgery"):
            raise InputError(
                f"a teacher that is trained online starts from layers of its backbone or at random, not from a {begins}",
                f"teacher.{name}.run.student.init",
            )


def alone(spec: RunSpec) -> RunSpec:
    """Return a specification whose only student, if it is an entry of `cohort.students`, is `student`."""
    students = list(students_of(spec).values())
    return replace(spec, student=students[0], cohort=replace(spec.cohort, students=1)) if len(students) == 1 else spec


PEERS = "mutual"
"""Name of the loss term that peers add."""

RESERVED = ("teacher", "ensemble")
"""Names that no student may have, because logs and results use them for something else."""

SHARED_HEAD = "head"
"""Value of `cohort.share` that ties the layers behind the blocks of all students."""

SHARES = (SHARED_HEAD, "none")

IDENTIFIED = ("name", "layers", "width", "heads", "intermediate", "init", "init_from", "dropout")
VARIED = (*IDENTIFIED, "backbone")
"""Keys of a student that may differ in a cohort. Of a backbone, its weights enter the digest and not its path."""


def cohort_identity(spec: RunSpec) -> dict[str, Any]:
    """Return the settings of a cohort that enter a run's digest, backbones aside; an empty mapping for one student."""
    students = [{key: getattr(student, key) for key in IDENTIFIED} for student in students_of(spec).values()]
    if spec.cohort.peers is None and len(students) == 1:
        return {}
    cohort = asdict(spec.cohort)
    if cohort["share"] != SHARED_HEAD:  # so that cohorts of before have the digests of before
        del cohort["share"]
    return {**cohort, "students": students}


MOST_STUDENTS = 64
"""Largest number of students of a cohort; a run holds all of them in memory."""


def students_of(spec: RunSpec) -> dict[str, StudentSpec]:
    """Return name -> student, for every student of the cohort; the first student uses the run's seed.

    `cohort.students` is a number of identical students, or a list with one entry per student: the name of a file in
    `conf/student`, or a mapping of keys that override those of `student`.

    Raises:
        InputError: if it is neither, or has no entries or too many.
    """
    given = spec.cohort.students
    count = len(given) if isinstance(given, list) else given
    if isinstance(count, int) and not isinstance(count, bool) and count > MOST_STUDENTS:
        raise InputError(f"cohort.students: {shown(count)} students are more than {MOST_STUDENTS}", "cohort.students")
    if isinstance(given, int) and not isinstance(given, bool):
        entries: list[Any] = [{}] * given
    elif isinstance(given, list):
        entries = given
    else:
        meant = f": {composition.as_list(given, 'cohort.students')}" if isinstance(given, str) else ""
        raise InputError(f"cohort.students={shown(given)} is neither a number nor a list of students{meant}", "cohort.students")
    if not entries:
        raise InputError(f"cohort.students={given} leaves no student to train", "cohort.students")
    students: dict[str, StudentSpec] = {}
    for entry in entries:
        changes = named_student(entry, spec.student) if isinstance(entry, str) else entry
        student = varied(spec.student, entry, changes)
        if student.init_from == "auto" and len(entries) > 1:  # students that learn together begin alike
            student = replace(student, init_from="pretrained")
        name, number = student.name.replace(".", "_"), 1
        while name in students:
            number += 1
            name = f"{student.name.replace('.', '_')}_{number}"
        students[name] = student
    return students


WHOLE_MODEL_INITS = ("run", "checkpoint")
"""Initialisations that copy a whole model, so that the student must have its shape."""


def varied(student: StudentSpec, entry: object, changes: object) -> StudentSpec:
    """Return a copy of a student with some keys changed.

    Raises:
        InputError: for a key or a value that a student of a cohort cannot have.
    """
    if not isinstance(changes, dict) or not set(changes) <= set(VARIED):
        raise InputError(
            f"cohort.students: '{entry}' is neither a name of conf/student nor a mapping of {', '.join(VARIED)}",
            "cohort.students",
        )
    merged = merged_student(student, entry, changes) if changes else replace(student)
    check_cohort_student(merged, entry)
    if not isinstance(merged.name, str) or not re.fullmatch(r"[\w-][\w.-]*", merged.name) or merged.name in RESERVED:
        raise InputError(
            f"cohort.students: the name '{merged.name}' becomes a folder's name: use letters, digits, '.', '_', '-', and not "
            f"{' or '.join(RESERVED)}",
            "cohort.students",
        )
    if merged.init in WHOLE_MODEL_INITS and merged.init != student.init:
        raise InputError(f"cohort.students: init={merged.init} is set for all students, by student.init", "cohort.students")
    if changes and student.init in WHOLE_MODEL_INITS:
        raise InputError(f"students from one {student.init} have to be equal: use cohort.students=2", "cohort.students")
    return merged


def merged_student(student: StudentSpec, entry: object, changes: dict[str, Any]) -> StudentSpec:
    """Return a copy of a student with values, which OmegaConf converts to the types of their keys.

    Raises:
        InputError: for a value that has another type.
    """
    try:
        base = OmegaConf.structured(student)
        OmegaConf.set_readonly(base, False)  # which it is because the dataclass is frozen
        merged = OmegaConf.to_object(OmegaConf.merge(base, changes))
    except OmegaConfBaseException as error:
        raise InputError(f"cohort.students: '{entry}': {str(error).splitlines()[0]}", "cohort.students") from error
    assert isinstance(merged, StudentSpec)
    return merged


def check_cohort_student(student: StudentSpec, entry: object) -> None:
    """Check the numeric settings of a student of a cohort.

    Raises:
        InputError: for a value out of range.
    """
    try:
        check_student(student)
    except InputError as error:
        raise InputError(f"cohort.students: '{shown(entry)}': {error.message}", "cohort.students") from error


SHAPES = ("layers", "width", "heads", "intermediate", "backbone")
"""Keys of a student that decide of which shape and vocabulary its model is."""


def are_alike(spec: RunSpec) -> bool:
    """Return whether all students of a cohort have one shape and one backbone."""
    return len({tuple(getattr(student, key) for key in SHAPES) for student in students_of(spec).values()}) == 1


def backbone_of_entry(students: object, name: str | None) -> str | None:
    """Return the backbone of the entry of `cohort.students` with this name; None if it has none of its own."""
    entries = students if isinstance(students, list) else []
    own = [entry.get("backbone") for entry in entries if isinstance(entry, dict) and entry.get("name") == name]
    return str(own[0]) if own and own[0] is not None else None


def known_student(name: str) -> bool:
    """Return whether `conf/student` has a file of this name."""
    return (composition.conf_folder() / "student" / f"{name}.yaml").is_file()


def named_student(name: str, base: StudentSpec) -> dict[str, Any]:
    """Return the sizes of a student in `conf/student`, and its initialisation unless the command sets `student.init`."""
    if not known_student(name):
        available = tuple(sorted(path.stem for path in (composition.conf_folder() / "student").glob("*.yaml")))
        raise one_of(name, available, "cohort.students")
    student = student_file(name)
    sizes = {key: student[key] for key in ("name", "layers", "width", "heads", "intermediate")}
    own_init = known_student(base.name) and student_file(base.name).init == base.init  # otherwise the command sets it
    return {**sizes, "init": student.init} if own_init else sizes


def student_file(name: str) -> DictConfig:
    """Return the keys of a student in `conf/student`, over those of `conf/base/student.yaml`, as its defaults list says."""
    folder = composition.conf_folder()
    base, own = (OmegaConf.load(folder / file) for file in ("base/student.yaml", f"student/{name}.yaml"))
    merged = OmegaConf.merge(base, own)
    assert isinstance(merged, DictConfig)
    return merged
