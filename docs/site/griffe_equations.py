"""Extension of Griffe: docstrings whose equations are MathML, for the reference that mkdocstrings makes."""

from typing import Any

import griffe

from markup import with_equations


class Equations(griffe.Extension):
    """Replace the roles `:math:` of docstrings."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace them in an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = with_equations(obj.docstring.value)
