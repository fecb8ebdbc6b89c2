"""A finished run of the toy task, and what kd-export makes of it, for all tests of this folder."""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from kd.runs.run import Run
from whole_runs import Small, made

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@dataclass
class Ended:
    """Exit status and output of a command."""

    status: int
    output: str
    errors: str


def command(module: ModuleType, *words: object) -> Ended:
    """Run the `main` of a module as its command."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        try:
            module.main()  # type: ignore[attr-defined]
        except SystemExit as ended:
            status = int(ended.code or 0)
    return Ended(status, out.getvalue(), errors.getvalue())


@pytest.fixture(scope="session")
def ends() -> Callable[..., Ended]:
    return command


@pytest.fixture(scope="session")
def finished(small: Small) -> Run:
    """A student of two layers that has learnt the toy task, with a teacher."""
    run, _ = made(small("method=kd", "trainer.max_epochs=6", "teacher.minilm.run.trainer.max_epochs=2"))
    return run


@pytest.fixture(scope="session")
def exported(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its student in all formats."""
    import kd.deploy.export

    out = tmp_path_factory.mktemp("exported") / "student"
    formats = "torch,onnx,int8,openvino"
    ended = command(kd.deploy.export, finished.directory, "--out", out, "--formats", formats, "--max-drop", 10)
    assert ended.status == 0, ended.errors
    assert str(out) in ended.output
    return out
