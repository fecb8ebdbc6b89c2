"""Precision, memory and description of the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd.system import hardware

OPENMP = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

MEASURE = """
import sys
from kd.system.hardware import keep_memory
kept = keep_memory()
if not kept:
    print(0, 0)
    sys.exit()
import resource, torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    torch.ones(10_000_000)
began = faults()
for _ in range(5):
    torch.ones(10_000_000)
print(int(kept), faults() - began)
"""
"""A program that prints whether `keep_memory` took effect, and the page faults of five arrays of 40 MB, each freed at once.

The first arrays may each take new memory: the allocator asks for a little more for an aligned block than it gives back.
"""


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


@pytest.fixture
def openmp(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of OpenMP."""
    for name in OPENMP:
        monkeypatch.setenv(name, "")  # so that it is put back whatever happens to it
        monkeypatch.delenv(name)
    return monkeypatch


def asked() -> dict[str, str]:
    hardware.configure_openmp()
    return {name: os.environ[name] for name in OPENMP if name in os.environ}


def test_threads_wait_asleep_unless_the_user_says_how_they_wait(openmp: pytest.MonkeyPatch) -> None:
    openmp.setattr(hardware, "cpu_quota", lambda: float("inf"))
    assert asked() == {"GOMP_SPINCOUNT": "1000"}
    for name, value in {"GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": "active"}.items():
        openmp.delenv("GOMP_SPINCOUNT", raising=False)
        openmp.setenv(name, value)
        assert asked() == {name: value}


def test_threads_are_no_more_than_a_container_has_time_for_unless_the_user_says_how_many(openmp: pytest.MonkeyPatch) -> None:
    openmp.setattr(os, "cpu_count", lambda: 64)
    openmp.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    for quota, threads in {64.0: None, 40.0: "16", 4.0: "4", 2.5: "2", 0.5: "1"}.items():
        openmp.delenv("OMP_NUM_THREADS", raising=False)
        openmp.setattr(hardware, "cpu_quota", lambda quota=quota: quota)
        assert asked().get("OMP_NUM_THREADS") == threads
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        openmp.delenv("OMP_NUM_THREADS", raising=False)
        openmp.setenv(name, "9")
        assert {asked().get(name), asked().get("OMP_NUM_THREADS", "9")} == {"9"}


@pytest.mark.parametrize(
    ("table", "files", "quota"),
    [
        ("0::/", {}, float("inf")),
        ("0::/", {"cpu.max": "max 100000"}, float("inf")),
        ("0::/", {"cpu.max": "250000 100000"}, 2.5),
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4.0),
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("3:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3.0),
        ("3:cpu:/not/seen", {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ("3:memory:/a\n1:cpuset:/a", {"memory/a/cpu.max": "100000 100000"}, float("inf")),
    ],
)
def test_a_quota_is_the_smallest_of_the_control_groups_above(
    tmp_path: Path, table: str, files: dict[str, str], quota: float
) -> None:
    for name, text in {"proc/self/cgroup": table, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert hardware.cpu_quota(tmp_path) == quota
    assert hardware.cpu_quota(tmp_path / "no Linux") == float("inf")


@pytest.mark.parametrize(
    ("table", "files", "gigabytes"),
    [
        ("0::/", {}, 8),
        ("0::/a", {"a/memory.max": "max", "a/memory.current": "1000000000", "a/memory.stat": "inactive_file 0"}, 8),
        ("0::/a", {"a/memory.max": "4000000000", "a/memory.current": "1000000000", "a/memory.stat": "inactive_file 0"}, 3),
        (
            "0::/a/b",
            {
                "a/memory.max": "4000000000",
                "a/memory.current": "2000000000",
                "a/memory.stat": "anon 5\ninactive_file 500000000",
            },
            2.5,
        ),
        (
            "4:memory:/a\n3:cpu:/b",
            {
                "memory/a/memory.limit_in_bytes": "2000000000",
                "memory/a/memory.usage_in_bytes": "1000000000",
                "memory/a/memory.stat": "total_inactive_file 0",
            },
            1,
        ),
        ("0::/a", {"a/memory.max": "1000", "a/memory.current": "2000", "a/memory.stat": "inactive_file 0"}, 0),
        ("3:cpu:/a", {"memory/a/memory.limit_in_bytes": "5"}, 8),
    ],
)
def test_memory_that_is_available_is_the_least_of_the_machine_and_of_the_control_groups(
    tmp_path: Path, table: str, files: dict[str, str], gigabytes: float
) -> None:
    meminfo = "MemTotal:       16000000 kB\nMemFree:   1000 kB\nMemAvailable:    7812500 kB\n"
    own = {"proc/self/cgroup": table, "proc/meminfo": meminfo}
    for name, text in {**own, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert hardware.available_memory(tmp_path) == gigabytes * 1e9
    assert hardware.available_memory(tmp_path / "no Linux") == float("inf")


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
def test_the_commands_ask_before_torch_reads_its_settings() -> None:
    """It shows them on request; the command ends, because of its arguments, before it trains anything."""
    command = (
        "import sys, kd.train\n"
        "sys.argv = ['kd-train', 'method=finetune', 'teacher=[]', 'task=file', 'task.train=/missing.csv', 'preflight=false']\n"
        "try: kd.train.main()\n"
        "except SystemExit: pass\n"
        "import torch"
    )
    environment = {name: value for name, value in os.environ.items() if name not in OPENMP} | {"OMP_DISPLAY_ENV": "verbose"}
    found = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    shown = [line for line in found.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not shown:
        pytest.skip("torch was built with another OpenMP")
    assert all("'1000'" in line for line in shown)


def test_a_copy_to_a_gpu_starts_from_locked_memory_and_nothing_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(2)
    assert hardware.to_device(values, torch.device("cpu")) is values
    done: list[object] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: done.append("pinned") or tensor)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, *, non_blocking: done.append((device, non_blocking)) or tensor
    )
    hardware.to_device(values, torch.device("cuda", 1))
    assert done == ["pinned", (torch.device("cuda", 1), True)]


def test_other_code_or_configuration_marks_a_run_and_figures_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("kd/system", "conf", "experiments"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_text("1")
    options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], [*options, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(hardware, "__file__", str(tmp_path / "kd" / "system" / "hardware.py"))

    def dirty() -> bool:
        hardware.git.cache_clear()
        found = hardware.git()
        assert hardware.git() is found
        assert found is not None
        assert len(found["commit"]) == 40
        return found["dirty"]

    monkeypatch.setattr(hardware, "git", hardware.cache(hardware.git.__wrapped__))  # what is read here is not kept
    (tmp_path / "experiments" / "ours.csv").write_text("a row")
    assert not dirty()
    for changed in ("conf/file", "kd/method.py"):
        (tmp_path / changed).write_text("2")
        assert dirty()
        subprocess.run(["git", "clean", "-qfd"], cwd=tmp_path, check=True)
        subprocess.run(["git", "checkout", "-q", "."], cwd=tmp_path, check=True)
        assert not dirty()
