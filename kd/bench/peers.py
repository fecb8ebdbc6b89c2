"""The frameworks that `--peer` compares a method with, one for each kind of task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kd.bench import need
from kd.bench.candidates import SENTENCE_TRANSFORMERS_CANDIDATES, TEXTBREWER_CANDIDATES, Candidate
from kd.bench.sentence_transformers import EXTRA, MODULES, check_sentence_transformers
from kd.bench.textbrewer import check_textbrewer
from kd.errors import InputError
from kd.runs.run import Run


@dataclass(frozen=True, slots=True)
class Peer:
    """Another framework that does what a method does.

    Attributes:
        candidates: its candidates.
        check: raises `InputError` for a run with an option that it does not support.
        modules: modules that it imports.
        extra: extra of this package that installs it.
        distributions: packages whose versions are reported.
    """

    candidates: tuple[Candidate, ...]
    check: Callable[[Run], None]
    modules: tuple[str, ...]
    extra: str
    distributions: tuple[str, ...]


PEERS: Mapping[str, Peer] = {
    "classification": Peer(TEXTBREWER_CANDIDATES, check_textbrewer, ("textbrewer",), "bench", ("textbrewer",)),
    "regression": Peer(
        SENTENCE_TRANSFORMERS_CANDIDATES,
        check_sentence_transformers,
        MODULES,
        EXTRA,
        ("sentence-transformers", "accelerate", "datasets"),
    ),
}
"""Kind of task -> the peer that is set up for it."""


def choose_peer(run: Run) -> Peer:
    """Return the peer that does the same job as a run.

    Raises:
        InputError: if there is none, it does not support an option, or it is not installed.
    """
    kind = run.spec.task.kind
    if kind not in PEERS:
        raise InputError(f"no peer is set up for task={run.spec.task.name}, of kind {kind}; leave out --peer", "--peer")
    peer = PEERS[kind]
    peer.check(run)
    for module in peer.modules:
        need(module, "--peer", peer.extra)
    return peer
