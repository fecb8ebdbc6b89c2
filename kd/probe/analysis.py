"""Analysis of finished runs: a student beside its teacher and its control, for each task, student, teacher and seed."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from kd.errors import InputError
from kd.models import FrozenTeacher
from kd.probe.ablation import Ablation, ablated_logits, ablation_of
from kd.probe.attention import attention_similarity
from kd.probe.control import control_command, controls_beside
from kd.probe.differences import differences
from kd.probe.models import LOADED, load, shape_of
from kd.probe.outputs import logits_of, same_tokens, vectors_of
from kd.probe.representations import Probed, alignment_of, probes_of
from kd.probe.result import PARTS, About, Case, Settings
from kd.probe.subjects import Chosen, Subject, check_scores, choose, stored_predictions
from kd.results.comparison import BASELINE
from kd.results.finished import KEY, Finished, ModelSource, finished_tasks, student_source, teacher_source
from kd.results.tables import differences as differences_of
from kd.results.tables import grouped
from kd.runs.digest import digest_of

T = TypeVar("T")


class Analysis:
    """Analysis of finished runs; what is computed of a model is kept for the other runs that it stands beside.

    Args:
        settings: the settings.
        teacher: a run whose student takes the place of every run's own teacher; None for these.
        progress: function that is called with the words of each case before it is computed.
    """

    def __init__(
        self,
        settings: Settings,
        teacher: Sequence[Finished] | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self.progress = progress
        self.given = teacher
        self.told: dict[int, str] = {}
        """Settings in which the record of a run, by its identity, differs from others of its task, method and models."""
        self._kept: dict[tuple[Any, ...], Any] = {}
        self._vectors: OrderedDict[tuple[Any, ...], list[torch.Tensor]] = OrderedDict()
        """Vectors of the models that were used last: those of many runs would not fit into memory."""

    def once(self, key: tuple[Any, ...], compute: Callable[[], T]) -> T:
        """Return what was computed under a key, or compute it."""
        if key not in self._kept:
            self._kept[key] = compute()
        found: T = self._kept[key]
        return found

    def cases(self, runs: Sequence[Finished]) -> list[Case]:
        """Return the case of each student and teacher of each run.

        Raises:
            InputError: for a run without a teacher or without the split, or one whose files do not fit together.
        """
        checked = [(run, self.chosen(run), self.teachers(run)) for run in runs]  # before anything is computed
        groups = grouped([run.record for run in runs])
        self.told = {id(record): words for group, words in zip(groups, differences_of(groups), strict=True) for record in group}
        cases = [
            (run, student, teacher, chosen)
            for run, chosen, teachers in checked
            for student in run.students
            for teacher in teachers
        ]
        found = []
        for number, case in enumerate(cases, start=1):
            run, student, teacher, _ = case
            words = [run.name, *([run.task.name] if run.member else []), *([student] if len(run.students) > 1 else []), teacher]
            self.progress(f"{number} of {len(cases)}: {', '.join(filter(None, words))}")
            found.append(self.case(*case))
        return found

    def teachers(self, run: Finished) -> list[str]:
        """Return the names of the teachers that a run is compared with.

        Raises:
            InputError: if there are none, or the given run has other tasks.
        """
        if self.given is not None:
            if self.given_for(run) is None:
                names = ", ".join(one.task.name for one in self.given)
                raise InputError(f"the run {run.name} is of the task {run.task.name}, --teacher of {names}", "--teacher")
            return [""]
        if not run.teachers:
            raise InputError(
                f"the run {run.name} has no teacher to compare its student with; --teacher names another finished run", KEY
            )
        return run.teachers

    def given_for(self, run: Finished) -> Finished | None:
        """Return the given run of a run's task."""
        return next((one for one in self.given or () if one.task.name == run.task.name), None)

    def chosen(self, run: Finished) -> Chosen:
        """Return the examples of a run; see `kd.probe.subjects.choose`."""
        identity = run.record["identity"]
        key = digest_of({"task": identity["task"], "data": identity["data"]})
        return self.once(("examples", key), lambda: choose(run, self.settings, key))

    def subject(
        self, run: Finished, kind: str, name: str, place: ModelSource | str, chosen: Chosen, max_length: int
    ) -> Subject:
        """Return a model of a run with its logits: those that the run stored, or else computed ones.

        Stored logits of texts that were truncated elsewhere are not used, so that student and teacher read the same.

        Args:
            run: the run.
            kind: `students` or `teachers`.
            name: name of the model in the run.
            place: where it is loaded from, or a reason why it cannot be.
            chosen: the examples.
            max_length: number of tokens to which they are truncated.

        Raises:
            InputError: if the stored predictions are of other examples, or do not give the scores of the run's record; or if
                there are none, and no model.
        """
        stored = stored_predictions(run, chosen, same=run is not self.given_for(run))
        logits = None if stored is None or run.task.max_length != max_length else getattr(stored, kind).get(name)
        if logits is not None:
            own = run.record["students"][name]["metrics"] if kind == "students" else run.record["metrics_teacher"][name]
            check_scores(f"{name} of {run.name}", logits, chosen, own[chosen.split])
            return Subject(place, logits, True)
        if isinstance(place, str):
            raise InputError(
                f"'{run.directory}' has no stored predictions of {name}, and {place}; to train it again, remove its "
                "result.json and repeat its command",
                KEY,
            )
        texts = list(chosen.examples.texts[chosen.split])
        computed = self.once(("logits", place, chosen.key), lambda: logits_of(load(place, chosen.classes), texts, max_length))
        return Subject(place, computed.numpy(), False)

    def case(self, run: Finished, student: str, teacher: str, chosen: Chosen) -> Case:
        """Return the figures of a student beside a teacher.

        Args:
            run: the run.
            student: name of its student.
            teacher: name of its teacher; not used if a teacher is given.
            chosen: the examples.

        Raises:
            InputError: for files that do not fit together.
        """
        length = run.task.max_length
        subjects = {"student": self.subject(run, "students", student, student_source(run, student), chosen, length)}
        given = self.given_for(run)
        if given is None:
            subjects["teacher"] = self.subject(run, "teachers", teacher, teacher_source(run, teacher), chosen, length)
        else:
            best = str(given.record["headline"])
            teacher = f"{given.record['method']} {given.label(best)}, seed {given.record['seed']}"
            subjects["teacher"] = self.subject(given, "students", best, student_source(given, best), chosen, length)
        control, without = self.control(run)
        if control is not None:
            name = student if student in control.students else str(control.record["headline"])
            subjects["control"] = self.subject(control, "students", name, student_source(control, name), chosen, length)
        own = run.record["students"][student]
        about = About(
            task=run.task.name,
            split=chosen.split,
            metrics=tuple(sorted(chosen.task.metrics, key=lambda name: name != chosen.task.monitor)),
            method=str(run.record["method"]),
            student=run.label(student),
            settings=self.told[id(run.record)],
            teacher=teacher,
            seed=int(run.record["seed"]),
            run=run.name,
            digest=str(run.record["digest"]),
            family=str(run.record["family"]),
            selection=run.selection,
            init=str(own["init"]),
            shape=shape_of(run, student),
            majority=(run.record.get("baseline") or {}).get(chosen.split, {}),
            max_length=length,
            control=None if control is None else control.name,
            control_init="" if control is None else str(control.record["init"]),
            without_control=without,
            logits={role: "stored" if subject.stored else "computed" for role, subject in subjects.items()},
        )
        return self.measured(about, subjects, chosen)

    def control(self, run: Finished) -> tuple[Finished | None, str]:
        """Return the control of a run, or a command that trains it, or the reason why there is none."""
        if run.record["method"] == BASELINE:
            return None, "the run is fine-tuning, which is the control of other runs"
        folder = run.directory.parent
        controls = self.once(("controls", folder), lambda: controls_beside(run.directory))
        directory = controls.get(str(run.record["digest"]))
        if directory is None:
            return None, control_command(run)
        found = next(one for one in finished_tasks(directory) if one.task.name == run.task.name)
        return found, ""

    def measured(self, about: About, subjects: Mapping[str, Subject], chosen: Chosen) -> Case:
        """Return the case of some models: the chosen parts, and reasons for those that there are not."""
        parts, classes = self.settings.parts, chosen.classes
        found: dict[str, dict[str, Any]] = {part: {} for part in PARTS[1:]}
        absent: dict[str, str] = {}
        compared = None
        if "differences" in parts:
            labelled = chosen.labelled
            logits = {role: subject.logits[labelled] for role, subject in subjects.items()}
            texts = chosen.texts(labelled)
            compared = differences(
                logits["student"],
                logits["teacher"],
                logits.get("control"),
                chosen.labels[labelled],
                about.metrics,
                classes=classes,
                lengths=np.array([sum(len(text.split()) for text in pair) for pair in texts]),
            )
        with_teacher, alone = ("cka", "attention"), ("probes", "ablation")
        for part in [part for part in PARTS[1:] if part in parts]:
            if part == "probes" and classes is None:
                absent[part] = "the probes are classifiers, and the task has scores"
                continue
            for role in [role for role in ("teacher", "student", "control") if role in subjects]:
                if part in with_teacher and role == "teacher":
                    continue
                needed = [role] if part in alone else [role, "teacher"]
                reasons = [place for of in needed if isinstance(place := subjects[of].place, str)]
                if reasons:
                    absent[f"{part}/{role}"] = reasons[0]
                    continue
                value = self.part(part, subjects[role], subjects["teacher"], chosen, about)
                if isinstance(value, str):
                    absent[f"{part}/{role}"] = value
                else:
                    found[part][role] = value
        return Case(about, compared, absent=absent, **found)

    def part(self, part: str, model: Subject, teacher: Subject, chosen: Chosen, about: About) -> Any:
        """Return a part of the analysis of a model, or a reason why there is none; see `Case`."""
        where = (model.place, chosen.key)
        texts, length = chosen.texts(chosen.part_rows), about.max_length
        if part == "cka":
            return alignment_of(self.vectors(model, chosen, length), self.vectors(teacher, chosen, length))
        if part == "attention":
            ours, theirs = self.loaded(model, chosen), self.loaded(teacher, chosen)
            if not same_tokens(ours, theirs):
                return "it has another vocabulary than the teacher, so that their tokens cannot be compared"
            return self.once(("attention", teacher.place, *where), lambda: attention_similarity(ours, theirs, texts, length))
        if part == "ablation":

            def drops() -> Ablation:
                logits, labels = ablated_logits(self.loaded(model, chosen), texts, length), chosen.labels[chosen.part_rows]
                return ablation_of(logits, labels, about.metrics[0], classifies=chosen.classes is not None)

            return self.once(("ablation", *where), drops)

        def probes() -> Probed:
            train_labels = np.asarray(chosen.examples.labels["train"], dtype=np.float64)[chosen.train_rows]
            return probes_of(
                self.vectors(model, chosen, length, "train"),
                torch.from_numpy(train_labels).long(),
                self.vectors(model, chosen, length),
                torch.from_numpy(chosen.labels[chosen.rows]).long(),
                len(chosen.classes or ()),
            )

        return self.once(("probes", *where), probes)

    def vectors(self, model: Subject, chosen: Chosen, length: int, split: str | None = None) -> list[torch.Tensor]:
        """Return the vectors of a model in each layer, of the chosen examples of the split or of train."""
        texts = chosen.texts(chosen.rows if split is None else chosen.train_rows, split)
        key = (model.place, chosen.key, split, length)
        if key not in self._vectors:
            self._vectors[key] = vectors_of(self.loaded(model, chosen), texts, length, self.settings.vectors)
        self._vectors.move_to_end(key)
        while len(self._vectors) > 2 * LOADED:  # of the chosen split and of train
            self._vectors.popitem(last=False)
        return self._vectors[key]

    def loaded(self, model: Subject, chosen: Chosen) -> FrozenTeacher:
        """Return a model that has a place."""
        assert not isinstance(model.place, str)
        return load(model.place, chosen.classes)
