"""The start of a process: imports of large libraries, and what comes before them."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection(*, freeze: bool = False) -> Iterator[None]:
    """Do without Python's cyclic garbage collector while libraries are imported, or a run is planned.

    The collector would search the objects of all modules again and again as they grow in number, which takes a sixth of the
    time of the imports of a run, although modules stay as long as the process does. Nothing is changed once Lightning is
    imported, or if the collector is off.

    Args:
        freeze: leave the objects that there are in the end out of all later collections. Forks of the process then share their
            memory, which a collection would write to.
    """
    if "lightning" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        if freeze:
            gc.freeze()
    finally:
        gc.enable()
