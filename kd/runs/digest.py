"""The digest of a configuration."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def digest_of(identified: Mapping[str, Any]) -> str:
    """Return a digest of nested values, twelve hexadecimal digits.

    10 and 10.0 have the same digest, and so have 0.0 and -0.0. A whole number that no float represents exactly stays an int.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): plain(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        exact = isinstance(value, float) or (abs(value) < 2**1000 and int(float(value)) == value)
        return float(value) + 0.0 if exact else value  # adding zero turns -0.0 into 0.0

    text = json.dumps(plain(identified), sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
