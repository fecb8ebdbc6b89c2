"""One process of two with `kd.Distillation` in `DistributedDataParallel`, started without torchrun's variables."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import kd
from conftest import tiny_model
from kd.methods.backward_kd import BackwardKD
from kd.methods.bert_emd import BertEMD
from kd.methods.pkd import PKD
from kd.methods.rkd import RKD

METHODS: dict[str, Callable[[], kd.Method]] = {"pkd": PKD, "rkd": RKD, "backward_kd": BackwardKD, "bert_emd": BertEMD}
"""A projection that is trained; examples that are compared with each other; random draws of examples; running statistics."""

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def inputs(count: int = 8, tokens: int = 7) -> dict[str, Tensor]:
    """Sentences of several lengths with labels, as many for each rank."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(tokens) < torch.randint(3, tokens + 1, (count, 1), generator=generator)).long()
    mask[0] = mask[count // 2] = 1  # so that each rank has the same padding
    ids = torch.randint(5, 30, (count, tokens), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (count,), generator=generator)}


def part(rank: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of one rank of two."""
    half = len(given["labels"]) // 2
    return {name: tensor[rank * half : (rank + 1) * half] for name, tensor in given.items()}


def distillation_of(name: str) -> kd.Distillation:
    """A method with its models, in float64, so that sums in another order agree to far below any mistake."""
    torch.manual_seed(0)
    student, teacher = tiny_model(0, layers=2, width=16, heads=4, **NO_DROPOUT), tiny_model(1)
    return kd.Distillation(METHODS[name](), student, teacher, total_steps=4).double()


def steps(name: str, rank: int | None = None) -> dict[str, Tensor]:
    """Return the gradients of the first of two steps, and the state after both.

    Args:
        name: of the method.
        rank: a rank of two, which has half of each batch; None for one process with all of it.
    """
    distillation = distillation_of(name)
    model = distillation if rank is None else DistributedDataParallel(distillation)
    optimizer = torch.optim.SGD(distillation.parameters(), lr=0.1)
    given, found = inputs(), {}
    for step in range(2):
        model(**(given if rank is None else part(rank, given))).loss.backward()
        if not step:
            found = {f"gradient of {name}": p.grad.clone() for name, p in distillation.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return {**found, **{name: tensor.clone() for name, tensor in distillation.state_dict().items()}}


def save_steps(rank: int, port: int, folder: Path) -> None:
    """Write what one rank of two has."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save({name: steps(name, rank) for name in METHODS}, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
