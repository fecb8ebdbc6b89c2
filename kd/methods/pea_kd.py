"""Pea-KD's first run: pre-training with the teacher's predictions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd.errors import InputError
from kd.forward import Needs
from kd.functional.hidden import at_least_float32
from kd.functional.outcomes import SCHEMES, median_thresholds, outcome_labels
from kd.methods.base import Bound, Method, Step
from kd.methods.options import number, word

MEDIAN = "median"


class PeaKD(Method):
    r"""Pre-training with the teacher's predictions (Cho and Kang, arXiv:2009.14822, PLOS ONE 2022), Pea-KD's PTP, section 3.3.

    The student learns to predict, from its pooled vector h, how the teacher fares on a training example, by a label u that
    follows from whether the teacher's prediction is correct and whether its confidence :math:`\max_c p_t(c)` (temperature 1)
    exceeds a threshold: :math:`L = CE(W h + b, u)`. W and b are learned and discarded; the encoder is the start of the second
    run, patient distillation with `kd.methods.pkd.PKD`: `conf/method/pea_kd.yaml`. The other part of Pea-KD is a surgery,
    `kd.models.surgery.sharing.ShuffledSharing`. Authors' code consulted for facts: the two repositories that the authors
    published, whose thresholds and schedules differ.

    Terms:
        `prediction`: L, in nats, a mean over the batch. Classes are not weighted.

    Args:
        scheme: labels u: `four`, correct or wrong times confident or not; `correct` or `confident`, one distinction alone.
        thresholds: confidence above which a prediction is confident: `median`, the medians over train of correct and of wrong
            predictions (the first repository's description); or numbers in [0, 1], one for correct and one for wrong
            predictions, or one for both (the second's). The code has 0.8 and 0.6 for RTE, 0.95 and 0.75 for MRPC, 0.98 and 0.8
            for SST-2, 0.98 and 0.7 for QNLI, 0.95 and 0.7 for CoLA; a teacher of yours has other confidences, so the default is
            `median` (our choice).

    The vector h is what the classifier reads, after its dropout. The classifier is frozen: no term depends on it, so the second
    run starts with it as it was initialised. All of train is labelled before training (`Method.prefit`), to count the
    labels, which the preflight reports: a teacher is rarely wrong on train, so labels may be missing.

    Raises:
        InputError: for an option that does not have one of its allowed values.
    """

    names = ("prediction",)
    distances = ()
    prefits = True
    thresholds: Tensor

    def __init__(self, scheme: str = "four", thresholds: str | float | Sequence[float] = MEDIAN) -> None:
        super().__init__()
        self.scheme = word(scheme, tuple(SCHEMES), "scheme")
        self.median = thresholds == MEDIAN
        self.register_buffer("thresholds", torch.tensor(given(thresholds), dtype=torch.float64))
        self.counts: list[int] | None = None
        """Number of examples of train with each label; None before `prefit`."""
        self.head: nn.Module = nn.Identity()

    def bind(self, bound: Bound) -> None:
        """Build the linear map to the labels, and freeze the student's classifier, which no term depends on.

        Raises:
            InputError: for a task without classes, where no prediction is correct.
        """
        student = bound.student
        if bound.task.labels is None:
            raise InputError(
                "pre-training with the teacher's predictions needs classes, of which one is correct; leave this run out, with "
                "before=null",
                "task",
            )
        for parameter in student.outputs.parameters():
            parameter.requires_grad_(False)
        self.head = nn.Linear(int(student.outputs.in_features), len(SCHEMES[self.scheme]))  # type: ignore[arg-type]

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the vector that the student's classifier reads, and the teacher's logits."""
        return Needs(pooled=True), [Needs()]

    def prefit(self, logits: Sequence[Tensor], labels: Tensor) -> None:
        """Compute the medians, if they are the thresholds, and count the labels."""
        (theirs,) = logits
        if self.median:
            self.thresholds.copy_(median_thresholds(theirs, labels))
        outcomes = outcome_labels(theirs, labels, self.thresholds.tolist(), self.scheme)
        self.counts = torch.bincount(outcomes, minlength=len(SCHEMES[self.scheme])).tolist()

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the cross entropy of the predicted labels.

        Raises:
            RuntimeError: before `prefit`, which computes the medians.
        """
        if self.median and self.counts is None:
            raise RuntimeError("the medians of the teacher's confidence are not computed: `prefit` comes before training")
        outcomes = outcome_labels(step.teacher.outputs.logits, step.batch.labels, self.thresholds, self.scheme)
        pooled = at_least_float32(step.student.outputs.pooled)
        with torch.autocast(pooled.device.type, enabled=False):  # a few scores, which half precision would round
            predicted = self.head(pooled)
        return {"prediction": F.cross_entropy(predicted, outcomes)}

    def describe(self) -> dict[str, str]:
        """Describe the thresholds, and the number of examples of train with each label."""
        kind, names = "medians of train" if self.median else "given", SCHEMES[self.scheme]
        shown = {}
        if self.scheme != "correct" and not (self.median and self.counts is None):
            correct, wrong = self.thresholds.tolist()
            shown["teacher is confident above"] = f"{correct:.4f} if correct, {wrong:.4f} if wrong ({kind})"
        if self.counts is not None:
            shown["labels of train"] = ", ".join(f"{n} {name}" for n, name in zip(self.counts, names, strict=True))
        return shown

    def label_dependence(self) -> str | None:
        """Return that the teacher's prediction is compared with every label."""
        return "the teacher's prediction is compared with it"


def given(thresholds: str | float | Sequence[float]) -> tuple[float, float]:
    """Return the thresholds of correct and of wrong predictions; NaN for medians, which are not known yet.

    Raises:
        InputError: for anything but `median`, a number in [0, 1] or two of them.
    """
    if thresholds == MEDIAN:
        return (float("nan"), float("nan"))
    if isinstance(thresholds, Sequence) and not isinstance(thresholds, str) and len(thresholds) == 2:
        correct, wrong = (number(value, "thresholds", 0, 1) for value in thresholds)
        return (correct, wrong)
    if isinstance(thresholds, str | Sequence):
        raise InputError(f"thresholds={thresholds} is neither {MEDIAN}, nor a number, nor two of them", "thresholds")
    both = number(thresholds, "thresholds", 0, 1)
    return (both, both)
