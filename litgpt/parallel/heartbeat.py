"""Heartbeats: when a rank is lost or fails, all processes of the run exit with one line that says why."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from litgpt.errors import UserError
from litgpt.parallel import stacks
from litgpt.parallel.memory_errors import is_out_of_memory

INTERVAL = 1.0  # seconds between heartbeats
PATIENCE = 8.0  # seconds that the other ranks have for a heartbeat after a collective has failed
EXIT_TIMEOUT = 10.0  # seconds within which all ranks exit together
POLL_INTERVAL = 0.05  # seconds between checks whether all are ready to
RESTART = "start again with resume: auto"


class Heartbeat:
    """Heartbeats of all ranks, in the store of their rendezvous.

    Every rank sends heartbeats, and watches those of the next rank. A rank that finds another one lost, or that fails,
    announces the reason to all ranks, which exit within a heartbeat, whatever they wait for.

    Args:
        timeout: seconds without a heartbeat, counted in this rank's own, after which the next rank is lost.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.stopped, self.exiting = threading.Event(), threading.Lock()
        self.hang = ""  # what takes too long on this rank
        store.set(f"who/{rank}", f"rank {rank} of {world_size} (process {os.getpid()} on {socket.gethostname()})")
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Send no more heartbeats, and let the other ranks know that none are expected.

        The first rank, which holds the store, waits for the others, which would warn of a store that does not answer.
        """
        self.stopped.set()
        with suppress(RuntimeError):  # the first rank has exited already
            self.store.add(f"left/{self.rank}", 1)
            if self.rank == 0:
                self.wait_for_leaving(time.monotonic() + EXIT_TIMEOUT)

    def _run(self) -> None:
        next_rank = (self.rank + 1) % self.world_size
        last_count, missed = -1, 0
        while not self.stopped.wait(INTERVAL):
            try:
                self.share_hang()  # first, because a rank whose collective has failed reads it after the heartbeat
                self.store.add(f"beat/{self.rank}", 1)
                count = self.count_beats(next_rank)
                missed, last_count = (missed + 1 if count == last_count else 0), count
                if missed * INTERVAL > self.timeout and not self.has_left(next_rank):
                    self.announce_lost([next_rank])
                if reason := self.get_announcement():
                    self.abort(reason)
            except RuntimeError:
                if not self.stopped.wait(PATIENCE):
                    self.abort(self.store_lost_message())

    def count_beats(self, rank: int) -> int:
        """The number of heartbeats of a rank so far."""
        return self.store.add(f"beat/{rank}", 0)

    def has_left(self, rank: int) -> bool:
        """Whether a rank is done, or about to exit."""
        return self.store.add(f"left/{rank}", 0) > 0

    def describe_rank(self, rank: int) -> str:
        """A rank with its process and its machine."""
        key = f"who/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else f"rank {rank} of {self.world_size}"

    def store_lost_message(self) -> str:
        """The message for a store that does not answer."""
        return lost_message(f"rank 0 of {self.world_size}, or its machine,")

    def announce_lost(self, ranks: list[int]) -> None:
        """Announce to all ranks that some are lost, unless something has been announced before."""
        hang = self.share_hang()
        self.announce(lost_message(" and ".join(map(self.describe_rank, ranks))) + (f" ({hang})" if hang else ""))
        for rank in ranks:
            self.store.add(f"left/{rank}", 1)  # so that nobody waits for it
            self.store.add("leaving", 1)

    def share_hang(self) -> str:
        """Tell all ranks of a step that takes too long on any of them, so that each writes its stacks.

        Returns:
            What takes too long, and where the stacks are; empty if nothing does.
        """
        message = next((report.poll() for report in stacks.active), self.hang)  # the last one, once training has ended
        if message != self.hang:  # which is empty again after a step that was only slow
            self.store.set("hang", message)
        self.hang = message
        shared = self.store.get("hang").decode() if self.store.check(["hang"]) else ""
        for report in stacks.active if shared else ():
            report.write(shared)
        return shared

    def claim(self, task: str) -> bool:
        """Whether this rank is the first of all to claim a task."""
        return self.store.add(f"claim/{task}", 1) == 1

    def announce(self, reason: str) -> None:
        """Announce to all ranks why the run ends, unless something has been announced before."""
        self.store.compare_set("over", "", reason)

    def get_announcement(self) -> str:
        """Why the run ends; empty if it does not."""
        return self.store.get("over").decode() if self.store.check(["over"]) else ""

    def find_lost_ranks(self) -> str:
        """Why the run ends after a collective has failed; empty if no rank is lost, and none hangs in a step."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            first_counts = {rank: self.count_beats(rank) for rank in others}
            deadline = time.monotonic() + PATIENCE
            silent = others
            while silent and time.monotonic() < deadline:
                time.sleep(INTERVAL / 4)
                if reason := self.get_announcement():
                    return reason
                silent = [r for r in silent if self.count_beats(r) == first_counts[r] and not self.has_left(r)]
            if silent:
                self.announce_lost(silent)
            hang = self.share_hang()
            return self.get_announcement() or (f"{hang}; {RESTART}" if hang else "")
        except RuntimeError:
            return self.store_lost_message()

    def abort(self, reason: str) -> None:
        """Exit this process together with all others, whatever collectives they wait in."""
        with self.exiting:  # never released, so that only one thread prints
            if self.is_first_to_print(reason):
                print(f"litgpt: error: {reason}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            with suppress(RuntimeError):  # the first rank, which holds the store, is lost
                self.share_hang()
                self.exit_together()
            os._exit(1)

    def is_first_to_print(self, line: str) -> bool:
        """Whether no other rank has printed a line to the terminal or file to which this rank would print it."""
        output = os.fstat(sys.stderr.fileno())
        try:
            return self.store.add(f"said/{socket.gethostname()}/{output.st_dev}/{output.st_ino}/{line}", 1) == 1
        except RuntimeError:
            return True

    def wait_for_leaving(self, deadline: float) -> None:
        """Wait until all ranks are about to exit, or for a deadline."""
        while time.monotonic() < deadline and not all(map(self.has_left, range(self.world_size))):
            time.sleep(POLL_INTERVAL)

    def exit_together(self) -> None:
        """Wait until all ranks are about to exit; on the first one, which holds the store, until the others have.

        Otherwise the remaining ranks would report the first one to exit as lost.
        """
        deadline = time.monotonic() + EXIT_TIMEOUT
        self.store.add(f"left/{self.rank}", 1)
        self.wait_for_leaving(deadline)
        leaving = self.store.add("leaving", 1)
        while self.rank == 0 and time.monotonic() < deadline and leaving < self.world_size:
            time.sleep(POLL_INTERVAL)
            leaving = self.store.add("leaving", 0)
        if self.rank == 0:
            time.sleep(POLL_INTERVAL)  # for the others to exit


def lost_message(who: str) -> str:
    """The message for lost ranks."""
    return f"{who} is gone; the others stop; {RESTART}"


running: list[Heartbeat] = []  # at most one


def start_heartbeat(timeout: float) -> None:
    """Start the heartbeat of this rank of the default process group."""
    store = dist.distributed_c10d._get_default_store()
    # over a connection of its own: another thread may be waiting on that of the process group
    own_store = dist.PrefixStore("heartbeat", store.clone())
    running.append(Heartbeat(own_store, dist.get_rank(), dist.get_world_size(), timeout))


def stop_heartbeat() -> None:
    """Stop the heartbeat of this rank, if it was started."""
    while running:
        running.pop().stop()


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """On an exception, exit all processes of the run with one line that says why.

    That is the exception's message if it is a `UserError`, or which ranks are lost if that is why a collective failed.
    Other exceptions are raised as they are; one of memory, which says itself why the run ends, at once.
    """
    try:
        yield
    except Exception as error:
        if not running or is_out_of_memory(error):
            raise
        if reason := str(error) if isinstance(error, UserError) else running[0].find_lost_ranks():
            with suppress(RuntimeError):
                running[0].announce(reason)
            running[0].abort(reason)
        raise
