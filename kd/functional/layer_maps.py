"""Which student layer meets which teacher layer.

Layer 0 is the embedding output, layer *l* the output of block *l*; a pair is (student layer, teacher layer).
"""

from collections.abc import Callable, Sequence

from kd.errors import InputError, one_of

Pairs = tuple[tuple[int, int], ...]


def skip(student: int, teacher: int) -> Pairs:
    """PKD-Skip: student layers 1 .. N-1 meet every (teacher / student)-th teacher layer; the last is left to the logits.

    Source: Sun et al., arXiv:1908.09355, section 3.2. Where the depths do not divide we round down, our choice.

    >>> [t for _, t in skip(6, 12)]
    [2, 4, 6, 8, 10]
    """
    return tuple((layer, layer * teacher // student) for layer in range(1, student))


def last(student: int, teacher: int) -> Pairs:
    """PKD-Last: student layers 1 .. N-1 meet the teacher layers just below its last.

    Source: Sun et al., arXiv:1908.09355, section 3.2.

    >>> [t for _, t in last(6, 12)]
    [7, 8, 9, 10, 11]
    """
    return tuple((layer, teacher - student + layer) for layer in range(1, student))


def uniform(student: int, teacher: int) -> Pairs:
    """Every student layer, the embeddings and the last included, meets layer * teacher / student.

    Source: Jiao et al., TinyBERT, Findings of EMNLP 2020, arXiv:1909.10351, section 3.1 (its g(m) = 3m for 4 of 12).

    >>> uniform(2, 6)
    ((0, 0), (1, 3), (2, 6))
    """
    return tuple((layer, layer * teacher // student) for layer in range(student + 1))


NAMED: dict[str, Callable[[int, int], Pairs]] = {"skip": skip, "last": last, "uniform": uniform}


def resolve(spec: str | Sequence[Sequence[int]], student: int, teacher: int, key: str = "method.layers") -> Pairs:
    """The pairs of a named map, or an explicit list of pairs, checked against both depths.

    Args:
        spec: a name of `NAMED`, or a list of [student layer, teacher layer].
        student: depth of the student, blocks.
        teacher: depth of the teacher, blocks.
        key: the configuration key that an error names.

    Raises:
        InputError: for an unknown name, something that is not a pair, or a layer that a model does not have.
    """
    if isinstance(spec, str):
        if spec not in NAMED:
            raise one_of(spec, tuple(NAMED), key)
        if student > teacher:
            raise InputError(
                f"the layer map '{spec}' needs a student no deeper than its teacher, got {student} and {teacher} layers; "
                "give the pairs instead, as [[student, teacher], ...]",
                key,
            )
        return NAMED[spec](student, teacher)
    if not isinstance(spec, Sequence):
        raise InputError(
            f"'{spec}' is neither a layer map ({', '.join(NAMED)}) nor a list of pairs [student layer, teacher layer]", key
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


def describe(pairs: Pairs) -> str:
    """The map in words, for the preflight."""
    return ", ".join(f"{student}<-{teacher}" for student, teacher in pairs) or "none"
