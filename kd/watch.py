"""Ranks that look after each other: where one dies, falls silent or fails alone, the others end too, readably.

torchrun ends the ranks of its own machine when one of them dies. Ranks of another machine, or ranks that wait for one that
hangs, would wait for as long as the process group's timeout, and that has to be long: the first rank may wait for another
job's lock for hours. So each rank shows a sign of life in the job's store every few seconds and looks for the others'.

The store is also where ranks ask whether something has been said already, so that what all of them find is printed once.
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

PATIENCE = float(os.environ.get("KD_PATIENCE", "40"))
"""Seconds without a sign of life after which a rank is given up. Our choice: five times what a busy store is late."""
LOOKS = 8
"""Looks in that time."""
MEETING = timedelta(minutes=10)
"""What the ranks may be apart in starting: a cold file system makes imports slow."""
ANSWER = 2.0
"""Seconds that the store is waited for by a rank that is about to end."""

PEER_LOST = 3
"""Exit status of a rank that ends because it has lost another."""
TERMINATED = 128 + signal.SIGTERM

GOES_ON = "the same command goes on from the last checkpoint"


class Watchdog:
    """One rank's part.

    Two threads, because a store whose machine has vanished may keep a call for many minutes: one talks to the store, the
    other counts how often it has looked without news. It counts looks instead of seconds so that a job that was suspended as
    a whole goes on.

    Args:
        rank: this process.
        world: processes of the job.
        patience: seconds after which a silent rank is given up.
    """

    def __init__(self, rank: int, world: int, patience: float = PATIENCE) -> None:
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self.rank, self.world, self.patience = rank, world, patience
        # A connection of its own: a collective may keep the process group's for as long as it waits.
        self.store = PrefixStore("kd", next(iter(rendezvous("env://", timeout=MEETING)))[0])
        self.store.add(f"beat/{rank}", 1)
        self.store.set(f"host/{rank}", socket.gethostname())
        places = [f"host/{other}" for other in range(world)]
        self.store.wait(places, MEETING)
        self.hosts = [host.decode() for host in self.store.multi_get(places)]
        self.spoken = f"spoken/{os.environ.get('GROUP_RANK', '0')}"
        self.silent = {other: 0 for other in range(world) if other != rank}
        self.store_lost = False
        self.over = threading.Event()
        self.signals = catch_signals()
        for work in (self._talk, self._look):
            threading.Thread(target=work, name=f"kd{work.__name__}", daemon=True).start()

    def leave(self) -> None:
        """The job is over, for every rank."""
        self.over.set()
        let_signals_be()

    def _talk(self) -> None:
        """Show a sign of life and look for the others', until the store is gone."""
        others = list(self.silent)
        beats = [f"beat/{other}" for other in others]
        seen = [b""] * len(others)
        try:
            while not self.over.wait(self.patience / LOOKS):
                self.store.add(f"beat/{self.rank}", 1)
                found = self.store.multi_get(beats)
                for other, before, now in zip(others, seen, found, strict=True):
                    if now != before:
                        self.silent[other] = 0
                seen = found
        except RuntimeError:  # torch's errors of a store; `_look` draws the conclusion
            self.store_lost = True

    def _look(self) -> None:
        """End this rank when it is told to, or when another has been silent for too long."""
        while not self.over.is_set():
            ready, _, _ = select.select([self.signals], [], [], self.patience / LOOKS)
            if ready:
                if signal.SIGTERM in os.read(self.signals, 4096):
                    self.end("stopped by SIGTERM: another rank has ended, or the job was told to", TERMINATED)
                continue
            for other in self.silent:
                self.silent[other] += 1
            lost = [f"rank {other} ({self.hosts[other]})" for other, looks in self.silent.items() if looks > LOOKS]
            if lost:
                who = "the job's store" if self.store_lost else ", ".join(lost)
                self.end(f"no answer from {who} for {self.patience:g} s; this rank stops too", PEER_LOST)

    def end(self, what: str, status: int) -> None:
        """End this process because of what happened elsewhere; said once a machine, and only if nothing was said there."""
        if not self.over.is_set():
            try:
                if self.first(self.spoken):
                    os.write(2, f"\nkd-train: {what}. {GOES_ON.capitalize()}\n".encode())
            finally:  # also where nobody listens any more
                os._exit(status)

    def prints_error(self, message: str) -> bool:
        """Return whether this rank is the one to print an error that other ranks may find too."""
        self.first(self.spoken)
        return self.first(f"said/{hashlib.blake2b(message.encode(), digest_size=8).hexdigest()}")

    def first(self, key: str) -> bool:
        """Return whether nobody has claimed a key before; true where the store does not answer."""
        return self._ask(lambda: self.store.add(key, 1), 1) == 1

    def all_failed_alike(self, step: str, outcome: str) -> bool:
        """Return whether every rank comes to the same end of a step within the time that a silent one gets."""
        self._ask(lambda: self.store.set(f"end/{step}/{self.rank}", outcome), None)
        ends = [f"end/{step}/{other}" for other in range(self.world)]
        for _ in range(int(self.patience / 0.1)):
            if self._ask(lambda: self.store.check(ends), False):
                found: list[bytes] = self._ask(lambda: self.store.multi_get(ends), [])
                return set(found) == {outcome.encode()}
            time.sleep(0.1)
        return False

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        """The store's answer, or another where it gives none in time."""
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
    """Where signals can be read as they come.

    A Python handler would wait until a collective is over, and Lightning's own begins another; what is written to this pipe
    is seen at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=let_signals_be)  # a loader's worker that is ended by SIGTERM is no news for its parent
    return reader


def let_signals_be() -> None:
    """SIGTERM ends the process, as ever."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
