"""The record, the exported model and the tables of a finished run. `kd.results("runs")` is a table of all of them.

The package can be called (`kd.results.frame.results`), because `kd.results` is also the name of its modules' package.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame


class CallableResults(ModuleType):
    """Module that returns a table of finished runs when it is called."""

    def __call__(self, folder: "str | Path" = "runs") -> "DataFrame":
        """Return a row for each finished run in a folder, and each of its tasks, splits and students.

        See `kd.results.frame.results`.
        """
        from kd.results.frame import results

        return results(folder)


sys.modules[__name__].__class__ = CallableResults
