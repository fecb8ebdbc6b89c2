"""Transport of mass between layers."""

import os

import torch
from torch import Tensor

UPDATES = ("softmax2", "softmax", "sum")
"""How masses follow from inverse unit costs: through two softmaxes, one, or divided by their sum."""

SMALLEST = 1e-8
"""The least mass of a layer, and the least unit cost as a share of all layers'."""


def plan(cost: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The cheapest way to move one distribution of mass into another, exactly (earth mover's distance).

    :math:`F = argmin_{F >= 0} sum_ij F_ij D_ij` with row sums `source` and column sums `target`; solved on the CPU in float64
    by the network simplex of POT (Flamary et al., JMLR 2021). At most sources + targets - 1 entries are positive. No gradient
    flows through it.

    Args:
        cost: (sources, targets), D.
        source: (sources,), mass >= 0, adding up to 1.
        target: (targets,), likewise.

    Returns:
        (sources, targets), of the cost's type and device.

    Raises:
        ValueError: for shapes that do not match, a cost that is not finite, or masses that are none.

    >>> plan(torch.tensor([[1.0, 3.0]]), torch.tensor([1.0]), torch.tensor([0.5, 0.5]))
    tensor([[0.5000, 0.5000]])
    """
    if cost.shape != (len(source), len(target)):
        raise ValueError(f"a cost of shape {tuple(cost.shape)} does not fit {len(source)} sources and {len(target)} targets")
    if not cost.isfinite().all():
        raise ValueError("a cost is not finite")
    moved, *masses = (tensor.detach().cpu().double() for tensor in (cost, source, target))
    for name, mass in zip(("source", "target"), masses, strict=True):
        if not ((mass >= 0).all() and abs(float(mass.sum()) - 1) < 1e-5):
            raise ValueError(f"the masses of the {name} do not add up to 1, or one is negative: {mass.tolist()}")
    solver = _solver()
    flow, log = solver.emd(*((mass / mass.sum()).numpy() for mass in masses), moved.numpy(), log=True)
    if log["warning"] is not None:
        raise ValueError(f"no transport plan was found: {log['warning']}")
    return torch.from_numpy(flow).to(cost)


def cost_attention(flow: Tensor, cost: Tensor, mass: Tensor, update: str = "softmax2", tau: float = 1.0) -> Tensor:
    r"""The next masses of the layers: those whose transport was cheap get more.

    Unit costs :math:`u_i = \sum_j F_{ij} D_{ij} / w_i`, their inverses :math:`v_i = \sum_k u_k / u_i`, then
    `softmax2`: :math:`softmax(softmax(v / \tau))`; `softmax`: :math:`softmax(v / \tau)`; `sum`: :math:`v / \sum v`.

    Source: Li et al., BERT-EMD, arXiv:2010.06133, cost attention; authors' code `bert_emd/emd_task_distill.py`. `softmax` is
    the paper, `softmax2` the code of its experiments, `sum` the code of today.

    As in the code, :math:`v_i = 0` where :math:`u_i = 0`: a layer whose transport costs nothing gets the least mass, although
    one whose transport costs next to nothing gets the most. With `sum` the code divides by zero at the step after, or at once
    where all costs are 0. Ours never does (our choice): a unit cost counts as at least `SMALLEST` of the sum of all, masses are
    equal where all costs are 0, and every mass is at least `SMALLEST` before they are made to add up to 1.

    Args:
        flow: (layers, others), the plan; transposed for the masses of its columns.
        cost: (layers, others), what it was solved for.
        mass: (layers,), w, that it was solved with.
        update: of `UPDATES`.
        tau: > 0; a large one evens the masses out. `sum` has no use for it.

    Returns:
        (layers,), positive, adding up to 1, of the type of `mass`; computed in float64.

    Raises:
        ValueError: for another word.

    >>> flow, cost = torch.tensor([[0.5], [0.5]]), torch.tensor([[1.0], [3.0]])
    >>> cost_attention(flow, cost, torch.tensor([0.5, 0.5]), "sum")
    tensor([0.7500, 0.2500])
    """
    unit = (flow.double() * cost.double()).sum(dim=1) / mass.double().clamp(min=SMALLEST)
    total = unit.sum()
    inverse = torch.where(unit > 0, total / unit.clamp(min=float(SMALLEST * total)), 0.0)
    if update == "sum":
        found = inverse / inverse.sum() if total > 0 else torch.ones_like(unit)
    elif update in UPDATES:
        found = (inverse / tau).softmax(dim=0)
        found = found.softmax(dim=0) if update == "softmax2" else found
    else:
        raise ValueError(f"update '{update}' is not one of {', '.join(UPDATES)}")
    found = found.clamp(min=SMALLEST)
    return (found / found.sum()).to(mass.dtype)


def _solver():  # type: ignore[no-untyped-def]  # POT has no types
    # POT looks for every array library there is as it is imported: seconds and messages of libraries that kd does not use.
    for library in ("JAX", "CUPY", "TENSORFLOW"):
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{library}", "1")
    import ot

    return ot
