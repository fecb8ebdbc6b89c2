"""Extension of Griffe: equations of docstrings as MathML, and their doctests as code, for the reference of mkdocstrings."""

from typing import Any

import griffe

from markup import with_equations, with_examples


class Equations(griffe.Extension):
    """Replace the roles `:math:` of docstrings, and make their doctests blocks of code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace them in an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = with_equations(with_examples(obj.docstring.value))
