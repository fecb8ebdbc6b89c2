"""Layer maps: pairs of student and teacher layers that are compared.

Layer 0 is the embedding output, layer *l* the output of block *l*; a pair is (student layer, teacher layer).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kd.errors import InputError, one_of

Pairs = tuple[tuple[int, int], ...]
"""Pairs of (student layer, teacher layer)."""

Blocks = tuple[tuple[int, tuple[int, ...]], ...]
"""Pairs of a student layer and the teacher layers whose mean it is compared with."""


def skip(student: int, teacher: int) -> Pairs:
    """Return PKD-Skip: student layers 1 .. N-1 with every (teacher / student)-th teacher layer; the last is not paired.

    Source: Sun et al., arXiv:1908.09355, section 3.2. If the depths do not divide we round down (our choice). The last
    layer is trained through the logits.

    >>> [t for _, t in skip(6, 12)]
    [2, 4, 6, 8, 10]
    """
    return tuple((layer, layer * teacher // student) for layer in range(1, student))


def last(student: int, teacher: int) -> Pairs:
    """Return PKD-Last: student layers 1 .. N-1 with the teacher layers just below its last.

    Source: Sun et al., arXiv:1908.09355, section 3.2.

    >>> [t for _, t in last(6, 12)]
    [7, 8, 9, 10, 11]
    """
    return tuple((layer, teacher - student + layer) for layer in range(1, student))


def uniform(student: int, teacher: int) -> Pairs:
    """Return pairs of every student layer, the embeddings and the last included, with layer * teacher / student.

    Source: Jiao et al., TinyBERT, Findings of EMNLP 2020, arXiv:1909.10351, section 3.1 (its g(m) = 3m for 4 of 12).

    >>> uniform(2, 6)
    ((0, 0), (1, 3), (2, 6))
    """
    return tuple((layer, layer * teacher // student) for layer in range(student + 1))


def proportional(student: int, teacher: int) -> Pairs:
    """Return pairs of the layers below the last at exactly the same fraction of the depth; the student may be the deeper one.

    Source: Cho and Kang, Pea-KD, arXiv:2009.14822, authors' code, whose pairs for students of 2, 3, 4, 6 and 9 layers and a
    teacher of 12 these are. If no fraction is the same we round the teacher's layer down (our choice), leaving out layer 0.

    >>> proportional(9, 12), proportional(2, 12)
    (((3, 4), (6, 8)), ((1, 6),))
    """
    common = math.gcd(student, teacher)
    if common > 1:
        return tuple((layer * student // common, layer * teacher // common) for layer in range(1, common))
    return tuple((ours, theirs) for ours, theirs in ((n, n * teacher // student) for n in range(1, student)) if theirs)


def stages(student: int, teacher: int) -> Pairs:
    """Return pairs of student layers 1 .. N with layer * teacher / student: `uniform` without the embeddings.

    Networks for images are compared at the ends of their stages (Zagoruyko and Komodakis, arXiv:1612.03928); that these are
    blocks of equal size of an encoder is our choice.

    >>> stages(2, 6)
    ((1, 3), (2, 6))
    """
    return uniform(student, teacher)[1:]


def middle(student: int, teacher: int) -> Pairs:
    """Return the pair of middle layers, of odd depths the middle one, of even depths the last of the lower half.

    Source: Romero et al., FitNets, arXiv:1412.6550, section 2.2 (hint and guided layer are middle layers); the rounding is our
    choice.

    >>> middle(3, 12)
    ((2, 6),)
    """
    return (((student + 1) // 2, (teacher + 1) // 2),)


def final(student: int, teacher: int) -> Pairs:
    """Return the pair of last layers.

    >>> final(3, 12)
    ((3, 12),)
    """
    return ((student, teacher),)


NAMED: dict[str, Callable[[int, int], Pairs]] = {"skip": skip, "last": last, "uniform": uniform, "proportional": proportional}

NAMED_FEW = {**NAMED, "stages": stages, "middle": middle, "final": final}
"""The maps of `NAMED`, and those of methods that compare one layer, or the ends of stages."""
ANY_DEPTHS = ("proportional", "middle", "final")
"""Names of the maps for which the student may be deeper than its teacher."""


def top(student: int, teacher: int) -> Pairs:
    """Return pairs of student layers 1 .. N with the teacher's last N layers.

    Source: Jiao et al., TinyBERT, arXiv:1909.10351, table 4 (g(m) = m + N - M).

    >>> top(4, 12)
    ((1, 9), (2, 10), (3, 11), (4, 12))
    """
    return tuple((layer, layer + teacher - student) for layer in range(1, student + 1))


def bottom(student: int, teacher: int) -> Pairs:
    """Return pairs of student layers 1 .. N with the teacher's first N; the source is that of `top` (g(m) = m)."""
    return tuple((layer, layer) for layer in range(1, student + 1))


def drawn(student: int, teacher: int, generator: np.random.Generator) -> Pairs:
    """Return pairs of student layers 1 .. N with N different teacher layers, drawn uniformly and sorted in ascending order.

    Dankar et al., arXiv:2308.13958, mention a random map; how they draw it is unknown, so this is our choice.

    Raises:
        ValueError: for a student deeper than its teacher.
    """
    layers = sorted(generator.choice(np.arange(1, teacher + 1), size=student, replace=False).tolist())
    return tuple(enumerate(layers, start=1))


def blocks(student: int, teacher: int, key: str = "layers") -> Blocks:
    """Divide the teacher's layers into as many blocks of equal size as the student has layers, and pair them in order.

    The last layers of the blocks are TinyBERT's uniform map.

    Raises:
        InputError: if the depths do not divide.

    >>> blocks(2, 6)
    ((1, (1, 2, 3)), (2, (4, 5, 6)))
    """
    if teacher % student:
        raise InputError(
            f"a student of {student} layers does not divide its teacher's {teacher} into blocks of equal size; take one of "
            f"{', '.join(str(n) for n in range(1, teacher + 1) if teacher % n == 0)} layers, or give pairs, as [[1, 2], ...]",
            key,
        )
    size = teacher // student
    return tuple((layer, tuple(range((layer - 1) * size + 1, layer * size + 1))) for layer in range(1, student + 1))


def resolve(
    spec: str | Sequence[Sequence[int]],
    student: int,
    teacher: int,
    key: str = "layers",
    named: Mapping[str, Callable[[int, int], Pairs]] = NAMED,
) -> Pairs:
    """Return the pairs of a named map, or of an explicit list, checked against both depths.

    Args:
        spec: a name of `named`, or a list of [student layer, teacher layer].
        student: number of blocks of the student.
        teacher: number of blocks of the teacher.
        key: name of the argument that an error names.
        named: maps by name.

    Raises:
        InputError: for an unknown name, something that is not a pair, or a layer that a model does not have.
    """
    if isinstance(spec, str):
        if spec not in named:
            raise one_of(spec, tuple(named), key)
        if student > teacher and spec not in ANY_DEPTHS:
            raise InputError(
                f"the layer map '{spec}' needs a student no deeper than its teacher, got {student} and {teacher} layers; "
                "give the pairs instead, as [[student, teacher], ...]",
                key,
            )
        return named[spec](student, teacher)
    if not isinstance(spec, Sequence):
        raise InputError(
            f"'{spec}' is neither a layer map ({', '.join(named)}) nor a list of pairs [student layer, teacher layer]", key
        )
    pairs = []
    for pair in spec:
        if (
            not isinstance(pair, Sequence)
            or isinstance(pair, str)
            or len(pair) != 2
            or not all(type(layer) is int for layer in pair)
        ):
            raise InputError(f"'{pair}' is not a pair [student layer, teacher layer]", key)
        for layer, depth, whose in zip(pair, (student, teacher), ("student", "teacher"), strict=True):
            if not 0 <= layer <= depth:
                raise InputError(
                    f"the layer map {[list(p) for p in spec]} asks for layer {layer} of the {whose}, "
                    f"which has layers 0 (embeddings) to {depth}",
                    key,
                )
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


def matrix(pairs: Pairs, student: int, teacher: int) -> Tensor:
    """Return pairs of layers as a matrix: 1 for each pair, 0 elsewhere.

    Args:
        pairs: the pairs.
        student: number of blocks of the student.
        teacher: number of blocks of the teacher.

    Returns:
        (student + 1, teacher + 1), whose rows and columns are layers from 0, the embeddings, on.

    >>> matrix(((1, 2),), 1, 2)
    tensor([[0., 0., 0.],
            [0., 0., 1.]])
    """
    return block_matrix([(ours, (theirs,)) for ours, theirs in pairs], student, teacher)


def block_matrix(blocks: Sequence[tuple[int, tuple[int, ...]]], student: int, teacher: int) -> Tensor:
    """Return a map to blocks of teacher layers as a matrix, in which the layers of a block have equal parts of 1.

    Arguments and result are those of `matrix`.

    >>> block_matrix(((1, (1, 2)),), 1, 2)
    tensor([[0.0000, 0.0000, 0.0000],
            [0.0000, 0.5000, 0.5000]])
    """
    weights = torch.zeros(student + 1, teacher + 1)
    for ours, block in blocks:
        for theirs in block:
            weights[ours, theirs] += 1 / len(block)
    return weights


def describe(pairs: Pairs) -> str:
    """Describe a layer map, for the preflight."""
    return ", ".join(f"{student}<-{teacher}" for student, teacher in pairs) or "none"


def describe_blocks(found: Blocks) -> str:
    """Describe a map from student layers to blocks of teacher layers.

    >>> describe_blocks(((1, (1, 2, 3)), (2, (6,))))
    '1<-1+2+3, 2<-6'
    """
    return ", ".join(f"{student}<-{'+'.join(map(str, block))}" for student, block in found)
