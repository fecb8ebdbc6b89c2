"""What keeps a step from doing harm: losses, gradients and weights that are no number, gradients that are too large."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kd import distributed, hardware
from kd.errors import InputError

LATEST = 8
"""Steps after which, at the latest, an accelerator's losses are looked at. Our choice: waiting once in so many steps costs
nothing that can be measured, and little is trained in vain."""


class NonFiniteLoss(InputError):
    """A term became NaN or infinite. Training stops; the last good checkpoint is kept."""

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
    """Gradients or weights became NaN or infinite although the loss was finite. The last good checkpoint is kept."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(
            f"{what} not finite at step {step}, although the loss is. Training stopped; the last checkpoint before it is kept. "
            "A smaller learning rate, or trainer.precision=32-true, is the usual cure",
            "optimizer.lr",
        )
        self.step = step


def check_weights_finite(named: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Stop before weights that are no number are scored or written. The step that ruins them may be the last one.

    Args:
        named: parameters by name; those that are frozen are left out.
        step: of the optimiser.

    Raises:
        NonFiniteWeights: naming the first parameter.
    """
    trained = [(name, parameter.detach()) for name, parameter in named if parameter.requires_grad]
    if trained and not (finite := torch.stack([weights.isfinite().all() for _, weights in trained])).all():
        bad = [name for (name, _), good in zip(trained, finite.tolist(), strict=True) if not good]
        raise NonFiniteWeights(f"{len(bad)} of {len(trained)} weights, the first of them {bad[0]}, are", step)


class NonFiniteGuard:
    """Notices losses that are no number.

    On the CPU it does so at once, before anything moves. A look at a loss on an accelerator would wait for the device in every
    step, so there losses are kept and looked at together: after `LATEST` of them, and before anything is written. What is
    trained in between is lost, and no checkpoint has it.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[int, Tensor, dict[str, Tensor]]] = []

    def record(self, total: Tensor, terms: Mapping[str, Tensor], step: int) -> None:
        """A loss, before it moves anything.

        Args:
            total: the sum, a scalar.
            terms: what it was made from, scalars.
            step: of the optimiser.

        Raises:
            NonFiniteLoss: naming the term and the step of this loss, or of one before it.
        """
        self.kept.append((step, total.detach(), {name: term.detach() for name, term in terms.items()}))
        if not hardware.is_asynchronous(total) or len(self.kept) >= LATEST:
            self._raise(self.check())

    def check_gradient(self, norm: Tensor, step: int) -> None:
        """A gradient's norm, before the optimiser uses it. One on an accelerator is not looked at: it shows in the weights.

        Args:
            norm: a scalar.
            step: of the optimiser.

        Raises:
            NonFiniteWeights: if it is NaN or infinite.
        """
        if not hardware.is_asynchronous(norm) and not norm.isfinite():
            raise NonFiniteWeights(f"the gradient (norm {float(norm):g}) is", step)

    def flush(self) -> None:
        """Look at whatever is left, before a checkpoint is written. Under DDP with an accelerator all ranks do so together.

        Raises:
            NonFiniteLoss: on every rank, if one of them has found it.
        """
        waiting = any(hardware.is_asynchronous(total) for _, total, _ in self.kept)
        found = self.check()
        if waiting:
            found = next((each for each in distributed.gather(found) if each is not None), None)
        self._raise(found)

    def check(self) -> tuple[dict[str, float], int] | None:
        """Terms and step of the first kept loss that is no number; forgets all that are kept."""
        kept, self.kept = self.kept, []
        if not kept or torch.stack([total for _, total, _ in kept]).isfinite().all():
            return None
        step, terms = next((step, terms) for step, total, terms in kept if not total.isfinite())
        return {name: float(term) for name, term in terms.items()}, step

    @staticmethod
    def _raise(found: tuple[dict[str, float], int] | None) -> None:
        if found is not None:
            raise NonFiniteLoss(*found)


def clip_gradients(parameters: Sequence[nn.Parameter], bound: float) -> Tensor:
    """Scale gradients to a norm of at most `bound`, to the bit as `torch.nn.utils.clip_grad_norm_` does; their norm before.

    Torch multiplies also by one, because asking whether it has to would wait for an accelerator. On the CPU it is cheaper to
    ask than to write the gradient of an embedding table once more.
    """
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if hardware.is_asynchronous(norm) or not bound / (norm + 1e-6) >= 1:  # also for a norm that is no number
        nn.utils.clip_grads_with_norm_(parameters, bound, norm)
    return norm
