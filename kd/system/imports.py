"""Imports of large libraries."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Import libraries without Python's cyclic garbage collector, and leave what they made out of later collections.

    The collector would search the objects of all modules again and again as they grow in number, which takes a sixth of the
    time of the imports of a run, although modules stay as long as the process does. Forks of the process share the memory of
    these objects, which a collection would write to.

    Nothing is changed if Lightning is imported already, or if the collector is off.
    """
    if "lightning" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
