"""What is asked of the machine."""

import os
import subprocess
import sys

import pytest

from kd import hardware

MEASURE = """
from kd.hardware import keep_memory
kept = keep_memory()
import resource, torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    torch.ones(10_000_000)
began = faults()
for _ in range(5):
    torch.ones(10_000_000)
print(int(kept), faults() - began)
"""
"""Whether memory is kept, and the page faults of five arrays of 40 MB, each freed before the next. The first ones may each take
new memory: an aligned block asks for a little more than it gives back."""


def measured(**environment: str) -> tuple[int, int]:
    found = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True).stdout
    kept, faults = found.split()
    return int(kept), int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_that_is_freed_is_not_mapped_anew() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    pages = 5 * 40_000_000 // os.sysconf("SC_PAGESIZE")
    kept, faults = measured(**environment)
    assert (kept, faults < pages // 10) == (1, True)
    # Whoever has set malloc up is left alone.
    assert measured(**environment, MALLOC_ARENA_MAX="2")[0] == 0
    assert measured(**environment, GLIBC_TUNABLES="glibc.malloc.check=0")[0] == 0


@pytest.mark.parametrize("place", ["another system", "another library"])
def test_elsewhere_memory_is_left_alone(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    if place == "another system":
        monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: object())
    assert not hardware.keep_memory()
