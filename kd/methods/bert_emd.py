"""BERT-EMD: many-to-many layer mapping by optimal transport."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.forward import Needs
from kd.functional import layer_maps
from kd.functional.attention import score_error
from kd.functional.hidden import PADDING, token_error
from kd.functional.logits import SOFT_LOSSES
from kd.functional.transport import MASS_UPDATES, shared_cost_attention, transport_plan
from kd.methods.base import Bound, Method, Step, check_heads, projection
from kd.methods.epoch_mean import EpochMean
from kd.methods.options import BATCH_MEANS, number, switch, temperature_schedule, word
from kd.schedules import Schedule
from kd.system import distributed

ERRORS = {"attention": score_error, "hidden": token_error}
"""Transported kinds of outputs -> the function that computes the unit cost between a student and a teacher layer."""
SIDES = ("student", "teacher")


class BertEMD(Method):
    r"""BERT-EMD (Li, Liu, Zhao, Xu, Yang, Jin, EMNLP 2020, arXiv:2010.06133): every layer may learn from every layer.

    :math:`L = \beta [\theta (L_{att} + L_{hid}) + L_{emb}] + L_{pred}`. Of M student and N teacher layers all M x N pairs are
    compared; the cheapest plan F that moves the student's masses to the teacher's is the weight of each pair, and layers
    that were cheap to transport get more mass at the next step (cost attention). Authors' code consulted for facts:
    lxk00/BERT-EMD, `bert_emd/emd_task_distill.py`.

    Terms:
        `task`: hard loss, which the paper does not have. Weight 0; 1 - alpha in the code, where alpha is 1 throughout.
        `logits`: :math:`L_{pred}` without its factor. Weight alpha T^2 / reduce_T.
        `embedding`: :math:`L_{emb} = MSE(W h_0^s, h_0^t)`. Weight beta.
        `hidden`: :math:`L_{hid} = \sum_{ij} F_{ij} MSE(W h_i^s, h_j^t)`. Weight beta theta.
        `attention`: :math:`L_{att} = \sum_{ij} F_{ij} MSE(A_i^s, A_j^t)` of scores before softmax, with a separate F. Weight
            beta theta.

    Ablations of the paper are weights of 0, `update=none` and `mapping=uniform`.

    Args:
        update: update of the masses. `softmax2`, two softmaxes, is the code of the published numbers (the authors say so);
            `softmax` is the paper; `sum` is the authors' later code; `none` leaves them uniform.
        tau: T_emd > 0, temperature of the first softmax.
        separate: whether attention and hidden states have separate masses. Otherwise both have the mean of the two, taken
            after the first softmax; the second softmax of `softmax2` is applied to that mean (authors' code).
        mapping: `emd`; or a fixed map instead of the plan: a name of `kd.functional.layer_maps`, of which `uniform` is
            TinyBERT's, or a list of [student layer, teacher layer]. Its pairs have equal parts of a mass of 1 (our choice: the
            scale of a transport, where TinyBERT sums over pairs), and masses are not updated.
        share_projection: whether the embeddings and all layers share one W (authors' code); otherwise each has its own.
        padding: `strict` averages over real tokens (our choice, the loss does not depend on how far a batch is padded);
            `reference` over all (authors' code).
        temperature: T > 0, a number or a schedule.
        loss: loss of the soft labels. The authors' code uses `ce`, the soft cross entropy.
        reduction: reduction of the soft loss. The authors' code uses `elementmean`, over batch and classes.
        teacher_dropout: whether the teacher runs with dropout, and therefore at every step. The authors' code leaves it on, by
            oversight; ours is off.

    W is learned also if widths are equal, as in the authors' code; it is then initialised as the identity (our choice).

    The plan is solved for the costs of the global batch, so ranks share it and the masses. Masses are updated after each batch.
    In the authors' code each process has its own plan and masses. Teachers have the head they were fine-tuned with; in the
    authors' code there is a ReLU before the classifier that was not there in fine-tuning.

    The last plans and the masses for the next step are in every checkpoint, and in `plans()`: `plan_hidden`, `plan_attention`,
    (student layers, teacher layers), zeros before the first step; `student_hidden`, `student_attention`, (student layers,), and
    `teacher_hidden`, `teacher_attention`, (teacher layers,):

        state = torch.load("<run>/checkpoints/best.ckpt", weights_only=True)["state_dict"]
        state["method.plan_hidden"]  # [i - 1, j - 1]: weight of the pair of student layer i and teacher layer j

    The key is for one student without a pool; with a pool the methods are `method.each.0` and so on, in a cohort
    `method-<name>`. With `trainer.selection=last` the exported student is that of `last.ckpt`. The means of the plans over the
    batches of an epoch are in `mean_plans`, and in the run's `maps.json`.
    """

    names = ("task", "logits", "embedding", "hidden", "attention")

    def __init__(
        self,
        update: str = "softmax2",
        tau: float = 1.0,
        *,
        separate: bool = False,
        mapping: str | Sequence[Sequence[int]] = "emd",
        share_projection: bool = True,
        padding: str = "strict",
        temperature: "float | Schedule" = 1.0,
        loss: str = "ce",
        reduction: str = "elementmean",
        teacher_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.update = word(update, (*MASS_UPDATES, "none"), "update")
        self.tau = number(tau, "tau", 1e-6, 1e6)
        self.separate = switch(separate, "separate")
        self.share_projection = switch(share_projection, "share_projection")
        self.teacher_dropout = switch(teacher_dropout, "teacher_dropout")
        if isinstance(mapping, str):
            word(mapping, ("emd", *layer_maps.NAMED), "mapping")
        self.mapping = mapping
        self.padding = word(padding, PADDING, "padding")
        self.temperature = temperature_schedule(temperature)
        self.loss = word(loss, SOFT_LOSSES, "loss")
        self.reduction = word(reduction, BATCH_MEANS, "reduction")
        self.pairs: layer_maps.Pairs = ()
        self.projections = nn.ModuleDict()
        self.mean_plans = nn.ModuleDict()
        """Means of the plans over an epoch, if they are solved for."""
        self.solved: dict[str, tuple[Tensor, Tensor]] = {}
        """Costs and plan of the last batch for each term, on the CPU; emptied by `after_step`."""

    @property
    def solves(self) -> bool:
        """True if the plan is solved for; False for a fixed layer map."""
        return self.mapping == "emd"

    def bind(self, bound: Bound) -> None:
        """Check the heads, list the pairs of layers, create projections and masses.

        Raises:
            InputError: if student and teacher differ in their number of heads, which are matched one by one, or a fixed map
                does not suit their depths.
        """
        student, teacher = bound.student, bound.teacher
        check_heads(student, teacher)
        self.pairs = self._pairs(student.depth, teacher.depth)
        layers = sorted({0, *(ours for ours, _ in self.pairs)})
        names = ["all"] if self.share_projection else [str(layer) for layer in layers]
        self.projections = nn.ModuleDict({name: projection(student.width, teacher.width) for name in names})
        for kind in ERRORS:
            for side, depth in zip(SIDES, (student.depth, teacher.depth), strict=True):
                self.register_buffer(f"{side}_{kind}", torch.full((depth,), 1 / depth))
            flow = torch.zeros(student.depth, teacher.depth)
            for ours, theirs in () if self.solves else self.pairs:
                flow[ours - 1, theirs - 1] += 1 / len(self.pairs)
            self.register_buffer(f"plan_{kind}", flow)
        shape = (student.depth, teacher.depth)
        self.mean_plans = nn.ModuleDict({kind: EpochMean(*shape) for kind in ERRORS if self.solves})

    def _pairs(self, student: int, teacher: int) -> layer_maps.Pairs:
        if self.solves:
            return tuple((ours, theirs) for ours in range(1, student + 1) for theirs in range(1, teacher + 1))
        listed = layer_maps.resolve(self.mapping, student, teacher, "mapping")
        pairs = tuple(pair for pair in listed if pair != (0, 0))  # the term `embedding` compares the embeddings
        if not pairs or any(0 in pair for pair in pairs):
            raise InputError(
                f"the layer map '{self.mapping}' gives the pairs {layer_maps.describe(listed)}; it must give at least one, of "
                "layers from 1 on: embeddings have a term of their own",
                "mapping",
            )
        return pairs

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        """Declare attention and hidden states of every layer that is compared, and the embeddings."""
        ours, theirs = ({pair[side] for pair in self.pairs} for side in range(2))
        return Needs(hidden={0, *ours}, attention=ours), [
            Needs(hidden={0, *theirs}, attention=theirs, dropout=self.teacher_dropout)
        ]

    def terms(self, step: Step) -> dict[str, Tensor]:
        """Return the loss terms listed in the class docstring."""
        student, teacher = step.student.outputs, step.teacher.outputs
        layers = sorted({ours for ours, _ in self.pairs})
        ours = {
            "attention": {layer: student.scores(layer) for layer in layers},
            "hidden": {layer: self._projected(layer, student.hidden(layer)) for layer in layers},
        }
        theirs = {"attention": teacher.scores, "hidden": teacher.hidden}
        flows = self.flows(ours, theirs, student.mask, step.batch.weight)
        embedded = self._projected(0, student.hidden(0))
        temperature = self.temperature(step.progress.fraction)
        return {
            "task": step.task.hard(student.logits, step.batch.labels),
            "logits": step.task.soft(student.logits, teacher.logits, temperature, self.loss, self.reduction),
            "embedding": token_error(embedded, teacher.hidden(0), student.mask, self.padding),
            **{kind: self._transported(kind, flows[kind], ours[kind], theirs[kind], student.mask) for kind in ERRORS},
        }

    def flows(
        self,
        ours: Mapping[str, Mapping[int, Tensor]],
        theirs: Mapping[str, Callable[[int], Tensor]],
        mask: Tensor,
        weight: float,
    ) -> dict[str, Tensor]:
        """Return the plan of each term, (student layers, teacher layers) on the CPU.

        Args:
            ours: term -> student layer -> its scores or projected states.
            theirs: term -> function that returns the scores or states of a teacher layer.
            mask: (batch, tokens), bool, False on padding.
            weight: weight of this rank's batch in the mean over ranks.

        Under DDP the costs are means over the ranks, from one exchange.
        """
        if not self.solves:
            return {kind: self._kept(f"plan_{kind}") for kind in ERRORS}
        local = torch.stack([self._costs(kind, ours[kind], theirs[kind], mask) for kind in ERRORS])
        (shared,) = distributed.mean([weight * local])
        costs = dict(zip(ERRORS, shared.cpu(), strict=True))
        masses = {kind: [self._kept(f"{side}_{kind}") for side in SIDES] for kind in ERRORS}
        self.solved = {}
        if not all(cost.isfinite().all() for cost in costs.values()):
            # The terms are not finite either; the engine reports that with a clearer message than the solver would.
            return {kind: torch.outer(*masses[kind]) for kind in ERRORS}
        self.solved = {kind: (costs[kind], transport_plan(costs[kind], *masses[kind])) for kind in ERRORS}
        return {kind: flow for kind, (_, flow) in self.solved.items()}

    @torch.no_grad()
    def _costs(self, kind: str, ours: Mapping[int, Tensor], theirs: Callable[[int], Tensor], mask: Tensor) -> Tensor:
        """Return unit costs of all pairs, (student layers, teacher layers); one teacher layer's scores are held at a time."""
        columns = []
        for layer in range(1, self.get_buffer(f"plan_{kind}").shape[1] + 1):
            target = theirs(layer)
            columns.append(torch.stack([ERRORS[kind](states, target, mask, self.padding) for states in ours.values()]))
        return torch.stack(columns, dim=1)

    def _transported(
        self, kind: str, flow: Tensor, ours: Mapping[int, Tensor], theirs: Callable[[int], Tensor], mask: Tensor
    ) -> Tensor:
        """Return the cost of the plan, with gradients; pairs with a weight of zero are left out."""
        parts = [
            share * ERRORS[kind](ours[layer], theirs(other), mask, self.padding)
            for layer, other in self.pairs
            if (share := float(flow[layer - 1, other - 1])) > 0
        ]
        return torch.stack(parts).sum()

    def _projected(self, layer: int, states: Tensor) -> Tensor:
        projected: Tensor = self.projections["all" if self.share_projection else str(layer)](states)
        return projected

    def _kept(self, name: str) -> Tensor:
        return self.get_buffer(name).cpu()

    @torch.no_grad()
    def after_step(self, step: Step, terms: Mapping[str, Tensor]) -> None:
        """Store the plan, and update the masses from its costs."""
        solved, self.solved = self.solved, {}
        for kind, (_, flow) in solved.items():
            self.get_buffer(f"plan_{kind}").copy_(flow)
            self.mean_plans[kind].add(flow, step.progress.epoch)  # type: ignore[operator]
        if not solved or self.update == "none":
            return
        for side in SIDES:
            transports = {kind: (*self._seen_from(side, *solved[kind]), self._kept(f"{side}_{kind}")) for kind in ERRORS}
            counted = {kind: [transports[kind]] if self.separate else list(transports.values()) for kind in ERRORS}
            masses = {kind: shared_cost_attention(counted[kind], self.update, self.tau) for kind in ERRORS}
            for kind in ERRORS:  # in a second loop, because the old masses may share memory with these buffers
                self.get_buffer(f"{side}_{kind}").copy_(masses[kind])

    @staticmethod
    def _seen_from(side: str, cost: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        return (flow, cost) if side == "student" else (flow.T, cost.T)

    def plans(self) -> dict[str, Tensor]:
        """Return copies on the CPU of the last plans and the next step's masses; names and shapes as in a checkpoint."""
        return {name: buffer.detach().cpu().clone() for name, buffer in self.named_buffers(recurse=False)}

    def layer_maps(self) -> Sequence[Mapping[str, Tensor]]:
        """Return the plans, as means over the batches of an epoch, or the fixed map with its masses."""
        values = {kind: self.get_buffer(f"mean_plans.{kind}.values" if self.solves else f"plan_{kind}") for kind in ERRORS}
        return [{kind: nn.functional.pad(flow, (1, 0, 1, 0)) for kind, flow in values.items()}]

    def describe(self) -> dict[str, str]:
        """Describe the layer map."""
        student, teacher = self.get_buffer("plan_hidden").shape
        if not self.solves:
            return {"layer map (student<-teacher)": layer_maps.describe(self.pairs)}
        masses = "uniform masses" if self.update == "none" else f"masses by cost attention ({self.update}, tau {self.tau:g})"
        return {"layer map (student<-teacher)": f"{student} x {teacher} pairs by transport, {masses}"}

    def batch_dependence(self) -> str | None:
        """Return that each accumulated batch has its own plan, and that a mean over padding depends on the batch's length."""
        reasons = ["each accumulated batch has a transport plan of its own (ranks share it)"] * self.solves
        return "; ".join([*reasons, *["padding=reference averages over padding"] * (self.padding == "reference")]) or None
