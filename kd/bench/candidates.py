"""What is compared."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kd.stages import without

HARNESS, TEXTBREWER_WORKER = "kd.bench.harness:train_candidate", "kd.bench.textbrewer:train_textbrewer"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One side of the comparison.

    Attributes:
        name: of its figures.
        label: in tables, with `{method}` and `{max_length}`.
        drops: beginnings of those of the command's overrides that do not apply to it.
        adds: overrides that follow the command's.
        bare: leave teachers out once the student is built; they gave it its shape and weights.
        worker: `module:function` that does its turns.
        padded: of the peer, whether every batch is padded to `task.max_length`.
    """

    name: str
    label: str
    drops: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
    bare: bool = False
    worker: str = HARNESS
    padded: bool = False

    def overrides(self, command: Sequence[str]) -> list[str]:
        """The overrides of its run."""
        return [*without(command, self.drops), *self.adds]


FINETUNE = Candidate(
    "finetune",
    "fine-tuning, no teacher",
    drops=("cache=", *(f"{group}{end}" for group in ("method", "cohort", "pool", "engine") for end in ("=", "."))),
    adds=("method=finetune", "cache=off"),
    bare=True,
)
"""What the others are measured by."""

CACHED = Candidate("cached", "{method}, teacher cached", drops=("cache=",), adds=("cache=on",))
"""What the teacher says is on disk before the clock starts; the pass that puts it there is in `setup_seconds`."""

LIVE = Candidate("live", "{method}, teacher live", drops=("cache=",), adds=("cache=off",))

CANDIDATES: tuple[Candidate, ...] = (FINETUNE, CACHED, LIVE)
"""In the order of the table."""

TEXTBREWER = replace(LIVE, name="textbrewer", label="TextBrewer, padded to {max_length}", worker=TEXTBREWER_WORKER, padded=True)
TEXTBREWER_CUT = replace(LIVE, name="textbrewer_per_batch", label="TextBrewer, padded per batch", worker=TEXTBREWER_WORKER)

BASELINES: tuple[Candidate, ...] = (TEXTBREWER, TEXTBREWER_CUT)
"""Added by `--peer`."""
