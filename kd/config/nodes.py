"""Look-up of dotted keys in configuration nodes."""

from collections.abc import Mapping
from typing import Any


def has_key(node: Mapping[str, Any], key: str) -> bool:
    """Return whether nested mappings have a key.

    >>> has_key({"trainer": {"max_epochs": 3}}, "trainer.max_epochs")
    True
    """
    part, _, rest = key.partition(".")
    if not isinstance(node, Mapping) or part not in node:
        return False
    return not rest or has_key(node[part], rest)


def nested(node: object, key: str) -> Any:
    """Return the value of a key in nested mappings; None if it is missing.

    >>> nested({"student": {"init": "run"}}, "student.init"), nested({"student": 3}, "student.init")
    ('run', None)
    """
    part, _, rest = key.partition(".")
    if not isinstance(node, Mapping) or part not in node:
        return None
    return nested(node[part], rest) if rest else node[part]
