"""Linear probe: what a linear classifier reads from frozen representations."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kd.functional.similarity import EQUAL

ITERATIONS = 200
"""Largest number of iterations of L-BFGS. Our choice: a few times what standardised features need."""


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardised features.

    Attributes:
        mean: (width,), subtracted from the features.
        scale: (width,), by which they are divided then.
        weight: (classes, width).
        bias: (classes,).
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return logits, (examples, classes), for features, (examples, width)."""
        return F.linear((features.double() - self.mean) / self.scale, self.weight, self.bias)


def fit_linear_probe(features: Tensor, labels: Tensor, classes: int, c: float = 1.0) -> LinearProbe:
    r"""Fit a probe: minimise :math:`C \sum_i CE_i + \frac12 \|W\|_F^2` by L-BFGS over all examples, from zero weights.

    The features are standardised by their mean and standard deviation over these examples, so that the same C regularises
    models with states of another scale alike; one that varies by rounding alone is left as it is, so that no probe reads the
    rounding. The bias is not regularised. Alain and Bengio, arXiv:1610.01644, propose linear
    probes; budget, regularisation and standardisation are our choice. All is computed in float64 and is the same each time.

    Args:
        features: (examples, width); no gradient flows to them.
        labels: (examples,), class indices.
        classes: number of classes.
        c: > 0, the inverse strength of the regularisation, as in scikit-learn's `LogisticRegression`.
    """
    given = features.detach().double()
    mean, scale = given.mean(dim=0), given.std(dim=0, correction=0)
    scale = torch.where(scale > EQUAL * given.square().mean(dim=0).sqrt(), scale, 1.0)
    inputs = (given - mean) / scale
    weight = torch.zeros(classes, given.shape[1], dtype=torch.double, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=1e-9,
        tolerance_change=1e-16,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        # Divided by C and the number of examples, so that the tolerances are those of a loss of order 1.
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + weight.square().sum() / (2 * c * len(labels))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
    return LinearProbe(mean, scale, weight.detach(), bias.detach())
