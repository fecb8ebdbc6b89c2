"""Samples that word embeddings moved along a gradient give, and the map between two tables of word embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.functional.hidden import at_least_float32, unit

OUTPUTS = ("logits", "probabilities")


def transfer_matrix(student: Tensor, teacher: Tensor, ridge: float = 1e-6) -> Tensor:
    r"""Return Q of :math:`W_T \approx Q W_S`, the least-squares map from a student's word embeddings to a teacher's.

    :math:`Q = W_T W_S^\top (W_S W_S^\top + \rho I)^{-1}`, with words as columns, in float64. No gradient flows through it.

    Source: Jafari, Rezagholizadeh, Ghodsi, arXiv:2301.12006, without the ridge (our choice).

    Args:
        student: (vocabulary, width of the student), one word a row.
        teacher: (vocabulary, width of the teacher), the same words.
        ridge: rho as a multiple of the mean eigenvalue of the Gram matrix, at least 0. Without one a table of less than full
            rank has no inverse.

    Returns:
        (width of the teacher, width of the student), in float32 at least; the identity if the tables are equal.

    Raises:
        ValueError: if the tables have different numbers of words.

    >>> words = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    >>> transfer_matrix(words, 3 * words, ridge=0)
    tensor([[3., 0.],
            [0., 3.]])
    """
    if len(student) != len(teacher):
        raise ValueError(f"the tables have {len(student)} and {len(teacher)} words")
    student, teacher = at_least_float32(student.detach()), at_least_float32(teacher.detach())
    eye = torch.eye(student.shape[1], dtype=student.dtype, device=student.device)
    if student.shape == teacher.shape and torch.equal(student, teacher):
        return eye
    place = "cpu" if student.device.type == "mps" else student.device  # which has no float64
    ours, theirs = student.to(place).double(), teacher.to(place).double()
    gram = ours.T @ ours
    gram = gram + ridge * gram.diagonal().mean() * eye.to(gram)
    return torch.linalg.solve(gram, ours.T @ theirs).T.to(student)  # type: ignore[no-any-return]


def divergence(student: Tensor, teacher: Tensor, outputs: str = "logits") -> Tensor:
    r"""Return :math:`\| T(x) - S(x) \|_2^2` of each example; gradient flows to both sides.

    Source: Jafari, Rezagholizadeh, Ghodsi, arXiv:2301.12006.

    Args:
        student: (batch, classes) logits; one class is the score of a regression.
        teacher: (batch, classes) logits.
        outputs: whether they are compared as they are, `logits`, or their softmax is, `probabilities`.

    Returns:
        (batch,), in float32 at least.

    Raises:
        ValueError: if the shapes differ, or for other outputs.

    >>> divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]]))
    tensor([5.])
    """
    if student.shape != teacher.shape:
        raise ValueError(f"logits of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs '{outputs}' are not one of {', '.join(OUTPUTS)}")
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if outputs == "probabilities":
        student, teacher = student.softmax(dim=-1), teacher.softmax(dim=-1)
    return (teacher - student).square().sum(dim=-1)


def gradient_by_words(values: Tensor, logits: Sequence[Tensor], words: Tensor) -> Tensor:
    """Return the gradient of each example's value with respect to its words; none reaches a parameter.

    A value may be so close to its minimum that its gradient underflows half precision inside a model. So the gradient with
    respect to the logits is taken first, and divided by its largest entry in an example while it passes through the models.

    Args:
        values: (batch,), each a function of its own example's logits.
        logits: of each model, (batch, classes), in the graph between words and values; all models are functions of the words.
        words: (batch, tokens, width), which require a gradient.

    Returns:
        (batch, tokens, width), in float32 at least.
    """
    slopes = torch.autograd.grad(values.sum(), list(logits))
    largest = torch.stack([at_least_float32(slope).abs().amax(dim=-1) for slope in slopes]).amax(dim=0)
    factor = torch.where(largest > 0, largest, 1.0)
    scaled = [(at_least_float32(slope) / factor[:, None]).to(slope.dtype) for slope in slopes]
    (gradient,) = torch.autograd.grad(list(logits), words, scaled)
    return at_least_float32(gradient) * factor[:, None, None]


def ascend(words: Tensor, gradient: Tensor, movable: Tensor, size: float | Tensor, *, normalize: bool = False) -> Tensor:
    r"""Return words after a step of gradient ascent, :math:`x + \eta \nabla D(x)`, that moves movable tokens only.

    Source: Jafari, Rezagholizadeh, Ghodsi, arXiv:2301.12006; the normalisation is our choice.

    Args:
        words: (batch, tokens, width).
        gradient: the same shape.
        movable: (batch, tokens), bool; the others, such as padding, keep their values exactly.
        size: eta; with `normalize` the root mean square, over an example's movable tokens, of the lengths of their steps.
        normalize: whether an example's gradient is scaled to that length; one of zeros stays zero.

    Returns:
        (batch, tokens, width), in float32 at least.

    >>> ascend(torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0), torch.tensor([[True]]), 0.1).item()  # doctest: +ELLIPSIS
    1.2000...
    """
    step = at_least_float32(gradient).masked_fill(~movable[..., None], 0)
    if normalize:
        step = unit(step.flatten(1)).view_as(step) * _root_count(movable, step)
    return at_least_float32(words) + size * step


def within(words: Tensor, start: Tensor, movable: Tensor, radius: float | Tensor) -> Tensor:
    """Return words no further from where they started than a radius: an example that is, is moved back along its shift.

    Args:
        words: (batch, tokens, width).
        start: the same shape.
        movable: (batch, tokens), bool.
        radius: largest root mean square, over an example's movable tokens, of the lengths of their shifts.

    Returns:
        (batch, tokens, width), in float32 at least.
    """
    start = at_least_float32(start)
    shift = at_least_float32(words) - start
    length, most = _length(shift), radius * _root_count(movable, shift)
    beyond = length > most
    return start + torch.where(beyond, most / torch.where(beyond, length, 1.0), 1.0) * shift


def noise_like(shift: Tensor, noise: Tensor, movable: Tensor) -> Tensor:
    """Return noise at the movable tokens, scaled to the Euclidean norm that each example's shift has.

    Args:
        shift: (batch, tokens, width).
        noise: the same shape.
        movable: (batch, tokens), bool.

    Returns:
        (batch, tokens, width), in float32 at least.
    """
    noise = at_least_float32(noise).masked_fill(~movable[..., None], 0)
    return unit(noise.flatten(1)).view_as(noise) * _length(at_least_float32(shift))


def gaussian(uniform: Tensor) -> Tensor:
    """Return standard normal numbers for uniform ones in [0, 1) that are multiples of 2^-53, as `Step.draws` returns them.

    >>> gaussian(torch.tensor([0.5, 0.975], dtype=torch.float64))
    tensor([0.0000, 1.9600], dtype=torch.float64)
    """
    return torch.special.ndtri(at_least_float32(uniform).clamp(min=2.0**-54))  # type: ignore[no-any-return]


def _length(shift: Tensor) -> Tensor:
    """Return the Euclidean norm of each example's tensor, (batch, 1, 1)."""
    return torch.linalg.vector_norm(shift, dim=(1, 2), keepdim=True)  # type: ignore[no-any-return]


def _root_count(movable: Tensor, like: Tensor) -> Tensor:
    """Return the square root of the number of movable tokens of each example, (batch, 1, 1)."""
    return movable.sum(dim=1).to(like.dtype).sqrt()[:, None, None]
