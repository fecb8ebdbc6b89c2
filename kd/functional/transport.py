"""Transport of mass between layers."""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

UPDATES = ("softmax2", "softmax", "sum")
"""How masses follow from inverse unit costs: through two softmaxes, one, or divided by their sum."""

SMALLEST = 1e-8
"""The least mass of a layer, and the least unit cost as a share of all layers'."""


RESOLVED = 1e6
"""The largest cost over that of the whole plan at which the solver's tolerance, about 1e-13 of it, does not matter."""


def plan(cost: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The cheapest way to move one distribution of mass into another, exactly (earth mover's distance).

    :math:`F = argmin_{F >= 0} sum_ij F_ij D_ij` with row sums `source` and column sums `target`; solved on the CPU in float64
    by the network simplex of POT (Flamary et al., JMLR 2021), whatever the size of the costs. At most sources + targets - 1
    entries are positive. No gradient flows through it.

    Args:
        cost: (sources, targets), D.
        source: (sources,), mass >= 0, adding up to 1.
        target: (targets,), likewise.

    Returns:
        (sources, targets), on the cost's device, in its type or float32 if that is narrower.

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
    flow = _cheapest(moved, *(mass / mass.sum() for mass in masses))
    return flow.to(cost.device, torch.promote_types(cost.dtype, torch.float32))


def _cheapest(cost: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The plan, all in float64 on the CPU.

    The solver tells reduced costs from zero by a tolerance that is a share of one more than the largest cost, so that costs
    are scaled by their largest. Where the plan costs next to nothing beside that, the differences that decide are below the
    tolerance. A plan that is optimal after the costs it does not use are lowered is optimal, so they are lowered, which brings
    the rest into the solver's range, for as long as that makes the plan cheaper.
    """
    best, paid = torch.outer(source, target), math.inf
    ceiling = float(cost.abs().max())
    while True:
        scale = ceiling if ceiling > 0 else 1.0
        found, log = _solver().emd(source.numpy(), target.numpy(), (cost.clamp(max=ceiling) / scale).numpy(), log=True)
        if log["warning"] is not None:
            raise ValueError(f"no transport plan was found: {log['warning']}")
        flow = torch.from_numpy(found)
        price = float((flow * (cost / scale)).sum()) * scale
        if not price < paid:
            return best
        best, paid = flow, price
        if not 0 < price * RESOLVED < ceiling:
            return best
        ceiling = price * RESOLVED


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
        (layers,), positive, adding up to 1, of the type of `mass` or float32 if that is narrower; computed in float64.

    Raises:
        ValueError: for another word.

    >>> flow, cost = torch.tensor([[0.5], [0.5]]), torch.tensor([[1.0], [3.0]])
    >>> cost_attention(flow, cost, torch.tensor([0.5, 0.5]), "sum")
    tensor([0.7500, 0.2500])
    """
    return shared_cost_attention([(flow, cost, mass)], update, tau)


def shared_cost_attention(
    transports: Sequence[tuple[Tensor, Tensor, Tensor]], update: str = "softmax2", tau: float = 1.0
) -> Tensor:
    r"""The next masses of layers that several transports have in common: the mean of what `cost_attention` gives each.

    Of two softmaxes the *first* is applied to each transport and the second to their mean,
    :math:`softmax(\frac{1}{n} \sum_a softmax(v^a / \tau))`, which is not the mean of `softmax2`'s masses.

    Source: the authors' code, as of `cost_attention`: there attention and hidden states share their masses.

    Args:
        transports: of each the plan, its costs and the masses that it was solved with, as `cost_attention` takes them.
        update: of `UPDATES`.
        tau: > 0.

    Returns:
        (layers,), positive, adding up to 1, of the type of the first masses or float32; computed in float64.

    Raises:
        ValueError: for another word.

    >>> flow, equal = torch.eye(2) / 2, torch.tensor([0.5, 0.5])
    >>> costs = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> shared_cost_attention([(flow, cost, equal) for cost in costs])
    tensor([0.6071, 0.3929])
    """
    if update not in UPDATES:
        raise ValueError(f"update '{update}' is not one of {', '.join(UPDATES)}")
    found = torch.stack([_first_masses(*each, update, tau) for each in transports]).mean(dim=0)
    if update == "softmax2":
        found = found.softmax(dim=0)
    return found.to(torch.promote_types(transports[0][2].dtype, torch.float32))


def _first_masses(flow: Tensor, cost: Tensor, mass: Tensor, update: str, tau: float) -> Tensor:
    """Masses of one transport after the first normalisation, in float64."""
    unit = (flow.double() * cost.double()).sum(dim=1) / mass.double().clamp(min=SMALLEST)
    total = unit.sum()
    inverse = torch.where(unit > 0, total / unit.clamp(min=float(SMALLEST * total)), 0.0)
    if update == "softmax2":  # the second lifts every mass far above the least
        return (inverse / tau).softmax(dim=0)
    if update == "softmax":
        found = (inverse / tau).softmax(dim=0)
    else:
        found = inverse / inverse.sum() if total > 0 else torch.ones_like(unit)
    found = found.clamp(min=SMALLEST)
    return found / found.sum()


def _solver():  # type: ignore[no-untyped-def]  # POT has no types
    # POT looks for every array library there is as it is imported: seconds and messages of libraries that kd does not use.
    for library in ("JAX", "CUPY", "TENSORFLOW"):
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{library}", "1")
    import ot

    return ot
