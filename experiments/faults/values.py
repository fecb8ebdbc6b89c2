"""Generated bad values through the real command: `python experiments/faults/values.py [count] [seed]`.

Each is one override of `kd-train`: an illegal value of a key as `tests/key_values.py` has them, or a deletion. The command runs
in this process and is stopped where training would begin. Counted are tracebacks, answers that take longer than a minute,
another status than 2, values that are accepted, and refusals that name another key.
"""

import collections
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import hypothesis
import torch
from hypothesis import strategies as st
from key_values import every_value, names_key

import conftest
from kd import train
from kd.training import fit

LIMIT = 60
"""Seconds for an answer."""


class Accepted(BaseException):
    """Training would begin."""


class Hung(BaseException):
    """No answer in time."""


def stop(*_: object) -> None:
    """In place of training."""
    raise Accepted


def ring(*_: object) -> None:
    """The alarm."""
    raise Hung


def word(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return f"[{','.join(map(word, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{word(name)}:{word(inner)}" for name, inner in value.items()) + "}"
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


def drawn(strategy: st.SearchStrategy[Any], seed: int) -> Any:
    """One value of a strategy."""
    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=8, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return random.Random(seed).choice(found)


def main() -> None:
    """The campaign."""
    count, seed = (
        (int(argument) for argument in (*sys.argv[1:], "400", "0")[:2]) if len(sys.argv) != 2 else (int(sys.argv[1]), 0)
    )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    fit.fit = stop
    signal.signal(signal.SIGALRM, ring)
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with contextlib.redirect_stderr(io.StringIO()):
            conftest.tiny_model(seed=1, initializer_range=0.1).save_pretrained(folder / "backbone")
        conftest.tiny_tokenizer().save_pretrained(folder / "backbone")
        for number, (split, rows) in enumerate({"train": 96, "validation": 32, "test": 32}.items()):
            conftest.write_csv(folder / f"{split}.csv", rows, number)
        values = every_value(str(folder / "backbone"), str(folder))
        base = [
            "student=2l",
            "task=file",
            *(f"task.{split}={folder / split}.csv" for split in ("train", "validation", "test")),
            f"teacher.minilm.backbone={folder / 'backbone'}",
            f"backbone={folder / 'backbone'}",
            "task.max_length=32",
            f"paths.runs={folder / 'runs'}",
            "trainer.progress=none",
        ]
        keys = sorted(values)
        outcomes: collections.Counter[str] = collections.Counter()
        longest = 0.0
        for number in range(count):
            key = keys[number % len(keys)] if number < 3 * len(keys) else generator.choice(keys)
            kind = generator.random()
            if kind < 0.08:
                override, value = f"~{key}", None
            else:
                value = drawn(values[key].illegal, seed * 100_003 + number)
                override = f"++{key}={word(value)}"
            began = time.monotonic()
            outcome, message = tried([*base, override])
            longest = max(longest, time.monotonic() - began)
            named = message.rpartition("change: ")[2].strip() if "change: " in message else ""
            if outcome == "refused" and not names_key(named, key, values[key].also):
                outcome = "refused, another key"
            outcomes[outcome] += 1
            if outcome != "refused":
                print(f"{outcome}: {override[:150]!r}: {message[-300:]!r}", flush=True)
        print(json.dumps({"values": count, "seed": seed, **outcomes, "longest seconds": round(longest, 1)}))


def tried(overrides: list[str]) -> tuple[str, str]:
    """Run the command with these overrides; return how it ended, and its output."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    sys.argv = ["kd-train", *overrides]
    said = io.StringIO()
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            train.main()
        return "ended", said.getvalue()
    except Accepted:
        return "accepted", ""
    except Hung:
        return "hung", "".join(traceback.format_exc()[-400:])
    except SystemExit as error:
        return ("refused" if error.code == 2 else f"status {error.code}"), said.getvalue()
    except BaseException:  # noqa: BLE001 - that is what is counted
        return "traceback", traceback.format_exc()[-600:]
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    main()
