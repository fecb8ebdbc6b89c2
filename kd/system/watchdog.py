"""Watchdog of distributed jobs: if one rank dies, hangs or fails alone, the others end too, with a message.

torchrun ends the ranks of its own machine when one of them dies. Ranks of another machine, or ranks that wait for one that
hangs, would wait until the timeout of the process group, which has to be long: rank 0 may wait for another job's lock for
hours. So each rank writes a heartbeat to the job's store every few seconds and reads those of the others.

Ranks also use the store to agree on which of them prints a message, so that an error that all ranks raise is printed once.
"""

import hashlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 40.0
"""Seconds without a heartbeat after which a rank counts as lost, unless the environment variable KD_PATIENCE has a number. Our
choice: five times the delay of a busy store."""
LOOKS = 8
"""Number of heartbeats and checks in that time."""
MEETING = timedelta(minutes=10)
"""Longest time between the starts of two ranks: a cold file system makes imports slow."""
ANSWER = 2.0
"""Seconds that a rank that is about to end waits for an answer of the store."""

PEER_LOST = 3
"""Exit status of a rank that ends because it has lost another."""
TERMINATED = 128 + signal.SIGTERM
STOPPED = "stopped by SIGTERM: another rank has ended, or the job was told to"

GOES_ON = "run the same command to resume from the last checkpoint"


class Watchdog:
    """Watchdog of one rank.

    It has two threads, because a call to a store whose machine is gone may block for many minutes: one exchanges heartbeats
    with the store, the other counts checks without news of a rank. It counts checks instead of seconds, so that a job that
    was suspended as a whole goes on.

    Args:
        rank: rank of this process.
        world: number of processes of the job.
        patience: seconds without a heartbeat after which a rank counts as lost; None for KD_PATIENCE, or else `PATIENCE`.
    """

    def __init__(self, rank: int, world: int, patience: float | None = None) -> None:
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self.rank, self.world = rank, world
        self.patience = float(os.environ.get("KD_PATIENCE", PATIENCE)) if patience is None else patience
        # A separate connection, because a collective may block that of the process group for as long as it waits.
        self.store = PrefixStore("kd", next(iter(rendezvous("env://", timeout=MEETING)))[0])
        self.store.add(f"beat/{rank}", 1)
        self.store.set(f"host/{rank}", socket.gethostname())
        keys = [f"host/{other}" for other in range(world)]
        self.store.wait(keys, MEETING)
        self.hosts = [host.decode() for host in self.store.multi_get(keys)]
        self.spoken = f"spoken/{os.environ.get('GROUP_RANK', '0')}"
        self.silent = {other: 0 for other in range(world) if other != rank}
        self.store_lost = False
        self.over = threading.Event()
        self.signals, self.reading, self.terminated = catch_signals(), threading.Lock(), False
        for work in (self._talk, self._look):
            threading.Thread(target=work, name=f"kd{work.__name__}", daemon=True).start()

    def leave(self) -> None:
        """Stop watching, because the job is over for every rank."""
        self.over.set()
        let_signals_be()

    def _talk(self) -> None:
        """Write this rank's heartbeat and read those of the others, until the job is over or the store is lost."""
        others = list(self.silent)
        beats = [f"beat/{other}" for other in others]
        seen = [b""] * len(others)
        try:
            while not self.over.wait(self.patience / LOOKS):
                self.store.add(f"beat/{self.rank}", 1)
                current = self.store.multi_get(beats)
                for other, before, now in zip(others, seen, current, strict=True):
                    if now != before:
                        self.silent[other] = 0
                seen = current
        except RuntimeError:  # the type of torch's store errors; `_look` ends the rank
            self.store_lost = True

    def _look(self) -> None:
        """End this rank on SIGTERM, or when there has been no heartbeat of another rank for too long."""
        while not self.over.is_set():
            ready, _, _ = select.select([self.signals], [], [], self.patience / LOOKS)
            if ready:
                if self.got_sigterm():
                    self.end(STOPPED, TERMINATED)
                continue
            for other in self.silent:
                self.silent[other] += 1
            lost = [f"rank {other} ({self.hosts[other]})" for other, checks in self.silent.items() if checks > LOOKS]
            if lost:
                who = "the job's store" if self.store_lost else ", ".join(lost)
                self.end(f"no answer from {who} for {self.patience:g} s; this rank stops too", PEER_LOST)

    def got_sigterm(self) -> bool:
        """Return whether this process has received SIGTERM."""
        with self.reading:
            if select.select([self.signals], [], [], 0)[0]:
                self.terminated |= signal.SIGTERM in os.read(self.signals, 4096)
            return self.terminated

    def end(self, what: str, status: int) -> None:
        """End this process because of another; print why, unless a rank of this machine has printed an error already.

        After SIGTERM, that is the reason, whatever else follows from it: a handler of Lightning starts a collective then, which
        fails at once if another rank has ended already.
        """
        if not self.over.is_set():
            if self.got_sigterm():
                what, status = STOPPED, TERMINATED
            try:
                if self.first(self.spoken):
                    os.write(2, f"\nkd-train: {what}. {GOES_ON.capitalize()}\n".encode())
            finally:  # also if the output has been closed
                os._exit(status)

    def prints_error(self, message: str) -> bool:
        """Return whether this rank is the one to print an error that other ranks may find too."""
        self.first(self.spoken)
        return self.first(f"said/{hashlib.blake2b(message.encode(), digest_size=8).hexdigest()}")

    def first(self, key: str) -> bool:
        """Claim a key; return whether no rank has claimed it before, or the store does not answer."""
        return self._ask(lambda: self.store.add(key, 1), 1) == 1

    def all_failed_alike(self, step: str, outcome: str) -> bool:
        """Return whether every rank reports the same outcome of a step within `patience` seconds."""
        self._ask(lambda: self.store.set(f"end/{step}/{self.rank}", outcome), None)
        ends = [f"end/{step}/{other}" for other in range(self.world)]
        for _ in range(int(self.patience / 0.1)):
            if self._ask(lambda: self.store.check(ends), False):
                outcomes: list[bytes] = self._ask(lambda: self.store.multi_get(ends), [])
                return set(outcomes) == {outcome.encode()}
            time.sleep(0.1)
        return False

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        """Return the store's answer, or `otherwise` if there is none within `ANSWER` seconds."""
        answers: list[T] = []

        def ask() -> None:
            try:
                answers.append(question())
            except RuntimeError:
                self.store_lost = True

        if not self.store_lost:
            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            asking.join(ANSWER)
        return answers[0] if answers else otherwise


def catch_signals() -> int:
    """Redirect signals to a pipe; return the file descriptor to read them from.

    A Python handler would not run until a collective is over, and Lightning's handler starts another collective; the pipe can
    be read at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=let_signals_be)  # a DataLoader worker that gets SIGTERM must not notify its parent
    return reader


def let_signals_be() -> None:
    """Restore the default handling of SIGTERM, which ends the process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
