"""Seconds of `kd-train` from the command to the first training step of a run whose inputs are done, by phase.

    python experiments/throughput/first_step.py [--repeats 3] [overrides of kd-train]

starts `kd-train` in a process of its own with timers around imports and around functions of the package, and ends it as the
first batch is about to be trained, so that the run stays unfinished and the command can be repeated. Of several times the
fastest is shown: other programs only make it slower. `wall` and `CPU` are the seconds of a phase without the phases inside it;
an import counts for the library whose module is executed, not for the one that asks for it.
"""

import argparse
import builtins
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

FUNCTIONS = {
    "composition": "hydra._internal.hydra:Hydra.compose_config kd.config.compose:compose kd.config.compose:typed "
    "kd.config.compose:check_overrides kd.config.mixture:expand",
    "plan: digests of files": "kd.runs.identity:fingerprint kd.data.sources:fingerprint_of kd.data.sources:Source.fingerprint "
    "kd.system.model_sources:damaged_file",
    "plan": "kd.runs.plan:plan",
    "checks before anything is made": "kd.training.execute:check_all kd.build.check:check_arguments kd.build.check:check_run",
    "data: read": "kd.build.data:build_examples",
    "data: tokens, batches": "kd.build.data:build_data kd.training.rows:plan_tables kd.build.data:prefit_methods",
    "teacher cache": "kd.teacher_cache.cache:TeacherCache.cached_or_live",
    "tokenizers": "kd.models.pretrained:load_tokenizer",
    "models: shapes": "kd.build.models:plan_models",
    "models: weights": "kd.build.models:materialise",
    "preflight": "kd.training.fit:begin",
    "checkpoint, loggers": "kd.training.trainer:last_step kd.training.fit:count_fills",
    "trainer": "kd.training.trainer:build_trainer kd.training.trainer:run_trainer",
}
"""Phase -> functions, as module:name, whose time it is."""

FIRST = "kd.engines.base:Engine.on_train_batch_start"
"""Function that Lightning calls before the first step."""


class Clock:
    """Seconds by phase; a phase that begins inside another one stops that one's clock.

    Args:
        began: time of the command, in seconds of `time.monotonic`, which all processes of a machine share.
    """

    def __init__(self, began: float) -> None:
        self.began = began
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.phases = ["interpreter, other"]
        self._wall, self._cpu = began, 0.0

    def _charge(self) -> None:
        wall, cpu = time.monotonic(), time.process_time()
        spent = self.seconds[self.phases[-1]]
        spent[0] += wall - self._wall
        spent[1] += cpu - self._cpu
        self._wall, self._cpu = wall, cpu

    def begin(self, phase: str) -> None:
        """Begin a phase."""
        self._charge()
        self.phases.append(phase)

    def end(self) -> None:
        """End the phase that began last."""
        self._charge()
        self.phases.pop()

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Return a function whose time is that of a phase."""

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self.begin(phase)
            try:
                return function(*arguments, **named)
            finally:
                self.end()

        return call

    def finish(self) -> None:
        """Print the seconds as JSON to the file that the parent reads, and end the process."""
        self._charge()
        Path(os.environ["FIRST_STEP"]).write_text(json.dumps(self.seconds))
        sys.stdout.flush()
        os._exit(0)


class Imports:
    """Timers around imports, and around functions of modules as soon as these are imported.

    Args:
        clock: the clock.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.waiting: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for phase, names in {**FUNCTIONS, "": FIRST}.items():
            for name in names.split():
                module, _, function = name.partition(":")
                self.waiting[module].append((function, phase))
        self._import, self._import_module = builtins.__import__, importlib.import_module
        builtins.__import__, importlib.import_module = self.statement, self.function  # type: ignore[assignment]

    def statement(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Import as a statement does: arguments are those of `__import__`."""
        given = dict(zip(("globals", "locals", "fromlist", "level"), arguments, strict=False)) | named
        scope = given.get("globals") or {}
        module = name
        if level := given.get("level"):
            module = importlib.util.resolve_name("." * level + name, scope.get("__package__") or scope["__name__"])
        if is_complete(module) and all(hasattr(sys.modules[module], part) for part in given.get("fromlist") or ()):
            return self._import(name, *arguments, **named)
        self.clock.begin(f"import {module.partition('.')[0]}")
        try:
            return self._import(name, *arguments, **named)
        finally:
            self.clock.end()
            self.wrap()

    def function(self, name: str, package: str | None = None) -> Any:
        """Import as `importlib.import_module` does."""
        if name in sys.modules:
            return sys.modules[name]
        self.clock.begin(f"import {(name if not name.startswith('.') else package or name).partition('.')[0]}")
        try:
            return self._import_module(name, package)
        finally:
            self.clock.end()
            self.wrap()

    def wrap(self) -> None:
        """Set timers around the functions of modules that are complete."""
        for module in [name for name in self.waiting if is_complete(name)]:
            for function, phase in self.waiting.pop(module):
                owner, _, attribute = function.rpartition(".")
                place = getattr(sys.modules[module], owner) if owner else sys.modules[module]
                original = getattr(place, attribute)
                setattr(place, attribute, self.clock.timed(original, phase) if phase else lambda *_: self.clock.finish())


def is_complete(module: str) -> bool:
    """Return whether a module has been imported to its end."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


def inside(began: float, overrides: list[str]) -> None:
    """Run `kd-train` with timers."""
    clock = Clock(began)
    imports = Imports(clock)
    sys.argv = ["kd-train", *overrides]
    from kd.train import main

    imports.wrap()
    main()
    raise SystemExit("no step was taken: the run is done already; choose another seed")


def measured(overrides: list[str]) -> dict[str, list[float]]:
    """Return the seconds of one command by phase, wall-clock and CPU."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "seconds.json"
        command = [sys.executable, __file__, "--inside", str(time.monotonic()), *overrides]
        done = subprocess.run(command, env={**os.environ, "FIRST_STEP": str(file)}, capture_output=True, text=True)
        if not file.exists():
            raise SystemExit(f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        seconds: dict[str, list[float]] = json.loads(file.read_text())
        return seconds


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--inside", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--least", type=float, default=0.05, help="seconds of CPU below which imports are one row")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    if arguments.inside is not None:
        inside(arguments.inside, arguments.overrides)
    found = min(
        (measured(arguments.overrides) for _ in range(arguments.repeats)), key=lambda one: sum(w for w, _ in one.values())
    )
    rows = {name: spent for name, spent in found.items() if not name.startswith("import ") or spent[1] >= arguments.least}
    small = [spent for name, spent in found.items() if name not in rows]
    rows[f"import of {len(small)} others"] = [sum(column) for column in zip(*small, strict=True)] if small else [0.0, 0.0]
    print("| phase | wall s | CPU s |\n|---|---|---|")
    groups = {"imports": [], "other": []}
    for name, spent in sorted(rows.items(), key=lambda row: (not row[0].startswith("import "), -row[1][1])):
        print(f"| {name} | {spent[0]:.2f} | {spent[1]:.2f} |")
        groups["imports" if name.startswith("import ") else "other"].append(spent)
    for title, spents in {"all imports": groups["imports"], "all else": groups["other"], "all": list(rows.values())}.items():
        print(f"| **{title}** | {sum(wall for wall, _ in spents):.2f} | {sum(cpu for _, cpu in spents):.2f} |")


if __name__ == "__main__":
    main()
