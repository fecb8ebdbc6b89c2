"""A method with a reward on a held part of train, and what one rank of two makes of it."""

import copy
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from conformance.bench import TASK, encoder
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import BAD, FILLER, GOOD, sentence, tiny_tokenizer
from kd.data.datamodule import KDDataModule
from kd.data.examples import Examples
from kd.data.held import cut
from kd.engines.distiller import Distiller
from kd.engines.models import Models
from kd.engines.optimizer import OptimizerFactory
from kd.methods import options
from kd.methods.base import Bound, Method, Step, Turn
from kd.models import FrozenTeacher
from kd.schedules import Constant
from kd.system import distributed

WEIGHTS = {"task": 1.0, "logits": 0.5, "policy": 1.0, "held": 1.0}
SEEN: list[dict[str, Any]] = []
"""Records of the batches of `Rewarded`, in this process."""


class Rewarded(Method):
    """A policy that chooses for each example whether the teacher is used, rewarded by the student's accuracy on held examples.

    The term `held` is a loss of the held examples: of their logits through a map before the rows of the ranks are joined, and
    one after it.

    Args:
        holds: share of train that is held.
        turns: 2 if the policy moves in a turn after the student's.
    """

    names = ("task", "logits", "policy", "held")
    distances = ("logits",)
    across_ranks = True

    def __init__(self, holds: float = 0.25, turns: int = 2) -> None:
        super().__init__()
        self.holds, self.count = options.holds(holds), turns
        self.logit = nn.Parameter(torch.zeros(()))

    def bind(self, bound: Bound) -> None:
        classes = bound.student.config.num_labels
        self.before, self.after = nn.Linear(classes, classes), nn.Linear(classes, classes)

    def batch_dependence(self) -> str:
        return "the reward is that of the batch"

    def turns(self) -> Sequence[Turn]:
        if self.count == 1:
            return super().turns()
        own = [self.logit, *self.before.parameters(), *self.after.parameters()]
        return [Turn("student", self.of_student), Turn("policy", self.of_policy, own)]

    def terms(self, step: Step) -> dict[str, Tensor]:
        return {**self.of_student(step), **self.of_policy(step)}

    def actions(self, step: Step) -> Tensor:
        return (step.draws("teacher", 1)[:, 0] < self.logit.detach().sigmoid()).to(self.logit.dtype)

    def of_student(self, step: Step) -> dict[str, Tensor]:
        logits = step.student.outputs.logits
        errors = (logits - step.teacher.outputs.logits).square().mean(1)
        used = (0.5 + self.actions(step)) * errors
        return {"task": step.task.hard(logits, step.batch.labels), "logits": used.mean()}

    def of_policy(self, step: Step) -> dict[str, Tensor]:
        held = step.on_held()
        logits, theirs = held.student.outputs.logits, held.teacher.outputs.logits
        if step.task is not TASK and step.task.labels is None:
            reward = -held.across((logits - held.batch.labels[:, None]).square().detach()).mean()
            loss = held.across(self.before(logits)).square().mean() + self.after(held.across(theirs)).square().mean()
        else:
            labels = held.across(held.batch.labels)
            reward = (held.across(logits.detach()).argmax(1) == labels).to(logits.dtype).mean()
            loss = F.cross_entropy(held.across(self.before(logits)), labels)
            loss = loss + F.cross_entropy(self.after(held.across(theirs)), labels)
        taken = self.actions(step)
        likelihood = taken * F.logsigmoid(self.logit) + (1 - taken) * F.logsigmoid(-self.logit)
        return {"policy": -(reward + 0.1) * likelihood.mean(), "held": loss}

    def after_step(self, step: Step, terms: Any) -> None:
        held = step.held
        SEEN.append({"epoch": step.progress.epoch, "step": step.progress.step, "index": step.batch.index.tolist()})
        SEEN[-1] |= {"held": held.index.tolist(), "weight": held.weight, "policy": float(terms["policy"])}


def examples_of(count: int, seed: int = 0) -> Examples:
    """Sentences of three classes, of which no two are equal."""
    generator, texts = random.Random(seed), {}
    while len(texts) < count:
        texts.setdefault((sentence(generator, (BAD, FILLER, GOOD)[len(texts) % 3]),), len(texts) % 3)
    splits = {"train": list(texts), "validation": list(texts)[:6]}
    return Examples(TASK, splits, {split: [texts[text] for text in own] for split, own in splits.items()})


def held_mask(texts: Sequence[tuple[str, ...]], share: float, ranks: int = 1) -> np.ndarray:
    """The texts that are held, of some that all have labels, bool."""
    return cut(Examples(TASK, {"train": texts}, {"train": [0] * len(texts)}), share, ranks=ranks).held


CASES = [(64, 8, 2), (62, 7, 2), (62, 7, 1)]
"""Examples, size of a global batch, turns; two ranks divide some batches, training or held ones, evenly and others not."""


def trained(examples: int, size: int, turns: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """The parameters after two epochs on this rank, through Lightning and the data module, in float64, and what was seen."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = encoder(1, layers=2, width=16, heads=4, **off), encoder(9, layers=3, width=16, heads=4)
    torch.manual_seed(0)
    method, frozen = Rewarded(0.3, turns), [FrozenTeacher(teacher, "t")]
    method.bind(Bound(student, frozen, TASK))
    factory = OptimizerFactory(torch.optim.SGD, lr=0.05, weight_decay=0.0, schedule="constant", warmup=0.0)
    weights: Any = {name: Constant(weight) for name, weight in WEIGHTS.items()}
    engine = Distiller(Models({"student": student}, {"student": method}, frozen, None, weights), TASK, factory)
    engine.double()
    tokenizer = tiny_tokenizer()
    data = KDDataModule(
        examples_of(examples), [tokenizer], [tokenizer], size, 8, 32, 0, rank=rank, world=world, holds=method.holds
    )
    options: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 2, "use_distributed_sampler": False}
    if world > 1:
        options |= {"strategy": "ddp", "devices": world}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    SEEN.clear()
    pl.Trainer(**options, **quiet, limit_val_batches=0).fit(engine, datamodule=data)
    return {"state": copy.deepcopy(engine.state_dict()), "seen": copy.deepcopy(SEEN), "held": data.held.tolist()}


def save_rank(rank: int, port: int, folder: Path) -> None:
    """Train every case as one rank of two and save what came of it."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test")
    distributed.start("cpu")
    found = {case: trained(*case, rank, 2) for case in CASES}
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
