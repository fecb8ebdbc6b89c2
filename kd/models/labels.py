"""Labels of a task and of a model, matched by name."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from kd.data.labels import label_text


def columns(task: Sequence[str], model: Sequence[str]) -> list[int] | None:
    """Return, for each label of a task, the index of the model output with its name; None if the names differ as sets.

    Names are compared exactly first, then ignoring case and comparing numbers by value, as long as they stay distinct.

    >>> columns(["no", "yes"], ["YES", "NO"]), columns(["0", "1"], ["1.0", "0.0"])
    ([1, 0], [1, 0])
    >>> columns(["yes", "Yes"], ["Yes", "yes"])
    [1, 0]
    >>> columns(["yes", "Yes"], ["YES", "yES"]) is None
    True
    """
    for form in (str.strip, label_text, _folded):
        labels, outputs = [form(name) for name in task], [form(name) for name in model]
        if sorted(labels) == sorted(outputs) and len(set(outputs)) == len(outputs):
            return [outputs.index(name) for name in labels]
    return None


def reordered(values: Tensor, columns: Sequence[int]) -> Tensor:
    """Return columns of a tensor in another order, (..., columns). A list as an index would be copied to the device first.

    >>> reordered(torch.tensor([[3.0, 4.0]]), [1, 0]).tolist()
    [[4.0, 3.0]]
    """
    return torch.stack([values[..., column] for column in columns], dim=-1)


def _folded(name: str) -> str:
    text = label_text(name).casefold()
    return str(int(float(text))) if re.fullmatch(r"[+-]?[0-9]{1,15}\.?0*", text) else text
