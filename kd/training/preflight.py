"""Checks before training: common silent mistakes, detected within seconds."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from kd.build.instantiate import build_method
from kd.build.models import BuiltModels
from kd.config.cohort import students_of
from kd.data.datamodule import Epoch, KDDataModule
from kd.data.direction import higher_is_better
from kd.data.labels import given_labels
from kd.data.tasks import Regression
from kd.data.texts import count_shared
from kd.engines.base import Engine
from kd.errors import InputError, with_keys
from kd.forward import Needs
from kd.methods.base import Progress
from kd.models.compiled import uncompiled
from kd.results.evaluate import baseline
from kd.results.tables import score
from kd.runs.run import Run
from kd.system.files import readable_size
from kd.teacher_cache.cache import CacheUsed

TRIAL_EXAMPLES = 8
"""Number of examples of the trial batch."""
LOOK = 256
"""Number of validation examples on which a teacher without a run of its own is evaluated."""
BARELY = 0.1
"""Fraction of the gain from the constant prediction to a perfect one below which a teacher is flagged. Our choice."""
LOUD = 20
"""Times the labels' term above which another weighted term is flagged. Our choice: with the weights published for images
`hidden` of `fitnets` and `similarity` of `sp` are 24 to 200 times it on small students of MiniLM, which learnt little."""


@dataclass
class Report:
    """Results of the checks."""

    lines: list[str] = field(default_factory=list)
    warnings: int = 0

    def ok(self, text: str) -> None:
        """Add a check that passed."""
        self.lines.append(f"  ok    {text}")

    def warn(self, text: str) -> None:
        """Add a warning: the result is doubtful, but training goes on."""
        self.warnings += 1
        self.lines.append(f"  WARN  {text}")

    def note(self, text: str) -> None:
        """Add a remark."""
        self.lines.append(f"        {text}")


def preflight(run: Run, engine: Engine, data: KDDataModule, models: BuiltModels) -> Report:
    """Run every check and return the report.

    Raises:
        InputError: for settings that cannot work; doubtful ones are warnings in the report.
    """
    began = time.perf_counter()
    report = Report()
    check_data(report, data)
    check_held_part(report, run, engine, data)
    check_joint_teachers(report, run)
    check_teachers(report, run, engine, data)
    report_live(report, models, data)
    for student, learner in engine.learners.items():
        whose = "student" if len(engine.learners) == 1 else f"student {student}"
        report.note(f"{whose} starts from: {models.inits[student]}")
        for text in learner.student.asides:
            report.note(f"{whose}: {text}")
        for name, text in learner.method.describe().items():
            report.note(f"{name}: {with_keys(text, 'method', run.spec.method)}")
        if (why := learner.method.batch_dependence()) is not None:
            how = "accumulated" if learner.method.across_ranks else "split over ranks and accumulated"
            report.note(f"the result depends on how a batch is {how}: {with_keys(why, 'method', run.spec.method)}")
    check_students(report, engine)
    check_one_batch(report, engine, data)
    report.note(f"preflight took {time.perf_counter() - began:.1f} s; preflight=false skips it")
    return report


def check_data(report: Report, data: KDDataModule) -> None:
    """Check the data: sizes, text shared between splits, constant scores, tokenizers."""
    texts = data.examples.texts
    report.ok("examples: " + ", ".join(f"{split} {len(examples)}" for split, examples in texts.items()))
    for text in data.examples.edits:
        report.note(f"train was edited by {text}")
    for split in data.examples.evaluated:
        if shared := count_shared(texts[split], texts["train"]):
            report.warn(f"{shared} of {len(texts[split])} texts of '{split}' are also in train")
    task, scores = data.examples.task, given_labels(data.examples.labels["train"])
    if task.partly_labelled:
        report.ok(f"{len(scores)} examples of train have labels, {len(data.examples.labels['train']) - len(scores)} have none")
    if data.later is not None:
        report.note(data.later)
    if isinstance(task, Regression) and min(scores) == max(scores):
        report.warn(f"every training example has the score {scores[0]:g}: there is nothing to learn")
    if data.shared_tokenizer:
        report.ok("student and teachers read the same tokens" if data.teacher_keys else "one tokenizer")
    else:
        report.ok("tokenizers differ: each batch carries the text tokenised for each model")


def check_held_part(report: Report, run: Run, engine: Engine, data: KDDataModule) -> None:
    """Report the part of train that is held, and where the student may have learnt from it nevertheless."""
    if not data.held_count:
        return
    count = len(data.examples.texts["train"])
    beside = f"{data.held_size()} of them beside each batch"
    report.ok(f"held part of train: {data.held_count} of {count} examples are not trained on, {beside}")
    if spare := count - data.held_count - data.trained_count:
        report.ok(f"{spare} examples that edits made of the held part are not trained on")
    share = max(learner.method.holds for learner in engine.learners.values())
    before, student = run.inputs.before, run.spec.student
    if before is not None and build_method(before.spec.method)[0].holds < share:
        report.warn("the method's first run, from whose student this one starts, trained on the held part of train too")
    elif student.init in ("run", "checkpoint") and before is None:
        report.note("the weights that the student starts from may have been trained on the held part of train")
    elif student.copies_layers and student.init_from == "teacher":
        report.note("the student starts from layers of its teacher, which was trained on the held part of train too")


def check_steps(run: Run, epoch: Epoch) -> Report:
    """Check that the batches of an epoch divide into optimiser steps of `trainer.accumulate` batches."""
    report = Report()
    accumulate, batches = run.spec.trainer.accumulate, epoch.batches
    if accumulate > batches:
        report.warn(f"trainer.accumulate={accumulate}, but an epoch has {batches} batches: all of them are one optimiser step")
    elif left := batches % accumulate:
        report.note(f"the last optimiser step of an epoch is a mean over {left} of trainer.accumulate={accumulate} batches")
    return report


def check_joint_teachers(report: Report, run: Run) -> None:
    """Warn of teachers that are members of cohorts of the same students, but of several runs."""
    joint: dict[tuple[str, ...], set[str]] = {}
    for needed in run.inputs.teachers.values():
        if needed.chosen is not None:
            joint.setdefault(tuple(students_of(needed.spec)), set()).add(needed.digest)
    for names, digests in joint.items():
        if len(digests) > 1:
            report.warn(
                f"the teachers are members of {len(digests)} runs of {', '.join(names)}, not trained together: set the keys of "
                "`teacher.<name>.run` alike for all"
            )


def check_teachers(report: Report, run: Run, engine: Engine, data: KDDataModule) -> None:
    """Report the labels, which the build has matched by name, and check that each teacher beats a constant prediction."""
    task, name = engine.task, engine.task.monitor
    floor = baseline(task, data.examples.labels).get("validation")
    for index, teacher in enumerate(engine.teachers):
        if task.labels is not None:
            report.ok(f"labels of data and teacher '{teacher.name}' agree by name: {', '.join(task.labels)}")
        for text in (*teacher.shape.notes, *teacher.shape.asides):
            report.note(f"teacher '{teacher.name}': {text}")
        if floor is None:
            continue
        value = teacher_score(run, engine, data, index, name)
        chance = floor[name] or 0.0
        who = "the mean of the scores" if task.labels is None else "the majority class"
        words = f"teacher '{teacher.name}' {name} {score(name, value)} on validation, {who} has {score(name, chance)}"
        gain = 0.0 if value is None else gained(value, chance, name)
        if gain > BARELY:
            report.ok(words)
        else:
            report.warn(f"{words}: it has {'little' if gain > 0 else 'nothing'} to teach")


def gained(value: float, chance: float, metric: str) -> float:
    """Return a metric's gain as a fraction, 0 for a constant prediction and 1 for a perfect one; negative below the former.

    >>> gained(0.75, 0.5, "accuracy"), gained(2.0, 1.0, "mse")
    (0.5, -1.0)
    """
    largest = (1.0 if higher_is_better(metric) else 0.0) - chance
    return (value - chance) / largest if largest else 0.0


def teacher_score(run: Run, engine: Engine, data: KDDataModule, index: int, metric: str) -> float | None:
    """Return a teacher's validation metric: from the record of its run, or else computed on `LOOK` examples."""
    teacher = engine.teachers[index]
    teacher_run = run.inputs.teachers.get(teacher.name)
    if teacher_run is not None and (metrics := teacher_run.metrics) is not None:
        return metrics["validation"][metric]
    rows = data.rows("validation", LOOK)
    meter = engine.task.metric(metric, across_ranks=False)  # only rank 0 executes this
    with uncounted(engine):
        for start in range(0, len(rows), 32):
            batch = data.collate("validation")(rows[start : start + 32])
            logits = teacher(batch.teachers[index], Needs()).logits
            engine.task.score({metric: meter}, logits, batch.labels)
    return float(meter.compute())


@contextlib.contextmanager
def uncounted(engine: Engine) -> Iterator[None]:
    """Restore random state, gradients, method state, train mode and counters on exit, so that the run is not affected."""
    methods = [learner.method for learner in engine.learners.values()]
    states = [{name: tensor.clone() for name, tensor in method.state_dict().items()} for method in methods]
    counts, training = [teacher.work for teacher in engine.teachers], engine.training
    models = [
        *(learner.student for learner in engine.learners.values()),
        *(frozen.shape for frozen in (*engine.teachers, *engine.aids.values())),
    ]
    with torch.random.fork_rng(), uncompiled(*models):
        try:
            yield
        finally:
            for method, state in zip(methods, states, strict=True):
                method.load_state_dict(state)
            engine.zero_grad(set_to_none=True)
            engine.train(training)
            for teacher, count in zip(engine.teachers, counts, strict=True):
                teacher.work = count


def report_live(report: Report, models: BuiltModels, data: KDDataModule) -> None:
    """Report of which examples a teacher's outputs are cached, where these are not all."""
    for name, cache in models.caches.items():
        if isinstance(cache, CacheUsed) and cache.live:
            counts = {split: len(data.examples.texts[split]) for split in cache.live}
            cached = ", ".join(f"{n - cache.live[split]:,} of {n:,} examples of {split}" for split, n in counts.items())
            when = "at each step" if "train" in cache.live else "when they are evaluated"
            report.note(f"teacher {name}: {cached} cached in {readable_size(cache.bytes)}, the others run {when}")


def check_students(report: Report, engine: Engine) -> None:
    """Warn if two students start with the same weights: they have little to learn from each other."""
    states = {name: learner.student.state_dict() for name, learner in engine.learners.items()}
    for (one, left), (other, right) in itertools.combinations(states.items(), 2):
        if left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left):
            report.warn(
                f"students {one} and {other} start from the same weights, heads included: only dropout distinguishes them"
            )


def check_one_batch(report: Report, engine: Engine, data: KDDataModule) -> None:
    """Run one batch forward and backward.

    Raises:
        InputError: if a trainable parameter gets no gradient, a teacher gets one or is not in eval mode, or a term is not a
            finite scalar.
    """
    batch = data.trial(TRIAL_EXAMPLES)
    with uncounted(engine):
        engine.train()
        loss = engine.loss(batch)
        for name, term in loss.terms.items():
            if term.ndim or not torch.isfinite(term):
                raise InputError(f"the term '{name}' is {term.tolist()} on the first batch", "method.weights")
        loss.total.backward()
        idle = [name for name, parameter in engine.named_parameters() if parameter.requires_grad and parameter.grad is None]
        if idle:
            raise InputError(f"{len(idle)} trainable parameters get no gradient, the first is {idle[0]}", "method")
        frozen = {
            **{f"teacher.{teacher.name}": teacher for teacher in engine.teachers},
            **{f"method.aids.{name}": aid for name, aid in engine.aids.items()},
        }
        for key, model in frozen.items():
            if model.encoder.training:
                raise InputError(f"{key} is not in eval mode", key)
            if any(parameter.grad is not None for parameter in model.encoder.parameters()):
                raise InputError(f"{key} gets gradients", key)
        shares = {name: engine.weight_of(name, Progress()) * float(term.detach()) for name, term in loss.terms.items()}
    report.ok("one batch: every trainable parameter gets a gradient; teachers are frozen and in eval mode")
    report.note("weighted terms at the start: " + ", ".join(f"{name} {value:.4g}" for name, value in shares.items()))
    check_shares(report, shares)


def check_shares(report: Report, shares: Mapping[str, float]) -> None:
    """Warn of weighted terms beside which that of the labels is small.

    Args:
        report: takes the warnings.
        shares: logged name of a term -> its weighted value on the first batch.
    """
    for name, value in shares.items():
        student, _, term = name.rpartition("/")
        labels = shares.get(f"{student}/task" if student else "task", 0.0)
        if labels > 0 and value > LOUD * labels:
            report.warn(
                f"the term '{name}' is {value / labels:.0f} times that of the labels at the start, and may drown it; a smaller "
                f"method.weights.{term} turns it down"
            )
