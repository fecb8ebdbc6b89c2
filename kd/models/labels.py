"""Labels of a task and of a model, matched by name."""

import re
from collections.abc import Sequence

from kd.data.labels import label_text


def columns(task: Sequence[str], model: Sequence[str]) -> list[int] | None:
    """For each label of a task, the output of a model that has its name; None where the names differ as sets.

    They are compared as they are, else without case and with numbers by value, as far as that tells them apart.

    >>> columns(["no", "yes"], ["YES", "NO"]), columns(["0", "1"], ["1.0", "0.0"])
    ([1, 0], [1, 0])
    >>> columns(["yes", "Yes"], ["Yes", "yes"])
    [1, 0]
    >>> columns(["yes", "Yes"], ["YES", "yES"]) is None
    True
    """
    for form in (str.strip, label_text, _folded):
        wanted, found = [form(name) for name in task], [form(name) for name in model]
        if sorted(wanted) == sorted(found) and len(set(found)) == len(found):
            return [found.index(name) for name in wanted]
    return None


def _folded(name: str) -> str:
    text = label_text(name).casefold()
    return str(int(float(text))) if re.fullmatch(r"[+-]?[0-9]{1,15}\.?0*", text) else text
