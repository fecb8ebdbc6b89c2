"""Distillation of the flow between layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Needs, Outputs
from kd.functional import layer_maps
from kd.functional.flow import FLOW_REDUCTIONS, flow_error, flow_matrix
from kd.functional.logits import SOFT_LOSSES
from kd.methods.base import Bound, Method, Step, freeze_above, match_width
from kd.methods.options import BATCH_MEANS, temperature_schedule, word
from kd.schedules import Schedule

FLOWS = ("all", "last")
PROJECTIONS = ("student", "none")
STAGES = ("joint", "flow")
FLOW_MEANS = tuple(name for name in FLOW_REDUCTIONS if name != "none")


class FSP(Method):
    r"""A Gift from Knowledge Distillation: flow of the solution procedure (Yim, Joo, Bae, Kim, CVPR 2017), for BERT.

    The flow from layer a to layer b is the matrix of inner products of their features,
    :math:`G(f_a, f_b)_{ij} = \frac{1}{n} \sum_l f^a_{li} f^b_{lj}`, and the student imitates the teacher's:
    :math:`L_{FSP} = \frac{1}{N} \sum_x \sum_i \lambda_i \lVert G_i^T(x) - G_i^S(x) \rVert_2^2`, with equal :math:`\lambda_i`.
    The paper is about the channels and the positions of images; the version for tokens is our adaptation: l are an example's
    real tokens, i and j the entries of a state, and the layers are consecutive ones of a layer map. Other code consulted for
    facts: RepDistiller, `distiller_zoo/FSP.py`. Sarfraz, Arani, Zonooz, ICPR 2020, arXiv:2007.01922 compare it with eight other
    methods, added to the labels' loss.

    Terms:
        `task`: the task's hard loss. Absent with `stage=flow`.
        `logits`: the soft loss, our addition. Weight 0. Absent with `stage=flow`.
        `flow`: :math:`L_{FSP}`, a sum over the flows.

    Args:
        layers: layer map, of two entries at least: `uniform` with the embeddings (our choice), `skip`, `last`, or a list of
            [student layer, teacher layer]. A flow is from each entry to the next one.
        flows: `all`, or `last` for the flow between the last two entries alone: a matrix has width x width entries for each
            example, flow and model.
        project: `student`, learned linear maps of the student's layers, one each, if its width is not the teacher's (our
            choice); `none` refuses other widths (paper).
        hidden_reduction: `elements` averages over the entries of a matrix (RepDistiller); `examples` sums over them (paper).
            Both are sums over flows, and means over the examples.
        stage: `joint`, all terms in one run (arXiv:2007.01922; the default, because a run in two is not for cohorts); `flow`,
            the flow alone, the first of the paper's two stages, see `conf/method/fsp.yaml`. Parameters above the highest layer
            of the map are then frozen.
        temperature: T > 0 of `logits`, a number or a schedule.
        loss: loss of `logits`: `kl`, `ce` or `mse`.
        reduction: reduction of `logits`: `batchmean` or `elementmean`.
    """

    names: tuple[str, ...] = ("task", "logits", "flow")

    def __init__(
        self,
        layers: str | Sequence[Sequence[int]] = "uniform",
        flows: str = "all",
        project: str = "student",
        hidden_reduction: str = "elements",
        stage: str = "joint",
        temperature: "float | Schedule" = 4.0,
        loss: str = "kl",
        reduction: str = "batchmean",
    ) -> None:
        super().__init__()
        self.layers = layers
        self.flows = word(flows, FLOWS, "flows")
        self.project = word(project, PROJECTIONS, "project")
        self.hidden_reduction = word(hidden_reduction, FLOW_MEANS, "hidden_reduction")
        self.stage = word(stage, STAGES, "stage")
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        if stage == "flow":
            self.names = ("flow",)
        self.pairs: layer_maps.Pairs = ()
        self.depths = (0, 0)
        self.projections = nn.ModuleList()

    def bind(self, bound: Bound) -> None:
        """Resolve the layer map and create the linear maps.

        Raises:
            InputError: for a layer map of fewer than two entries, or other widths with `project=none`.
        """
        student, teacher = bound.student, bound.teacher
        self.depths = (student.depth, teacher.depth)
        pairs = layer_maps.resolve(self.layers, *self.depths)
        if len(pairs) < 2:
            raise InputError(
                f"a flow is between two entries of the layer map, and layers={self.layers} has {len(pairs)} for a student of "
                f"{student.depth} layers; use layers=uniform, or give pairs, as [[0, 0], [1, 2]]",
                "layers",
            )
        if self.project == "none" and student.width != teacher.width:
            raise InputError(
                f"the flows of student and teacher have the widths {student.width} and {teacher.width}; use project=student",
                "project",
            )
        self.pairs = pairs if self.flows == "all" else pairs[-2:]
        self.projections = nn.ModuleList(match_width(student.width, teacher.width) for _ in self.pairs)
        if self.stage == "flow":
            freeze_above(student, max(layer for layer, _ in self.pairs))

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare the states of the layers of the map."""
        return Needs(hidden=[layer for layer, _ in self.pairs]), [Needs(hidden=[layer for _, layer in self.pairs])]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms listed in the class docstring."""
        student, teacher = step.student.outputs, step.teacher.outputs
        terms = {"flow": self.flow(student, teacher)}
        if self.stage == "joint":
            temperature = self.temperature(step.progress.fraction)
            terms["task"] = step.task.hard(student.logits, step.batch.labels)
            terms["logits"] = step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction)
        return {name: terms[name] for name in self.names}

    def flow(self, student: Outputs, teacher: Outputs) -> Tensor:
        """Return the distance of the flows, summed over them."""
        ours = [project(student.hidden(layer)) for (layer, _), project in zip(self.pairs, self.projections, strict=True)]
        theirs = [teacher.hidden(layer).detach() for _, layer in self.pairs]
        errors = [
            flow_error(
                flow_matrix(ours[index], ours[index + 1], student.mask),
                flow_matrix(theirs[index], theirs[index + 1], teacher.mask),
                self.hidden_reduction,
            )
            for index in range(len(self.pairs) - 1)
        ]
        return torch.stack(errors).sum()

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the layer map."""
        return [{"flow": layer_maps.matrix(self.pairs, *self.depths)}]

    def describe(self) -> dict[str, str]:
        """Describe the layer map."""
        return {"layer map (student<-teacher)": layer_maps.describe(self.pairs)}
