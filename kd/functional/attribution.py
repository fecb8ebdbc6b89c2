"""Attribution of a decision to tokens: integrated gradients with respect to hidden states, and losses between their maps."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kd.functional.hidden import at_least_float32, mean_over_real, unit

DIFFERENTIATED = ("loss", "logit")
DISTANCES = ("l2", "l1", "smooth_l1")
ATTRIBUTION_REDUCTIONS = ("examples", "tokens", "norm", "none")


def odds(logits: Tensor) -> list[Tensor]:
    """Return the log-odds against each class, log of (1 - p) / p, (batch,) each; for two classes only the first's.

    Args:
        logits: (batch, classes).
    """
    logits, classes = at_least_float32(logits), logits.shape[-1]
    against = []
    for index in range(1 if classes == 2 else classes):
        others = [logits[:, other] for other in range(classes) if other != index]
        against.append(torch.stack(others, dim=-1).logsumexp(dim=-1) - logits[:, index])
    return against


def scores(logits: Tensor, target: str = "loss") -> list[Tensor]:
    """Return the quantity that is differentiated for each view, (batch,) each: the logits, or for `loss` the log-odds.

    The loss of a class is the softplus of the log-odds against it. The derivative of softplus is applied in `attributions`,
    because for a confident model it is too small for float16 and, close to zero, for any type.

    Args:
        logits: (batch, classes); a single class is the score of a regression.
        target: `loss` is the negative log-probability of each class in turn; for two classes only of the first, because the
            gradient of the second differs by a factor in each pass. `logit` is each logit.

    Raises:
        ValueError: for any other target.
    """
    if target not in DIFFERENTIATED:
        raise ValueError(f"target '{target}' is not one of {', '.join(DIFFERENTIATED)}")
    return odds(logits) if _is_loss(logits, target) else list(at_least_float32(logits).unbind(dim=-1))


def _is_loss(logits: Tensor, target: str) -> bool:
    """Return whether losses are attributed instead of outputs; for a regression the score is, whatever the target."""
    return target == "loss" and logits.shape[-1] > 1


def attributions(
    passes: Sequence[tuple[Tensor, Tensor]], target: str = "loss", *, create_graph: bool = False, first: int = 0
) -> Tensor:
    r"""Return integrated gradients with a baseline of zero: :math:`s = h \odot \frac{1}{m} \sum_k \partial F(\frac{k}{m} h)`.

    Source: Sundararajan, Taly, Yan, ICML 2017, arXiv:1703.01365, eq. 3; Wu et al., AD-KD, ACL 2023, arXiv:2305.10010.

    A loss's derivative with respect to the log-odds is about e to minus the margin, which underflows if a model is certain.
    Maps are normalised later, which removes any factor of an example, so derivatives are divided by the largest of all passes:
    none is above 1, one is 1, and they are computed as differences of logarithms, whatever the margin.

    Args:
        passes: for k = 1 to m, the logits (batch, classes) of the forward pass with states scaled by k/m, and those states,
            (batch, tokens, width), in its graph; the last are the unscaled states. One pass is the gradient times the input.
        target: see `scores`.
        create_graph: whether to record a graph, so that a loss of the result can be differentiated.
        first: for two classes and `loss`, the index of the class whose loss is attributed; with several passes the views of
            the two differ.

    Returns:
        (batch, tokens, width, views), up to a factor for each example and view, in float32 at least.
    """
    count = passes[0][0].shape[-1]
    single = count == 2 and _is_loss(passes[0][0], target)
    by_pass = [scores(logits.flip(-1) if single and first else logits, target) for logits, _ in passes]
    views = []
    for of_view in zip(*by_pass, strict=True):
        factors = [torch.ones_like(score) for score in of_view]
        if _is_loss(passes[0][0], target):
            slopes = torch.stack([F.logsigmoid(against) for against in of_view])
            factors = list((slopes - slopes.detach().amax(dim=0)).exp())
        gradients = [
            torch.autograd.grad(score, at, factor, create_graph=create_graph, retain_graph=True)[0]
            for score, (_, at), factor in zip(of_view, passes, factors, strict=True)
        ]
        views.append(torch.stack([at_least_float32(gradient) for gradient in gradients]).mean(dim=0))
    states = at_least_float32(passes[-1][1])
    return states[..., None] * torch.stack(views, dim=-1)


def token_maps(attributed: Tensor, keep: int | None = None) -> Tensor:
    """Return the Euclidean norm of each token's attribution.

    Args:
        attributed: (batch, tokens, width, views).
        keep: K, number of a token's entries that count, those largest in absolute value; None for all.

    Returns:
        (batch, tokens, views), at least 0.
    """
    attributed = at_least_float32(attributed)
    if keep is not None and keep < attributed.shape[2]:
        largest = attributed.abs().topk(keep, dim=2).indices
        attributed = torch.zeros_like(attributed).scatter(2, largest, attributed.gather(2, largest))
    lengths: Tensor = torch.linalg.vector_norm(attributed, dim=2)
    return lengths


def map_error(
    student: Tensor, teacher: Tensor, mask: Tensor, distance: str = "l2", norm: float = 2.0, reduction: str = "examples"
) -> Tensor:
    """Return the distance between normalised attribution maps, summed over views.

    Source: Wu et al., AD-KD, ACL 2023, arXiv:2305.10010; authors' code `loss.py`.

    Args:
        student: (batch, tokens, views), as `token_maps` returns them.
        teacher: the same shape; the target, no gradient flows to it.
        mask: (batch, tokens), bool, False on padding, where maps are 0.
        distance: `l2`, the square of a token's difference; `l1`; `smooth_l1`.
        norm: p of the norm over an example's tokens that maps are divided by.
        reduction: `examples` averages over the real tokens of an example, then over the examples (our choice: no example
            depends on the others); `tokens` averages over the real tokens of the batch (authors' code, which counts the tokens
            whose map is not 0); `norm` is the Euclidean norm of an example's differences, all views together, averaged over
            the examples (paper); `none` gives (batch,), whose mean is `examples`, and not `tokens`, which weights examples by
            their lengths, or `norm`.

    Raises:
        ValueError: if the shapes differ, or for an unknown distance or reduction.

    >>> maps = torch.tensor([[[3.0], [4.0]]]), torch.tensor([[[3.0], [2.0]]])
    >>> round(map_error(*maps, torch.ones(1, 2).bool()).item(), 6)
    0.05701
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance '{distance}' is not one of {', '.join(DISTANCES)}")
    if student.shape != teacher.shape:
        raise ValueError(f"maps of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    student = at_least_float32(student)
    student, teacher = (unit(maps, dim=1, norm=norm) for maps in (student, teacher.detach().to(student.dtype)))
    if reduction == "norm":
        distances: Tensor = torch.linalg.vector_norm((student - teacher).flatten(1), dim=1)
        return distances.mean()
    errors = {"l2": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[distance](student, teacher, reduction="none")
    errors = errors.sum(dim=-1)
    if reduction == "tokens":
        return errors[mask].mean()
    if reduction not in ("examples", "none"):
        raise ValueError(f"reduction '{reduction}' is not one of {', '.join(ATTRIBUTION_REDUCTIONS)}")
    return mean_over_real(errors, mask, "strict", "mean" if reduction == "examples" else "none")
