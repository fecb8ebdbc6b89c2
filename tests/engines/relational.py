"""A method that compares the examples of a batch with each other, and what one rank of two makes of it."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from conformance.bench import TASK, Bench, Collated, encoder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from kd.data.batch import Batch
from kd.data.sampler import LengthBatches
from kd.engines.distiller import Distiller
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.forward import Needs
from kd.methods.base import Bound, Method, Progress, Step, Turn
from kd.models import Encoder, FrozenTeacher
from kd.schedules import Constant
from kd.system import distributed

WEIGHTS = {"task": 1.0, "distances": 3.0, "gram": 20.0}


def distances(rows: Tensor) -> Tensor:
    """Distances between rows, divided by their mean (RKD: Park et al., CVPR 2019, eq. 4)."""
    found = (rows[:, None] - rows[None]).square().sum(-1).add(1e-9).sqrt()
    return found / found.mean()


def gram(rows: Tensor) -> Tensor:
    """Inner products of rows, each row of length 1 (SP: Tung and Mori, ICCV 2019, eq. 1)."""
    return F.normalize(rows @ rows.T, dim=1)


class Relational(Method):
    """RKD's distances over a projection before the rows are gathered, and SP's inner products over one after it.

    Args:
        across: whether rows are those of all ranks.
        turns: 2 if the second projection moves in a turn of its own.
    """

    names = ("task", "distances", "gram")

    def __init__(self, across: bool = True, turns: int = 1) -> None:
        super().__init__()
        self.across, self.count = across, turns
        self.before, self.after = nn.Linear(16, 6), nn.Linear(16, 6)

    def needs(self) -> tuple[Needs, Sequence[Needs]]:
        return Needs(cls=[2]), [Needs(cls=[3])]

    def turns(self) -> Sequence[Turn]:
        if self.count == 1:
            return super().turns()
        return [Turn("after", self.of_gram, list(self.after.parameters())), Turn("student", self.of_student)]

    def terms(self, step: Step) -> dict[str, Tensor]:
        return {**self.of_student(step), **self.of_gram(step)}

    def rows(self, step: Step) -> Callable[[Tensor], Tensor]:
        return step.across if self.across else lambda rows: rows

    def of_student(self, step: Step) -> dict[str, Tensor]:
        rows, student = self.rows(step), step.student.outputs
        labels = rows(step.batch.labels)
        ours, theirs = rows(self.before(student.cls(2))), rows(step.teacher.outputs.cls(3))
        weights = 1.0 + (labels[:, None] != labels[None])  # pairs of different labels count twice
        errors = F.smooth_l1_loss(distances(ours), distances(theirs), reduction="none")
        return {"task": step.task.hard(student.logits, step.batch.labels), "distances": (weights * errors).mean()}

    def of_gram(self, step: Step) -> dict[str, Tensor]:
        rows = self.rows(step)
        ours, theirs = self.after(rows(step.student.outputs.cls(2))), rows(step.teacher.outputs.cls(3))
        return {"gram": F.mse_loss(gram(ours), gram(theirs))}


@dataclass(frozen=True)
class Case:
    """A short training: a number of examples, the size of a global batch, the turns, whether rows are gathered."""

    examples: int
    size: int
    turns: int = 1
    accumulate: int = 1
    across: bool = True


CASES = [
    *(Case(2 * size, size, turns) for size in (8, 7) for turns in (1, 2)),
    Case(15, 8, accumulate=2),
]
"""Two batches each, which two ranks share 4+4 or 4+3; and one step of two batches, shared in both ways."""
LOCAL = [Case(case.examples, case.size, case.turns, case.accumulate, across=False) for case in CASES]


def trained(case: Case, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The parameters after an epoch of a case on this rank, through Lightning, in float64."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = encoder(1, layers=2, width=16, heads=4, **off), encoder(9, layers=3, width=16, heads=4)
    torch.manual_seed(0)
    method, frozen = Relational(case.across, case.turns), [FrozenTeacher(teacher, "t")]
    method.bind(Bound(student, frozen, TASK))
    factory = OptimizerFactory(torch.optim.SGD, lr=0.1, weight_decay=0.0, schedule="constant", warmup=0.0)
    weights: Any = {name: Constant(weight) for name, weight in WEIGHTS.items()}
    engine = Distiller(Models({"student": student}, {"student": method}, frozen, None, weights), TASK, factory)
    assert engine.automatic_optimization is (case.turns == 1)
    engine.double()
    trial = Trial(engine)
    whole = Bench.batch(trial, case.examples)  # type: ignore[arg-type]
    sampler = LengthBatches([9] * case.examples, case.size, None, rank, world, case.accumulate)
    batches = [Collated(whole)(rows) for rows in sampler]
    if world > 1:
        assert {len(batch) for batch in batches} <= {(case.size + 1 - rank) // 2, (case.examples - case.size + 1 - rank) // 2}
    options: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1, "accumulate_grad_batches": case.accumulate}
    if world > 1:
        options |= {"strategy": "ddp", "devices": world, "use_distributed_sampler": False}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(**options, **quiet)
    trainer.fit(engine, DataLoader(batches, batch_size=None))
    assert trainer.global_step == len(batches) // case.accumulate
    return copy.deepcopy(engine.state_dict())


@dataclass
class Trial:
    """Stand-in for the bench that `Bench.batch` is a method of."""

    engine: Distiller

    task = TASK

    @property
    def counts(self) -> dict[str, int]:
        return {"teachers": 1, "students": 1}

    @property
    def students(self) -> dict[str, Encoder]:
        return {name: learner.student for name, learner in self.engine.learners.items()}


def step_of(batch: Batch) -> Step:
    """A step whose outputs are not read."""
    return Step(None, [], batch, TASK, Progress())  # type: ignore[arg-type]


def plain_batch(count: int, first: int = 0) -> Batch:
    """A batch without inputs."""
    return Batch({}, (), torch.zeros(count).long(), torch.arange(first, first + count))


TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def rows_of(rank: int, kind: torch.dtype) -> Tensor:
    """Three rows of rank 0 and two of rank 1, each (2, 2)."""
    values = torch.arange(12).view(3, 2, 2) if rank == 0 else 100 + torch.arange(8).view(2, 2, 2)
    return (values % 3 == 0) if kind == torch.bool else values.to(kind)


def gathered(rank: int) -> dict[str, Any]:
    """Call `Step.across` on a rank, and return its results and the messages of its errors."""
    count, found = 3 - rank, {}
    step = step_of(plain_batch(count, first=10 * rank))
    found["types"] = {str(kind): step.across(rows_of(rank, kind)) for kind in TYPES}
    found["one axis"] = step.across(step.batch.index)
    found["own"] = torch.isin(step.across(step.batch.index), step.batch.index)
    found["none"] = distributed.gather_rows(torch.zeros(rank, 2))
    strided = torch.arange(2.0 * count).view(2, count).T
    found["strided"] = step.across(strided)
    rows = torch.full((count, 1), 1.0 + rank, requires_grad=True)
    everything = step.across(rows)
    (everything.sum() ** 2 + 7 * rows.sum()).backward()
    found["gradient"] = rows.grad
    with torch.no_grad():
        found["no graph"] = step.across(rows).requires_grad
    found["alone"] = distributed.on_rank_zero(lambda: step.across(rows) is rows)
    for name, wrong in {
        "tokens": torch.zeros(count, 4 + rank),
        "type": torch.zeros(count, 2, dtype=(torch.float32, torch.int32)[rank]),
    }.items():
        try:
            step.across(wrong)
        except ValueError as error:
            found[name] = str(error)
    return found


def save_rank(rank: int, port: int, folder: Path) -> None:
    """One rank of two: train every case, and write the parameters and what was gathered."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test")
    distributed.start("cpu")
    found = {"gathered": gathered(rank), "trained": {case: trained(case, rank, 2) for case in (*CASES, *LOCAL)}}
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
