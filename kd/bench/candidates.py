"""The candidates that a benchmark compares."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kd.config.schema import GRAPHS
from kd.runs.stages import without

HARNESS, TEXTBREWER_WORKER = "kd.bench.harness:train_candidate", "kd.bench.textbrewer:train_textbrewer"
BARE_WORKER = "kd.bench.bare:train_bare"
SENTENCE_TRANSFORMERS_WORKER = "kd.bench.sentence_transformers:train_sentence_transformers"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A training setup that a benchmark compares with others.

    Attributes:
        name: key of its figures.
        label: its name in tables, a format string with `{method}` and `{max_length}`.
        drops: prefixes of the command's overrides that are left out for this candidate.
        adds: overrides that are appended to the command's.
        bare: whether teachers are removed once the student, whose shape and weights may come from them, is built.
        worker: `module:function` that runs its turns.
        padded: for TextBrewer, whether every batch is padded to `task.max_length`.
        by_length: for sentence-transformers, whether it has the run's batches of similar length; else batches drawn at random.
        caches: whether there is no such candidate if no teacher can be cached.
        without_graphs: for a candidate with CUDA graphs, the name of the candidate that is the same without them. There is no
            such candidate for a method that cannot have them.
    """

    name: str
    label: str
    drops: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
    bare: bool = False
    worker: str = HARNESS
    padded: bool = False
    by_length: bool = False
    caches: bool = False
    without_graphs: str | None = None

    def overrides(self, command: Sequence[str]) -> list[str]:
        """Return the overrides of the candidate's run."""
        return [*without(command, self.drops), *self.adds]


FINETUNE = Candidate(
    "finetune",
    "fine-tuning, no teacher",
    drops=("cache=", *(f"{group}{end}" for group in ("method", "cohort", "pool", "engine") for end in ("=", "."))),
    adds=("method=finetune", "cache=off"),
    bare=True,
)
"""The baseline of all ratios."""

BARE = replace(FINETUNE, name="bare", label="fine-tuning in a bare loop", worker=BARE_WORKER)
"""Fine-tuning without the trainer: the share of the trainer is what the baseline takes more."""

CACHED = Candidate("cached", "{method}, teacher cached", drops=("cache=",), adds=("cache=on",), caches=True)
"""Candidate whose teacher outputs are precomputed before the timed turns; precomputing counts in `setup_seconds`."""

LIVE = Candidate("live", "{method}, teacher live", drops=("cache=",), adds=("cache=off",))

CANDIDATES: tuple[Candidate, ...] = (FINETUNE, CACHED, LIVE)
"""The default candidates, in the order of the table."""


def graphed(candidate: Candidate, label: str) -> Candidate:
    """Return the candidate that is the same as another, with CUDA graphs."""
    return replace(
        candidate,
        name=f"{candidate.name}_graphs",
        label=label,
        drops=(*candidate.drops, "trainer.compile="),
        adds=(*candidate.adds, f"trainer.compile={GRAPHS}"),
        without_graphs=candidate.name,
    )


GRAPHED: tuple[Candidate, ...] = (
    graphed(FINETUNE, "fine-tuning, CUDA graphs"),
    graphed(CACHED, "{method}, teacher cached, CUDA graphs"),
)
"""The candidates that are added on a GPU."""

TEXTBREWER = replace(LIVE, name="textbrewer", label="TextBrewer, padded to {max_length}", worker=TEXTBREWER_WORKER, padded=True)
TEXTBREWER_CUT = replace(LIVE, name="textbrewer_per_batch", label="TextBrewer, padded per batch", worker=TEXTBREWER_WORKER)

SENTENCE_TRANSFORMERS = replace(
    LIVE,
    name="sentence_transformers",
    label="sentence-transformers, batches at random",
    worker=SENTENCE_TRANSFORMERS_WORKER,
)
SENTENCE_TRANSFORMERS_BY_LENGTH = replace(
    SENTENCE_TRANSFORMERS,
    name="sentence_transformers_by_length",
    label="sentence-transformers, batches by length",
    by_length=True,
)

TEXTBREWER_CANDIDATES: tuple[Candidate, ...] = (TEXTBREWER, TEXTBREWER_CUT)
SENTENCE_TRANSFORMERS_CANDIDATES: tuple[Candidate, ...] = (SENTENCE_TRANSFORMERS, SENTENCE_TRANSFORMERS_BY_LENGTH)

BASELINES: tuple[Candidate, ...] = (*TEXTBREWER_CANDIDATES, *SENTENCE_TRANSFORMERS_CANDIDATES)
"""The candidates that `--peer` may add (`kd.bench.peers`)."""
