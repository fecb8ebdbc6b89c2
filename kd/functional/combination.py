"""Distillation from several teacher layers at once: maps from student layers to sets of them, concatenation, attention."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kd.errors import InputError, one_of
from kd.functional.hidden import at_least_float32, unit
from kd.functional.layer_maps import Blocks

NORMALIZATIONS = ("concatenation", "layers", "none")
"""Vectors that are scaled to unit length: the whole concatenation, each layer's part of it, or none."""
REDUCTIONS = ("elements", "vectors", "layers", "examples", "tokens", "sum", "none")
"""Reductions of `reduce_layers`."""


def regular(student: int, teacher: int) -> Blocks:
    """Return consecutive groups that share no layer: regular combination (RC), non-overlapping buckets (NO).

    Source: Wu et al., CKD, arXiv:2010.03034; Passban et al., ALP-KD, arXiv:2012.14022. If the depths do not divide, group j
    ends with layer j * teacher / student, rounded down (our choice).

    >>> regular(2, 6)
    ((1, (1, 2, 3)), (2, (4, 5, 6)))
    """
    ends = [layer * teacher // student for layer in range(student + 1)]
    return tuple((layer, tuple(range(ends[layer - 1] + 1, ends[layer] + 1))) for layer in range(1, student + 1))


def overlap(student: int, teacher: int) -> Blocks:
    """Return the groups of `regular`, each with one more layer of each neighbouring group: OC, partially overlapping buckets.

    >>> overlap(2, 6)
    ((1, (1, 2, 3, 4)), (2, (3, 4, 5, 6)))
    """
    return tuple(
        (layer, tuple(range(max(group[0] - 1, 1), min(group[-1] + 1, teacher) + 1)))
        for layer, group in regular(student, teacher)
    )


def skip_middle(student: int, teacher: int) -> Blocks:
    """Return the groups of `regular` without the layer that is nearest to the teacher's middle: skip combination (SC).

    The paper has two groups only. With more, one that lies across the middle is not cut, nor is one of a single layer (our
    choices).

    >>> skip_middle(2, 6)
    ((1, (1, 2)), (2, (5, 6)))
    >>> skip_middle(4, 12)
    ((1, (1, 2)), (2, (4, 5)), (3, (8, 9)), (4, (11, 12)))
    """

    def cut(group: tuple[int, ...]) -> tuple[int, ...]:
        if len(group) == 1 or (2 * group[0] <= teacher < 2 * group[-1]):
            return group
        return group[:-1] if 2 * group[-1] <= teacher else group[1:]

    return tuple((layer, cut(group)) for layer, group in regular(student, teacher))


def ends(student: int, teacher: int) -> Blocks:
    """Return the first and the last layer of the groups of `regular`: cross combination (CC).

    >>> ends(2, 6)
    ((1, (1, 3)), (2, (4, 6)))
    """
    return tuple((layer, tuple(sorted({group[0], group[-1]}))) for layer, group in regular(student, teacher))


def comb(student: int, teacher: int) -> Blocks:
    """Return, for student layer j of N, every N-th teacher layer from j on; `skip_comb` in the authors' code, not in the paper.

    >>> comb(2, 6)
    ((1, (1, 3, 5)), (2, (2, 4, 6)))
    """
    return tuple((layer, tuple(range(layer, teacher + 1, student))) for layer in range(1, student + 1))


def lasts(student: int, teacher: int) -> Blocks:
    """Return the last layer of the groups of `regular`: the authors' baseline `skip`, patient distillation of every layer.

    >>> lasts(2, 6)
    ((1, (3,)), (2, (6,)))
    """
    return tuple((layer, group[-1:]) for layer, group in regular(student, teacher))


def every(student: int, teacher: int) -> Blocks:
    """Return all teacher layers, without the embeddings, for each student layer.

    >>> every(2, 3)
    ((1, (1, 2, 3)), (2, (1, 2, 3)))
    """
    return tuple((layer, tuple(range(1, teacher + 1))) for layer in range(1, student + 1))


def resolve_groups(
    spec: str | Sequence[Sequence[object]],
    named: Mapping[str, Callable[[int, int], Blocks]],
    student: int,
    teacher: int,
    key: str = "layers",
    lowest: int = 0,
) -> Blocks:
    """Return the groups of a named map, or of an explicit list, checked against both depths.

    Args:
        spec: a name, or a list of [student layer, [teacher layer, ...]] with 0 the embeddings.
        named: name -> function of both depths.
        student: number of blocks of the student.
        teacher: number of blocks of the teacher.
        key: name of the argument that an error names.
        lowest: lowest layer of a list; 1 if embeddings have no tensor of the kind that is compared.

    Raises:
        InputError: for an unknown name, a student deeper than its teacher with a name, an empty list, something that is not
            such a pair, a layer that a model does not have, or a group that is empty or lists a layer twice.
    """
    form = "[student layer, [teacher layer, ...]]"
    if isinstance(spec, str):
        if spec not in named:
            raise one_of(spec, tuple(named), key)
        if student > teacher:
            raise InputError(
                f"the layer map '{spec}' needs a student no deeper than its teacher, got {student} and {teacher} layers; "
                f"give a list of {form} instead",
                key,
            )
        return named[spec](student, teacher)
    if not isinstance(spec, Sequence) or not spec:
        raise InputError(f"'{spec}' is neither a layer map ({', '.join(named)}) nor a list of {form}", key)
    return tuple(_group(pair, (student, teacher), form, key, lowest) for pair in spec)


def _group(pair: object, depths: tuple[int, int], form: str, key: str, lowest: int) -> tuple[int, tuple[int, ...]]:
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise InputError(f"'{pair}' is not a pair {form}", key)
    ours, group = pair
    if not isinstance(group, Sequence) or isinstance(group, str):
        raise InputError(f"'{pair}' is not a pair {form}", key)
    if not all(type(layer) is int for layer in (ours, *group)):
        raise InputError(f"'{pair}' is not a pair {form}: layers are whole numbers", key)
    if not group or len(set(group)) < len(group):
        raise InputError(f"'{pair}' must list at least one teacher layer, and none twice", key)
    for layers, depth, whose in zip(((ours,), group), depths, ("student", "teacher"), strict=True):
        for layer in layers:
            if not lowest <= layer <= depth:
                lowest_layer = f"{lowest}{'' if lowest else ' (embeddings)'}"
                raise InputError(f"'{pair}' asks for layer {layer} of the {whose}; it may be {lowest_layer} to {depth}", key)
    return ours, tuple(group)


def concatenate(layers: Sequence[Tensor], *, normalize: bool = False) -> Tensor:
    """Return the states of several teacher layers in one vector: the target, no gradient flows to it.

    Source: Wu et al., CKD, arXiv:2010.03034.

    Args:
        layers: (..., width) each, in the order of the result.
        normalize: scale each layer's vector to unit length first, which is another loss than scaling the concatenation: there,
            layers with large states have more weight.

    Returns:
        (..., layers * width), float32 at least.

    >>> concatenate([torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])], normalize=True)
    tensor([0.6000, 0.8000, 0.0000, 1.0000])
    """
    wide = [at_least_float32(layer.detach()) for layer in layers]
    return torch.cat([unit(layer) if normalize else layer for layer in wide], dim=-1)


def combination_squares(student: Tensor, teacher: Tensor, normalize: str = "concatenation", parts: int = 1) -> Tensor:
    """Return squared differences of two vectors of which one or both are projections of concatenated layers' or a state.

    Source: Wu et al., CKD, arXiv:2010.03034; authors' code `onmt/utils/loss.py`.

    Args:
        student: (..., width), with the width of `parts` layers.
        teacher: the same shape. Gradient flows to it, because its side may be projected; `concatenate` stops it.
        normalize: `concatenation` scales both vectors to unit length (authors' code); `layers` does it part by part; `none`
            compares them as they are.
        parts: number of equal parts, for `layers`.

    Returns:
        (..., width), to be reduced by `reduce_layers`.

    Raises:
        ValueError: if the shapes differ, or for an unknown normalisation.

    >>> combination_squares(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])).sum().item()  # doctest: +ELLIPSIS
    0.0799...
    """
    if student.shape != teacher.shape:
        raise ValueError(f"states of student and teacher differ in shape: {tuple(student.shape)}, {tuple(teacher.shape)}")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalisation '{normalize}' is not one of {', '.join(NORMALIZATIONS)}")
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if normalize == "none":
        return (student - teacher) ** 2
    divided = (*student.shape[:-1], parts if normalize == "layers" else 1, -1)
    return ((unit(student.reshape(divided)) - unit(teacher.reshape(divided))) ** 2).reshape(student.shape)


def layer_attention(student: Tensor, teacher: Tensor, *, scaled: bool = False) -> Tensor:
    """Return attention weights of a student state over teacher layers: the softmax of its dot products with them.

    Source: Passban et al., ALP-KD, AAAI 2021, arXiv:2012.14022. Products of [CLS] states are of the order of 100, so that an
    exponential in float32 would overflow without the maximum being subtracted, and the weights are often near 0 and 1.

    Args:
        student: (..., width).
        teacher: (..., layers, width); no gradient flows to it.
        scaled: divide the products by the root of the width (not in the paper).

    Returns:
        (..., layers), which adds up to 1 over the layers.

    >>> layer_attention(torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([0.7311, 0.2689])
    """
    student = at_least_float32(student)
    # Products and sums, not a matrix product, which autocast computes in half precision.
    products = (student[..., None, :] * teacher.detach().to(student.dtype)).sum(dim=-1)
    return (products / student.shape[-1] ** 0.5 if scaled else products).softmax(dim=-1)


def attended(weights: Tensor, teacher: Tensor) -> Tensor:
    """Return the weighted sum of teacher layers.

    Args:
        weights: (..., layers), of `layer_attention`.
        teacher: (..., layers, width); no gradient flows to it.

    Returns:
        (..., width).
    """
    weights = at_least_float32(weights)
    return (weights[..., None] * teacher.detach().to(weights.dtype)).sum(dim=-2)


def reduce_layers(squares: Sequence[Tensor], mask: Tensor, reduction: str) -> Tensor:
    """Reduce the squared differences of several student layers, whose widths may differ.

    Args:
        squares: (batch, tokens, width), one for each student layer; one token if they are of [CLS] states alone.
        mask: (batch, tokens), bool, False on padding, which adds nothing; at least one token of every example is real.
        reduction: over width, layers and tokens, in this order:
            `examples` sums over width and layers, averages over the real tokens of an example and then over examples;
            `vectors` averages over the layers instead;
            `layers` averages over the width and sums over the layers;
            `elements` averages over both;
            `tokens` sums as `examples` does and averages over all real tokens of the batch (the normaliser of CKD's code);
            `sum` sums over everything; `none` gives (batch,), whose mean is `examples`.

    Raises:
        ValueError: for any other reduction.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction '{reduction}' is not one of {', '.join(REDUCTIONS)}")
    wide = [at_least_float32(layer) for layer in squares]
    rows = torch.stack([layer.mean(dim=-1) if reduction in ("layers", "elements") else layer.sum(dim=-1) for layer in wide])
    values = rows.mean(dim=0) if reduction in ("vectors", "elements") else rows.sum(dim=0)
    totals = values.masked_fill(~mask, 0).sum(dim=1)
    if reduction == "sum":
        return totals.sum()
    if reduction == "tokens":
        return totals.sum() / mask.sum()
    means = totals / mask.sum(dim=1)
    return means if reduction == "none" else means.mean()
