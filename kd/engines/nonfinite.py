"""Checks for losses, gradients and weights that are not finite, and gradient clipping."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kd.errors import InputError
from kd.system import distributed, hardware

LATEST = 8
"""Largest number of steps after which an accelerator's losses are checked. Our choice: synchronising once in 8 steps has no
measurable cost, and few steps are lost if a loss is not finite."""


class NonFiniteLoss(InputError):
    """Error raised when a loss term became NaN or infinite. Training stops; the last good checkpoint is kept."""

    def __init__(self, terms: Mapping[str, float], step: int) -> None:
        bad = [name for name, value in terms.items() if not torch.isfinite(torch.tensor(value))]
        shown = ", ".join(f"{name}={value:g}" for name, value in terms.items())
        super().__init__(
            f"the loss is not finite at step {step}: term {' and '.join(f'{name!r}' for name in bad) or 'sum'} ({shown}). "
            "Training stopped; the last checkpoint before it is kept. A smaller learning rate, or a smaller weight "
            "for that term, is the usual cure",
            "optimizer.lr",
        )
        self.terms, self.step = dict(terms), step


class NonFiniteWeights(InputError):
    """Error raised when gradients or weights became NaN or infinite with a finite loss. The last good checkpoint is kept."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(
            f"{what} not finite at step {step}, although the loss is. Training stopped; the last checkpoint before it is kept. "
            "A smaller learning rate, or trainer.precision=32-true, is the usual cure",
            "optimizer.lr",
        )
        self.step = step


def check_weights_finite(named: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Check that weights are finite before they are scored or written: no loss is computed after the last step.

    Args:
        named: parameters by name; frozen ones are not checked.
        step: optimiser step, for the message.

    Raises:
        NonFiniteWeights: naming the first parameter.
    """
    trained = [(name, parameter.detach()) for name, parameter in named if parameter.requires_grad]
    if trained and not (finite := torch.stack([weights.isfinite().all() for _, weights in trained])).all():
        bad = [name for (name, _), good in zip(trained, finite.tolist(), strict=True) if not good]
        raise NonFiniteWeights(f"{len(bad)} of {len(trained)} weights, the first of them {bad[0]}, are", step)


class NonFiniteGuard:
    """Detector of losses that are not finite.

    On the CPU a loss is checked at once, before the optimiser step. On an accelerator each check would synchronise with the
    device, so losses are collected and checked together: after `LATEST` of them, and before anything is written. The steps
    trained in between are lost, and are in no checkpoint.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[int, Tensor, dict[str, Tensor]]] = []

    def record(self, total: Tensor, terms: Mapping[str, Tensor], step: int) -> None:
        """Record a loss before the optimiser step; on the CPU it is checked at once.

        Args:
            total: the weighted sum, a scalar.
            terms: its unweighted terms, scalars.
            step: optimiser step.

        Raises:
            NonFiniteLoss: naming the term and the step of this loss, or of an earlier one.
        """
        self.kept.append((step, total.detach(), {name: term.detach() for name, term in terms.items()}))
        if not hardware.is_asynchronous(total) or len(self.kept) >= LATEST:
            self._raise(self.check())

    def check_gradient(self, norm: Tensor, step: int) -> None:
        """Check a gradient norm before the optimiser step; not on an accelerator, where the check of the weights finds it.

        Args:
            norm: a scalar.
            step: optimiser step.

        Raises:
            NonFiniteWeights: if it is NaN or infinite.
        """
        if not hardware.is_asynchronous(norm) and not norm.isfinite():
            raise NonFiniteWeights(f"the gradient (norm {float(norm):g}) is", step)

    def flush(self) -> None:
        """Check the remaining losses before a checkpoint is written. Under DDP with an accelerator it is a collective call.

        Raises:
            NonFiniteLoss: on every rank, if one of them has a loss that is not finite.
        """
        asynchronous = any(hardware.is_asynchronous(total) for _, total, _ in self.kept)
        failure = self.check()
        if asynchronous:
            failure = next((other for other in distributed.gather(failure) if other is not None), None)
        self._raise(failure)

    def check(self) -> tuple[dict[str, float], int] | None:
        """Return terms and step of the first recorded loss that is not finite, or None; the records are cleared."""
        losses, self.kept = self.kept, []
        if not losses or torch.stack([total for _, total, _ in losses]).isfinite().all():
            return None
        step, terms = next((step, terms) for step, total, terms in losses if not total.isfinite())
        return {name: float(term) for name, term in terms.items()}, step

    @staticmethod
    def _raise(found: tuple[dict[str, float], int] | None) -> None:
        if found is not None:
            raise NonFiniteLoss(*found)


def clip_gradients(parameters: Sequence[nn.Parameter], bound: float) -> Tensor:
    """Scale gradients to a norm of at most `bound`, bit for bit like `torch.nn.utils.clip_grad_norm_`; return the norm before.

    Torch multiplies even by one, because a comparison would synchronise with an accelerator. On the CPU the comparison is
    cheaper than writing the gradient of an embedding table once more.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if hardware.is_asynchronous(norm) or not bound / (norm + 1e-6) >= 1:  # also true for a NaN norm
        nn.utils.clip_grads_with_norm_(parameters, bound, norm)
    return norm
