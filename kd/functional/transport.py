"""Optimal transport between layers, and updates of the layers' masses."""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

MASS_UPDATES = ("softmax2", "softmax", "sum")
"""Functions from inverse unit costs to masses: two softmaxes, one softmax, or division by their sum."""

SMALLEST_SHARE = 1e-8
"""Smallest mass of a layer, and smallest unit cost as a share of the sum over all layers."""

RESOLVED = 1e6
"""Largest ratio of the highest cost to the plan's at which the solver's tolerance, about 1e-13 of the former, is negligible."""


def transport_plan(cost: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return the cheapest plan that moves one distribution of mass into another, solved exactly (earth mover's distance).

    :math:`F = argmin_{F >= 0} sum_ij F_ij D_ij` with row sums `source` and column sums `target`; solved on the CPU in float64
    by the network simplex of POT (Flamary et al., JMLR 2021), whatever the size of the costs. At most sources + targets - 1
    entries are positive. No gradient flows through it.

    Args:
        cost: (sources, targets), D.
        source: (sources,), masses >= 0, adding up to 1.
        target: (targets,), masses >= 0, adding up to 1.

    Returns:
        (sources, targets), on the cost's device, in its type or float32 if that is narrower.

    Raises:
        ValueError: for shapes that do not match, a cost that is not finite, or masses that are negative or do not add up to 1.

    >>> transport_plan(torch.tensor([[1.0, 3.0]]), torch.tensor([1.0]), torch.tensor([0.5, 0.5]))
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
    """Return the cheapest plan; all arguments are in float64 on the CPU.

    The solver treats reduced costs as zero below a tolerance proportional to 1 + the largest cost, so costs are divided by
    the largest. If the cost of the plan is tiny compared with that, the differences that matter are below the tolerance. A
    plan that is optimal after lowering costs of pairs it does not use is also optimal before, so the largest costs are
    lowered, which brings the others into the solver's range, for as long as that makes the plan cheaper.
    """
    best, paid = torch.outer(source, target), math.inf
    ceiling = float(cost.abs().max())
    while True:
        scale = ceiling if ceiling > 0 else 1.0
        solution, log = _solver().emd(source.numpy(), target.numpy(), (cost.clamp(max=ceiling) / scale).numpy(), log=True)
        if log["warning"] is not None:
            raise ValueError(f"no transport plan was found: {log['warning']}")
        flow = torch.from_numpy(solution)
        price = float((flow * (cost / scale)).sum()) * scale
        if not price < paid:
            return best
        best, paid = flow, price
        if not 0 < price * RESOLVED < ceiling:
            return best
        ceiling = price * RESOLVED


def cost_attention(flow: Tensor, cost: Tensor, mass: Tensor, update: str = "softmax2", tau: float = 1.0) -> Tensor:
    r"""Return the next masses of the layers: layers whose transport was cheap get more.

    Unit costs :math:`u_i = \sum_j F_{ij} D_{ij} / w_i`, their inverses :math:`v_i = \sum_k u_k / u_i`, then
    `softmax2`: :math:`softmax(softmax(v / \tau))`; `softmax`: :math:`softmax(v / \tau)`; `sum`: :math:`v / \sum v`.

    Source: Li et al., BERT-EMD, arXiv:2010.06133, cost attention; authors' code `bert_emd/emd_task_distill.py`. `softmax` is
    the paper, `softmax2` the code of its experiments, `sum` the authors' later code.

    As in the authors' code, :math:`v_i = 0` if :math:`u_i = 0`: a layer whose transport costs nothing gets the least mass,
    although one whose transport costs almost nothing gets the most. With `sum` their code divides by zero at the next step, or
    at once if all costs are 0. Ours never does (our choice): a unit cost counts as at least `SMALLEST_SHARE` of the sum of all,
    masses are equal if all costs are 0, and every mass is at least `SMALLEST_SHARE` before they are normalised to add up to 1.

    Args:
        flow: (layers, others), the plan F; transposed for the masses of its columns.
        cost: (layers, others), the costs D that the plan was solved for.
        mass: (layers,), the masses w that the plan was solved with.
        update: one of `MASS_UPDATES`.
        tau: temperature > 0; a large one makes the masses more equal. Not used by `sum`.

    Returns:
        (layers,), positive, adding up to 1, of the type of `mass` or float32 if that is narrower; computed in float64.

    Raises:
        ValueError: for an unknown update.

    >>> flow, cost = torch.tensor([[0.5], [0.5]]), torch.tensor([[1.0], [3.0]])
    >>> cost_attention(flow, cost, torch.tensor([0.5, 0.5]), "sum")
    tensor([0.7500, 0.2500])
    """
    return shared_cost_attention([(flow, cost, mass)], update, tau)


def shared_cost_attention(
    transports: Sequence[tuple[Tensor, Tensor, Tensor]], update: str = "softmax2", tau: float = 1.0
) -> Tensor:
    r"""Return the next masses of layers that several transports share: the mean of each transport's masses.

    For `softmax2` the *first* softmax is applied to each transport and the second to their mean,
    :math:`softmax(\frac{1}{n} \sum_a softmax(v^a / \tau))`, which is not the mean of `softmax2`'s masses.

    Source: the authors' code, see `cost_attention`; there attention and hidden states share their masses.

    Args:
        transports: (flow, cost, mass) of each transport, the arguments of `cost_attention`.
        update: one of `MASS_UPDATES`.
        tau: temperature > 0.

    Returns:
        (layers,), positive, adding up to 1, of the type of the first masses or float32; computed in float64.

    Raises:
        ValueError: for an unknown update.

    >>> flow, equal = torch.eye(2) / 2, torch.tensor([0.5, 0.5])
    >>> costs = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> shared_cost_attention([(flow, cost, equal) for cost in costs])
    tensor([0.6071, 0.3929])
    """
    if update not in MASS_UPDATES:
        raise ValueError(f"update '{update}' is not one of {', '.join(MASS_UPDATES)}")
    masses = torch.stack([_first_masses(*transport, update, tau) for transport in transports]).mean(dim=0)
    if update == "softmax2":
        masses = masses.softmax(dim=0)
    return masses.to(torch.promote_types(transports[0][2].dtype, torch.float32))


def _first_masses(flow: Tensor, cost: Tensor, mass: Tensor, update: str, tau: float) -> Tensor:
    """Return the masses of one transport after the first normalisation, in float64."""
    unit = (flow.double() * cost.double()).sum(dim=1) / mass.double().clamp(min=SMALLEST_SHARE)
    total = unit.sum()
    inverse = torch.where(unit > 0, total / unit.clamp(min=float(SMALLEST_SHARE * total)), 0.0)
    if update == "softmax2":  # the second softmax makes every mass much larger than SMALLEST_SHARE
        return (inverse / tau).softmax(dim=0)
    if update == "softmax":
        masses = (inverse / tau).softmax(dim=0)
    else:
        masses = inverse / inverse.sum() if total > 0 else torch.ones_like(unit)
    masses = masses.clamp(min=SMALLEST_SHARE)
    return masses / masses.sum()


def _solver():  # type: ignore[no-untyped-def]  # POT has no types
    # POT imports every array library it supports, which takes seconds and prints messages of libraries that kd does not use.
    for library in ("JAX", "CUPY", "TENSORFLOW"):
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{library}", "1")
    import ot

    return ot
