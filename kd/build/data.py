"""Examples, tasks and data modules of a run."""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.build.models import Models
from kd.config.schema import RunSpec
from kd.data.datamodule import KDDataModule
from kd.data.examples import Examples, load_examples
from kd.data.masked_lm.datamodule import MaskedLMDataModule
from kd.errors import InputError
from kd.methods.base import needs_of_teachers
from kd.runs.digest import digest_of
from kd.runs.identity import source_of
from kd.runs.run import Run
from kd.system import distributed
from kd.teacher_cache.cache import cached_or_live

DATA: Mapping[str, type[KDDataModule]] = {"classifier": KDDataModule, "masked_lm": MaskedLMDataModule}
"""Head of `kd.models.heads.HEADS` -> the data module of its tasks."""


_examples: weakref.WeakValueDictionary[str, Examples] = weakref.WeakValueDictionary()
"""Digest of task and data -> examples in use: a run and the runs that train its teachers share them."""


def build_examples(run: Run) -> Examples:
    """Read and check the task's texts and labels; runs of this process that need the same ones at the same time share them."""
    digest = digest_of({part: run.digest_inputs[part] for part in ("task", "data")})
    examples = _examples.get(digest)
    if examples is None:
        examples = _examples[digest] = load_examples(run.spec.task, source_of(run.spec))
    return examples


def build_data(run: Run, examples: Examples, models: Models) -> KDDataModule:
    """Return the data module, and replace teachers that can be cached in `models.teachers` by their caches."""
    spec = run.spec
    data = DATA[examples.task.head](
        examples,
        [student.tokenizer for student in models.students.values()],
        [teacher.tokenizer for teacher in models.teaching],
        batch_size=spec.trainer.batch_size,
        eval_batch_size=spec.trainer.eval_batch_size,
        max_length=checked_length(spec, models),
        seed=spec.seed,
        workers=spec.trainer.num_workers,
        rank=distributed.rank(),
        world=distributed.world(),
        pad_multiple=spec.trainer.pad_multiple,
        batch_tokens=spec.trainer.batch_tokens,
        store=Path(spec.paths.runs).expanduser() / ".tokens",
        accumulate=spec.trainer.accumulate,
    )
    taught = [method for method in models.methods.values() if method.uses_teachers]
    wanted = needs_of_teachers(taught, len(models.teachers))
    for index, (teacher, needs) in enumerate(zip(models.teachers, wanted, strict=True)):
        replaced = cached_or_live(run, data, index, teacher, needs if taught else None)
        models.teachers[index], models.caches[teacher.name] = replaced
    return data


def checked_length(spec: RunSpec, models: Models) -> int:
    """Return `task.max_length` after a check that every model has that many positions.

    Raises:
        InputError: if a model has fewer, or the length is less than 3.
    """
    for encoder in (*models.students.values(), *models.teaching):
        # RoBERTa and MPNet number positions from the padding index plus one.
        table: Any = encoder.base.get_submodule("embeddings.position_embeddings")
        room = encoder.config.max_position_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
        if not 2 < spec.task.max_length <= room:
            raise InputError(
                f"task.max_length={spec.task.max_length} must be from 3 to {room}, the positions of the model",
                "task.max_length",
            )
    return spec.task.max_length
