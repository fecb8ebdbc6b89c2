"""Vectors of words, and the words that are nearest by them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd.config.values import shown
from kd.data.readers import data_path
from kd.errors import InputError

MOST_WORDS = 100_000
"""Largest number of words with vectors, that of TinyBERT's authors (`kd.data.augmentation`)."""

QUERIES_AT_ONCE = 256
"""Number of words whose nearest ones are computed at a time."""


class Vectors:
    """Vectors of words.

    Args:
        words: the words, each once.
        matrix: (words, width); they are scaled to length 1.
    """

    def __init__(self, words: Sequence[str], matrix: np.ndarray) -> None:
        self.words = words
        self.index = {name: row for row, name in enumerate(words)}
        lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
        self.matrix = matrix / np.maximum(lengths, np.finfo(np.float32).tiny)

    def nearest(self, queries: Sequence[str], count: int) -> dict[str, list[str]]:
        """Return the words of largest cosine similarity, the most similar first and the word itself left out.

        Args:
            queries: words; those without a vector are left out of the result.
            count: number of words for each.

        >>> Vectors(["a", "b", "c"], np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])).nearest(["a", "d"], 1)
        {'a': ['b']}
        """
        known = sorted({query for query in queries if query in self.index})
        count, result = min(count, len(self.words) - 1), {}
        for start in range(0, len(known) if count else 0, QUERIES_AT_ONCE):
            part = known[start : start + QUERIES_AT_ONCE]
            rows = np.array([self.index[query] for query in part])
            similar = self.matrix[rows] @ self.matrix.T
            similar[np.arange(len(rows)), rows] = -np.inf
            some = np.argpartition(-similar, count - 1, axis=1)[:, :count]
            some.sort(axis=1)  # words of equal similarity stay in their order
            order = np.argsort(-np.take_along_axis(similar, some, axis=1), axis=1, kind="stable")
            best = np.take_along_axis(some, order, axis=1)
            result.update({query: [self.words[row] for row in chosen] for query, chosen in zip(part, best, strict=True)})
        return result


def read_vectors(name: object, key: str) -> Vectors:
    """Read the first `MOST_WORDS` vectors of a file in GloVe's format; a first line of two numbers (word2vec) is skipped.

    Raises:
        InputError: if the file cannot be read, or a line is not a word and as many finite numbers as the first has.
    """
    if not isinstance(name, str):
        raise InputError(f"vectors={shown(name)} is not the path of a file", key)
    path: Path = data_path(name, key)
    words: dict[str, np.ndarray] = {}
    width = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line, text in enumerate(file, start=1):
                parts = text.rstrip().split(" ")
                if line == 1 and len(parts) == 2 and all(part.isdigit() for part in parts):
                    continue
                width = width or len(parts) - 1
                where = f"'{path}', line {line}"
                if len(parts) <= width or not width:
                    raise InputError(f"{where}: it is not a word and {width or 'some'} numbers", key)
                try:
                    vector = np.array([float(part) for part in parts[-width:]], dtype=np.float32)
                except ValueError as error:
                    raise InputError(f"{where}: it is not a word and {width} numbers", key) from error
                if not np.isfinite(vector).all():
                    raise InputError(f"{where}: its numbers are not finite", key)
                words.setdefault(" ".join(parts[:-width]), vector)  # GloVe's files have words with blanks
                if len(words) == MOST_WORDS:
                    break
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is no text in UTF-8", key) from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror}", key) from error
    if not words:
        raise InputError(f"'{path}' has no vectors", key)
    return Vectors(list(words), np.stack(list(words.values())))
