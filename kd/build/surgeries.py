"""Surgeries of a run's student, and the check that it shares its teachers' vocabulary where a method needs that."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from transformers import PretrainedConfig

from kd.build.instantiate import instantiate, option_names
from kd.config.schema import RunSpec
from kd.config.values import has, locate
from kd.data.datamodule import MOST_BEFORE
from kd.data.masked_lm.tokenized import OTHER_VOCABULARY
from kd.data.tasks import Task
from kd.data.tokenized import tokenizer_fingerprint
from kd.errors import InputError, prefix_error_keys
from kd.methods.base import Method
from kd.models import Encoder, FrozenTeacher
from kd.models.heads import HEADS
from kd.models.surgery.embeddings import Surgery, SurgeryInputs
from kd.runs.run import Run
from kd.system import distributed


def surgery_class(name: str, node: Mapping[str, Any]) -> type[Surgery]:
    """Return the class of a surgery.

    Raises:
        InputError: if it does not exist, or is not a surgery.
    """
    fits, expected = has("changes_vocabulary", "shape", "__call__"), "a surgery, with `changes_vocabulary` and `shape`"
    found: type[Surgery] = locate(node, f"surgery.{name}", fits, expected)
    return found


def surgeries(spec: RunSpec) -> dict[str, Surgery]:
    """Return name -> surgery, in the order in which they are applied."""
    instances = {}
    for name, node in spec.surgery.items():
        options = {key: value for key, value in node.items() if key != "run"}
        instances[name] = instantiate(surgery_class(name, node), options, f"surgery.{name}")
    return instances


def prefix_surgery_errors(spec: RunSpec, name: str) -> AbstractContextManager[None]:
    """Let errors of a surgery name the keys of its options; see `kd.errors.prefix_error_keys`."""
    node = spec.surgery[name]
    return prefix_error_keys(f"surgery.{name}", option_names(surgery_class(name, node), node))


def config_after(spec: RunSpec, config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration that a student has after the surgeries of a run; vocabularies are left as they are.

    Args:
        spec: specification of the run.
        config: configuration of the student before them.

    Raises:
        InputError: for a surgery that cannot be applied to this student.
    """
    for name, surgery in surgeries(spec).items():
        if hasattr(surgery, "config"):
            with prefix_surgery_errors(spec, name):
                config = surgery.config(config)
    return config


def deepening(spec: RunSpec) -> dict[str, dict[str, Any]]:
    """Return the configuration nodes of the surgeries of a run that change a student's configuration, by name."""
    changing = {name for name, surgery in surgeries(spec).items() if hasattr(surgery, "config")}
    return {
        name: {key: value for key, value in node.items() if key != "run"}
        for name, node in spec.surgery.items()
        if name in changing
    }


def surgery_shapes(run: Run, student: Encoder) -> Encoder:
    """Return the shape that a student has after the surgeries of a run, as far as it does not depend on the training texts.

    Args:
        run: the run whose configuration lists the surgeries.
        student: the student on the meta device.

    Raises:
        InputError: for a surgery that cannot be applied to this student.
    """
    for name, surgery in surgeries(run.spec).items():
        with prefix_surgery_errors(run.spec, name):
            student = surgery.shape(student)
    return student


def apply_surgeries(run: Run, student: Encoder, texts: Sequence[str]) -> tuple[Encoder, list[str]]:
    """Apply the surgeries of a run; return the resulting student and a description of each change.

    Args:
        run: the run whose configuration lists the surgeries.
        student: the initialised student.
        texts: the training texts.

    Raises:
        InputError: for a surgery that cannot be applied to this student.
    """
    descriptions = []
    for name, surgery in surgeries(run.spec).items():
        needed = run.inputs.surgeries.get(name)
        if surgery.changes_vocabulary and len(texts) > MOST_BEFORE:
            distributed.print_rank_zero(f"  surgery '{name}' reads all {len(texts):,} texts of train")
        with prefix_surgery_errors(run.spec, name):
            student, description = surgery(student, SurgeryInputs(texts, None if needed is None else needed.student))
        descriptions += [description] if description else []
    return student, descriptions


def vocabulary_key(run: Run) -> str | None:
    """Return the key that gives a student another vocabulary, judged by the configuration alone; None if none does."""
    for name, node in run.spec.surgery.items():
        if surgery_class(name, node).changes_vocabulary:
            return "surgery"
    stage = run.inputs.init
    return "student.run" if stage is not None and vocabulary_key(stage) is not None else None


def vocabulary_cure(key: str | None, otherwise: str) -> str:
    """Return what to do about another vocabulary, by the key that gives it to the student; `otherwise` if none does."""
    return {"surgery": "use surgery=[]", "student.run": "begin from another run"}.get(key or "", otherwise)


def check_aid_vocabularies(run: Run, student: Encoder, aids: Mapping[str, FrozenTeacher]) -> None:
    """Check that the aids of a method read the student's tokens.

    Raises:
        InputError: for an aid with another vocabulary than the student's.
    """
    own, key = tokenizer_fingerprint(student.tokenizer), vocabulary_key(run)
    for name, aid in aids.items():
        if key is None and tokenizer_fingerprint(aid.tokenizer) == own:
            continue
        cure = vocabulary_cure(key, f"give the student and method.aids.{name} one backbone")
        raise InputError(
            f"method={run.spec.method['name']} runs the aid '{name}' on the student's tokens, but the student has another "
            f"vocabulary; {cure}",
            key or f"method.aids.{name}",
        )


def check_vocabularies(
    run: Run, task: Task, method: Method, student: Encoder, teachers: Sequence[Encoder], backbone_key: str = "student.backbone"
) -> None:
    """Check that student and teachers share a vocabulary if they are compared token by token.

    Args:
        run: the run.
        task: its task.
        method: the student's method, bound.
        student: the student.
        teachers: models of the teachers.
        backbone_key: configuration key of the student's backbone, which an error names unless a surgery changes the vocabulary.

    Raises:
        InputError: for a method that reads token-level tensors of a teacher with another vocabulary, or a masked language
            model with a teacher that has another vocabulary.
    """
    own, key = tokenizer_fingerprint(student.tokenizer), vocabulary_key(run)
    for teacher, needs in zip(teachers, method.needs()[1], strict=True):
        if key is None and tokenizer_fingerprint(teacher.tokenizer) == own:
            continue
        if not HEADS[task.head].labelled:
            raise InputError(OTHER_VOCABULARY, key or backbone_key)
        if needs.tokens or method.same_vocabulary:
            cure = vocabulary_cure(key, "give the student the teacher's backbone")
            why = f"compares the student and its teacher token by token ({needs})" if needs.tokens else "needs one vocabulary"
            raise InputError(
                f"method={run.spec.method['name']} {why}, but "
                f"the student has a vocabulary of its own, so its tokens are others than the teacher's; {cure}, or take a "
                "method that reads only logits or [CLS] states",
                key or backbone_key,
            )
