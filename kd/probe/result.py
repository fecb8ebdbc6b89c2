"""Results of an analysis: what is compared, and the figures of each part."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kd.probe.ablation import Ablation
from kd.probe.attention import AttentionSimilarity
from kd.probe.differences import Differences
from kd.probe.representations import Alignment, Probed

PARTS = ("differences", "cka", "probes", "attention", "ablation")
"""Parts of an analysis, in the order of the page."""


@dataclass(frozen=True)
class Settings:
    """Settings of an analysis.

    Attributes:
        split: split whose examples are compared.
        parts: parts of the analysis, of `PARTS`.
        examples: largest number of examples of the similarity of layers and of linear probes; differences are of all examples.
        train_examples: largest number of training examples of each linear probe.
        part_examples: largest number of examples of attention and of models without a part, which take a pass for each part.
        vectors: one of `kd.probe.outputs.VECTORS`.
    """

    split: str = "validation"
    parts: tuple[str, ...] = PARTS
    examples: int = 500
    train_examples: int = 500
    part_examples: int = 128
    vectors: str = "mean"


@dataclass(frozen=True)
class Shape:
    """Sizes of an encoder.

    Attributes:
        layers: number of blocks.
        heads: attention heads of a block.
        width: size of a hidden state.
    """

    layers: int
    heads: int
    width: int


@dataclass(frozen=True)
class About:
    """Description of what a case compares.

    Attributes:
        task: name of the task.
        split: split of the examples.
        metrics: the task's metrics, the one that chose the checkpoint first.
        method: method of the run.
        student: name of the student, as reports show it.
        settings: settings in which the run differs from others of its task, method, student and teacher; empty without such.
        teacher: name of the teacher.
        seed: seed of the run.
        run: name of the run's directory.
        digest: its digest.
        family: digest of everything but the seed.
        selection: how its checkpoint was chosen.
        init: initial weights of the student.
        shape: sizes of the student; None if its run has let it go.
        majority: metric -> score of predicting the class that is most frequent in train, or the mean of its scores; what a
            model that has learnt nothing may reach.
        max_length: number of tokens to which texts are truncated.
        control: name of the directory of the control; None without one.
        control_init: initial weights of the control.
        without_control: command that trains a control, or the reason why there is none; empty with one.
        logits: `stored` or `computed` for `student`, `teacher` and `control`.
    """

    task: str
    split: str
    metrics: tuple[str, ...]
    method: str
    student: str
    settings: str
    teacher: str
    seed: int
    run: str
    digest: str
    family: str
    selection: str
    init: str
    shape: Shape | None
    majority: Mapping[str, float | None]
    max_length: int
    control: str | None
    control_init: str
    without_control: str
    logits: Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """Figures of one student beside one teacher.

    Attributes:
        about: what it compares.
        differences: of the predictions, over all labelled examples of the split; None if the part was not chosen.
        cka: `student`, `control` -> similarity of its layers with the teacher's.
        probes: `teacher`, `student`, `control` -> accuracy of linear probes.
        attention: `student`, `control` -> similarity of its attention with the teacher's.
        ablation: `teacher`, `student`, `control` -> drops of its score without its parts.
        absent: part, or part and model as `cka/control` -> reason why there is none.
    """

    about: About
    differences: Differences | None = None
    cka: Mapping[str, Alignment] = field(default_factory=dict)
    probes: Mapping[str, Probed] = field(default_factory=dict)
    attention: Mapping[str, AttentionSimilarity] = field(default_factory=dict)
    ablation: Mapping[str, Ablation] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
