"""Examples, data module and teacher caches of a run."""

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd.build.edits import build_edits
from kd.build.instantiate import learns_from_labels_alone, method_of
from kd.build.models import BuiltModels
from kd.config.schema import RunSpec, cache_limit, padding_multiple
from kd.data.datamodule import KDDataModule
from kd.data.examples import Examples, load_examples
from kd.data.held import cut
from kd.data.labels import has_label
from kd.data.masked_lm.datamodule import MaskedLMDataModule
from kd.engines.models import Models
from kd.errors import InputError, prefix_error_keys
from kd.methods.base import needs_of_teachers
from kd.runs.digest import digest_of
from kd.runs.edits import models_of_edits, unlabelled_sources
from kd.runs.identity import prefix_task_errors, source_of
from kd.runs.inputs import teacher_source
from kd.runs.run import Run
from kd.system import distributed
from kd.system.model_sources import fingerprint, hub_commit
from kd.teacher_cache.cache import TeacherCache
from kd.teacher_cache.precompute import logits_over

DATA: Mapping[str, type[KDDataModule]] = {"classifier": KDDataModule, "masked_lm": MaskedLMDataModule}
"""Head of `kd.models.heads.HEADS` -> the data module of its tasks."""


_examples: weakref.WeakValueDictionary[str, Examples] = weakref.WeakValueDictionary()
"""Digest of task and data -> examples in use: a run and the runs that train its teachers share them."""


def build_examples(run: Run, *, planned: bool = False) -> Examples:
    """Read and check the task's texts and labels; runs of this process that need the same ones at the same time share them.

    Args:
        run: the run; every rank has to call this.
        planned: leave out the edits that read a model, which may not be trained yet.

    Raises:
        InputError: for an error in the data, in the configuration of the task, or in an edit.
    """
    digest = examples_digest(run, planned=planned)
    examples = _examples.get(digest)
    if not all(distributed.gather(examples is not None)):  # ranks read together, or none does
        source = source_of(run.spec.task)
        edits = build_edits(run.spec.task, None if planned else run)
        with prefix_task_errors():
            alone = leaves_out_unlabelled(run)
            examples = _examples[digest] = load_examples(run.spec.task, source, edits, store_of(run), labelled_alone=alone)
    assert examples is not None
    return examples


def leaves_out_unlabelled(run: Run) -> bool:
    """Return whether a task has training examples without labels and the run leaves them out: it learns from labels alone.

    So fine-tuning is a baseline of methods that learn from these too, with the same task.
    """
    return bool(unlabelled_sources(run.spec.task)) and learns_from_labels_alone(method_of(run.spec)[1])


def store_of(run: Run) -> Path:
    """Return the folder of tokenised texts, and of texts without labels, that runs share."""
    return Path(run.spec.paths.runs).expanduser() / ".tokens"


def examples_digest(run: Run, *, planned: bool = False) -> str:
    """Return a digest of everything that determines the examples; arguments as for `build_examples`."""
    identified: dict[str, Any] = {part: run.digest_inputs[part] for part in ("task", "data")}
    if leaves_out_unlabelled(run):
        identified["labelled_alone"] = True
    if models_of_edits(run.spec.task):
        models = {name: needed.digest for name, needed in run.inputs.edits.items()}
        identified["edits"] = {"planned": planned, "models": models}
    return digest_of(identified)


def build_data(run: Run, examples: Examples, models: BuiltModels) -> tuple[KDDataModule, BuiltModels]:
    """Return the data module, and the models with cached teachers in place of those that can be cached.

    Raises:
        InputError: if a model has too few positions, a teacher cannot be loaded, or the disk has no room for its cache.
    """
    spec = run.spec
    with prefix_held_errors(spec):
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
            pad_multiple=padding_multiple(spec.trainer),
            batch_tokens=spec.trainer.batch_tokens,
            store=store_of(run),
            accumulate=spec.trainer.accumulate,
            holds=share_held(models),
            of=run.member,
        )
    taught = [method for method in models.methods.values() if method.uses_teachers]
    wanted = needs_of_teachers(taught, len(models.teachers))
    teachers, caches = [], {}
    for index, (teacher, needs) in enumerate(zip(models.teachers, wanted, strict=True)):
        tokens = {split: by_tokenizer[data.teacher_keys[index]] for split, by_tokenizer in data.tokens.items()}
        cache, wanted_needs = teacher_cache(run, teacher.name), needs if taught else None
        result = cache.cached_or_live(teacher, tokens, wanted_needs, data.changes, data.later)
        data.use_cached(index, result.outputs)
        teachers.append(result.teacher)
        caches[teacher.name] = result.record
    return data, replace(models, teachers=teachers, caches=caches)


def prefit_methods(run: Run, data: KDDataModule, models: BuiltModels) -> None:
    """Call `Method.prefit` of the methods that ask for it, with the teachers' logits over the examples that are trained on.

    Args:
        run: the run.
        data: its data, with the outputs of cached teachers.
        models: its models; a teacher is run once over the examples of train that are not cached.
    """
    asking = [method for method in models.methods.values() if method.prefits]
    if not asking:
        return
    rows = data.trained.tolist()
    device = distributed.device(run.spec.trainer.accelerator)
    logits = []
    for index, teacher in enumerate(models.teachers):
        outputs = data.tokens["train"].get(f"teacher {index}")
        tokens = data.tokens["train"][data.teacher_keys[index]]
        parts, cached = [], 0
        if outputs is not None:
            cached = outputs.cached
            read = outputs.store.read(("logits",), range(cached))["logits"]
            parts.append(read if teacher.columns is None else read[:, teacher.columns])
        if cached < len(tokens):
            parts.append(logits_over(teacher, tokens, run.spec.trainer.precision, device, cached))
        logits.append(torch.cat(parts)[rows])
    labels = data.examples.labels["train"]
    for method in asking:
        method.prefit(logits, data.examples.task.label_tensor([labels[row] for row in rows]))


def share_held(models: Models) -> float:
    """Return the share of train that the methods of a run hold (`Method.holds`).

    Raises:
        InputError: if the students of a cohort hold different shares: they are trained on the same batches.
    """
    shares = {name: method.holds for name, method in models.methods.items()}
    if len(set(shares.values())) > 1:
        shown = ", ".join(f"{name} {share}" for name, share in shares.items())
        raise InputError(f"students that are trained together hold one part of train, these hold {shown}", "cohort.students")
    return next(iter(shares.values()))


@contextlib.contextmanager
def prefix_held_errors(spec: RunSpec) -> Iterator[None]:
    """Let errors about the held part of train name the method's option `holds`; the method itself if it has no such option."""
    try:
        yield
    except InputError as error:
        if error.key == "holds" and "holds" not in spec.method:
            raise InputError(error.message, "method") from error
        if error.key == "holds":
            with prefix_error_keys("method", {"holds"}):
                raise
        raise


def check_held(run: Run, examples: Examples, models: Models) -> None:
    """Check that a method which holds a part of train leaves examples, and classes, on the other side.

    Raises:
        InputError: if it does not, if the share is out of range, or if the students of a cohort hold different shares.
    """
    share = share_held(models)
    if share == 0:
        return
    with prefix_held_errors(run.spec):
        trained = cut(examples, share, ranks=distributed.world()).trained
        labels = examples.labels["train"]
        try:
            examples.task.check_labels([labels[row] for row in np.flatnonzero(trained & has_label(labels)).tolist()])
        except InputError as error:
            raise InputError(f"without the held part of train, {error.message}", "holds") from error


def teacher_cache(run: Run, name: str) -> TeacherCache:
    """Return the cache of a frozen teacher: in its run, or in `.teachers` beside the runs if no run trained it."""
    trainer, teacher_run = run.spec.trainer, run.inputs.teachers.get(name)
    weights = None if cache_limit(run.spec.cache) == 0 else weights_of(run, name)  # identifying them reads their files
    beside = Path(run.spec.paths.runs).expanduser() / ".teachers" / digest_of({"weights": weights})
    return TeacherCache(
        folder=beside if teacher_run is None else teacher_run.cache,
        weights=weights,
        precision=trainer.precision,
        setting=run.spec.cache,
        device=distributed.device(trainer.accelerator),
        task=run.spec.task.name,
    )


def weights_of(run: Run, name: str) -> str | None:
    """Return an identifier of a teacher's weights; for a hub model with the loaded commit, or None if that is unknown."""
    source, key = teacher_source(run, name)
    if not source.startswith("hf:"):
        return fingerprint(source, key)
    commit = hub_commit(source)
    return None if commit is None else f"{source}@{commit}"


def checked_length(spec: RunSpec, models: Models) -> int:
    """Return `task.max_length` after a check that every model has that many positions.

    Raises:
        InputError: if a model has fewer, or the length is less than 3.
    """
    for encoder in (*models.students.values(), *models.teaching, *(aid.shape for aid in models.aids.values())):
        room = encoder.positions
        if not 2 < spec.task.max_length <= room:
            raise InputError(
                f"task.max_length={spec.task.max_length} must be from 3 to {room}, the positions of the model",
                "task.max_length",
            )
    return spec.task.max_length
