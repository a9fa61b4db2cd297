"""Notice that a process of a run is gone, or cannot go on, and say so in one line, instead of waiting for it."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from litgpt.errors import UserError

BEAT = 1.0  # seconds between signs of life
PATIENCE = 8.0  # seconds in which those that are left give a sign, once an exchange has failed
GRACE = 10.0  # seconds in which all leave together, at most
GLANCE = 0.05  # seconds between two looks at whether they have
ADVICE = "the others stop; start again with resume: auto"


class Heartbeat:
    """Signs of life of all ranks in the store through which they found each other.

    Every rank gives some, and looks after the next one. Whoever finds a rank gone, or cannot go on, tells all others,
    who stop within a beat, whatever they wait for.

    Args:
        silence: seconds without a sign of life, by this rank's own beats, after which the next rank is given up.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, silence: float) -> None:
        self.store, self.rank, self.ranks, self.silence = store, rank, ranks, silence
        self.ended, self.ending = threading.Event(), threading.Lock()
        store.set(f"who/{rank}", f"rank {rank} of {ranks} (process {os.getpid()} on {socket.gethostname()})")
        threading.Thread(target=self._look, name="heartbeat", daemon=True).start()

    def end(self) -> None:
        """Leave without being missed."""
        self.ended.set()
        try:
            self.store.add(f"left/{self.rank}", 1)
        except RuntimeError:  # the first rank, which holds the store, has left already
            return

    def _look(self) -> None:
        next_one = (self.rank + 1) % self.ranks
        last, beats = -1, 0
        while not self.ended.wait(BEAT):
            try:
                self.store.add(f"beat/{self.rank}", 1)
                seen = self.sign(next_one)
                beats, last = (beats + 1 if seen == last else 0), seen
                if beats * BEAT > self.silence and not self.has_left(next_one):
                    self.tell_gone([next_one])
                if told := self.told():
                    self.stop(told)
            except RuntimeError:
                if not self.ended.wait(PATIENCE):
                    self.stop(lost_message(self.without_store()))

    def sign(self, rank: int) -> int:
        """How many signs of life a rank has given."""
        return self.store.add(f"beat/{rank}", 0)

    def has_left(self, rank: int) -> bool:
        """Whether a rank is done."""
        return self.store.add(f"left/{rank}", 0) > 0

    def name(self, rank: int) -> str:
        """A rank, its process and its machine."""
        key = f"who/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else f"rank {rank} of {self.ranks}"

    def without_store(self) -> str:
        """What to say when the store does not answer."""
        return f"rank 0 of {self.ranks}, or its machine,"

    def tell_gone(self, ranks: list[int]) -> None:
        """Let all ranks know that some are gone; the first to tell is believed."""
        self.tell(lost_message(" and ".join(map(self.name, ranks))))
        for rank in ranks:
            self.store.add(f"left/{rank}", 1)  # nobody need wait for them
            self.store.add("leaving", 1)

    def tell(self, why: str) -> None:
        """Let all ranks know why this run is over; the first to tell is believed."""
        self.store.compare_set("over", "", why)

    def told(self) -> str:
        """Why the run is over; empty if it is not."""
        return self.store.get("over").decode() if self.store.check(["over"]) else ""

    def lost(self) -> str:
        """Why the run is over, after an exchange has failed; empty if all others are still there."""
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        try:
            first = {rank: self.sign(rank) for rank in others}
            until = time.monotonic() + PATIENCE
            silent = others
            while silent and time.monotonic() < until:
                time.sleep(BEAT / 4)
                if told := self.told():
                    return told
                silent = [rank for rank in silent if self.sign(rank) == first[rank] and not self.has_left(rank)]
            if silent:
                self.tell_gone(silent)
            return self.told()
        except RuntimeError:
            return lost_message(self.without_store())

    def stop(self, why: str) -> None:
        """End this process, with all others: they may never come to what it waits for, nor it to what they do."""
        with self.ending:  # held until the end, so that one thread alone speaks
            if self.is_news(why):
                print(f"litgpt: error: {why}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            with suppress(RuntimeError):  # the first rank, which holds the store, is gone
                self.leave_together()
            os._exit(1)

    def is_news(self, line: str) -> bool:
        """Whether no other rank has said a line where this one would: on the same terminal, or into the same file."""
        where = os.fstat(sys.stderr.fileno())
        try:
            return self.store.add(f"said/{socket.gethostname()}/{where.st_dev}/{where.st_ino}/{line}", 1) == 1
        except RuntimeError:
            return True

    def leave_together(self) -> None:
        """Wait until all ranks are about to leave; the first one, which holds the store, until the others have.

        Otherwise those that are left would take the first to leave for lost.
        """
        until = time.monotonic() + GRACE
        self.store.add(f"left/{self.rank}", 1)
        while time.monotonic() < until and not all(map(self.has_left, range(self.ranks))):
            time.sleep(GLANCE)
        leaving = self.store.add("leaving", 1)
        while self.rank == 0 and time.monotonic() < until and leaving < self.ranks:
            time.sleep(GLANCE)
            leaving = self.store.add("leaving", 0)
        if self.rank == 0:
            time.sleep(GLANCE)  # by when the others have ended


def lost_message(who: str) -> str:
    """What is said of ranks that are gone."""
    return f"{who} is gone; {ADVICE}"


watching: list[Heartbeat] = []  # at most one


def start_heartbeat(silence: float) -> None:
    """Watch the ranks of the default process group."""
    store = dist.distributed_c10d._get_default_store()
    # of its own connection: another thread may wait on that of the group
    apart = dist.PrefixStore("heartbeat", store.clone())
    watching.append(Heartbeat(apart, dist.get_rank(), dist.get_world_size(), silence))


def stop_heartbeat() -> None:
    """Watch no more, and be watched no more."""
    while watching:
        watching.pop().end()


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """If what runs inside fails, end all processes of the run with one line that says why.

    That is the error, if it is the user's; or who is gone, if that is why an exchange failed; else the error passes.
    """
    try:
        yield
    except Exception as error:
        if watching and (why := str(error) if isinstance(error, UserError) else watching[0].lost()):
            with suppress(RuntimeError):
                watching[0].tell(why)
            watching[0].stop(why)
        raise
