"""The profile of some steps of a run: a trace, a summary of one page, and on GPUs a snapshot of the memory."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from litgpt.files import write_text
from litgpt.phases import phase
from litgpt.train.profile_summary import format_summary

TRACE, SUMMARY, MEMORY = "trace.json.gz", "summary.md", "memory.pickle"
PROFILE_SUMMARY = f"profile/{SUMMARY}"  # in the folder of a run
STEP = "step "  # and its number: the name of a step in the trace
MEMORY_EVENTS = 100_000  # allocations in the snapshot


class StepProfiler:
    """Profiles the steps of a range inside a `with` block, and writes `<folder>` after the last one.

    Args:
        steps: the first and the last optimizer step; None for none, as on all processes but the first.
        notify: prints a line.
    """

    def __init__(
        self, steps: Sequence[int] | None, folder: Path, device: torch.device, notify: Callable[[str], None]
    ) -> None:
        self.steps, self.folder, self.device, self.notify = steps, folder, device, notify
        self.running: profile | None = None
        self.profiled: list[int] = []

    def __enter__(self) -> "StepProfiler":
        return self

    @contextmanager
    def profile_step(self, step: int) -> Iterator[None]:
        """Profile the block if it is a step of the range."""
        if self.steps is None or not self.steps[0] <= step <= self.steps[1]:
            yield
            return
        if self.running is None:
            self.start()
        with record_function(f"{STEP}{step}"):
            yield
        self.profiled.append(step)
        if step == self.steps[1]:
            self.write()

    def start(self) -> None:
        """Start the profiler, and the history of allocations on a GPU."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the library of the profiler prints lines of its own
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self.running = profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True)
        self.running.start()

    def stop(self) -> profile:
        """Stop the profiler and return it."""
        assert self.running is not None
        stopped, self.running = self.running, None
        stopped.stop()
        return stopped

    def write(self) -> None:
        """Stop the profiler and write the trace, the summary and the snapshot, in the place of earlier ones."""
        with phase("writing the profile"):
            stopped = self.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            stopped.export_chrome_trace(str(self.folder / TRACE))
            summary = format_summary(stopped.events(), self.profiled, is_cuda=self.device.type == "cuda")
            write_text(self.folder / SUMMARY, summary)
            if self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self.folder / MEMORY))
                torch.cuda.memory._record_memory_history(enabled=None)
        self.notify(f"profile of steps {self.profiled[0]} to {self.profiled[-1]}: {self.folder / SUMMARY}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            if self.running is not None:
                with suppress(RuntimeError):
                    self.stop()
        elif self.running is not None:  # the run has ended before the last step of the range
            self.write()
        elif self.steps is not None and not self.profiled:
            self.notify(f"profile.steps: {list(self.steps)} has no effect: the run did not take these steps")
