"""Notice that a process of a run is gone, and say which, instead of waiting for it."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from litgpt.errors import UserError

BEAT = 1.0  # seconds between signs of life
PATIENCE = 8.0  # seconds in which those that are left give a sign, once an exchange has failed
ADVICE = "the others stop; start again with resume: auto"


class Watch:
    """Signs of life of all ranks in the store through which they found each other.

    Every rank gives some, and looks after the next one. Whoever finds a rank gone tells all others, who stop within a
    beat, whatever they wait for.

    Args:
        silence: seconds without a sign of life, by this rank's own beats, after which the next rank is given up.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, silence: float) -> None:
        self.store, self.rank, self.ranks, self.silence = store, rank, ranks, silence
        self.ended, self.ending = threading.Event(), threading.Lock()
        store.set(f"who/{rank}", f"rank {rank} of {ranks} (process {os.getpid()} on {socket.gethostname()})")
        threading.Thread(target=self._look, name="watch", daemon=True).start()

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
                    self.tell(self.name(next_one))
                if told := self.told():
                    self.stop(told)
            except RuntimeError:
                if not self.ended.wait(PATIENCE):
                    self.stop(self.without_store())

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

    def tell(self, gone: str) -> None:
        """Let all ranks know who is gone; the first to tell is believed."""
        self.store.compare_set("gone", "", gone)

    def told(self) -> str:
        """Who is said to be gone; empty if nobody."""
        return self.store.get("gone").decode() if self.store.check(["gone"]) else ""

    def lost(self) -> str:
        """Who is gone, after an exchange has failed; empty if all others are still there."""
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
                self.tell(" and ".join(map(self.name, silent)))
            return self.told()
        except RuntimeError:
            return self.without_store()

    def stop(self, gone: str) -> None:
        """End this process, at once: others may never come to what it waits for."""
        with self.ending:  # held until the end, so that one thread alone speaks
            print(f"litgpt: error: {gone} is gone; {ADVICE}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)


watching: list[Watch] = []  # at most one


def begin(silence: float) -> None:
    """Watch the ranks of the default process group."""
    store = dist.distributed_c10d._get_default_store()
    # of its own connection: another thread may wait on that of the group
    apart = dist.PrefixStore("watch", store.clone())
    watching.append(Watch(apart, dist.get_rank(), dist.get_world_size(), silence))


def end() -> None:
    """Watch no more, and be watched no more."""
    while watching:
        watching.pop().end()


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """If what runs inside fails because a rank is gone, say so and end this process; else let the error pass."""
    try:
        yield
    except UserError:
        raise
    except Exception:
        if watching and (gone := watching[0].lost()):
            watching[0].stop(gone)
        raise
