"""The metrics of a training run, and their column names.

Names are LitGPT's. A single process has `device/...` columns only; with several, these are the figures of one
device, and those of the whole run have the bare name. Ranks that share a batch (tensor, context and pipeline
parallelism) count as one device, except in FLOPs, which are those of one process and of all processes.

Tokens per second are the tokens of all ranks by the seconds of training: without the first step, which compiles, and
without evaluation and saving. The columns and the progress line have it over the last steps, the summary at the end
over all steps of the process.

    column                        unit
    time                          s since the first start of the run, evaluation and saving included
    batches, samples, lengths     micro-batches, samples, tokens of this process since the first start of the run
    device/batches_per_sec, device/samples_per_sec, device/items_per_sec    1/s over the window (items are tokens)
    device/flops_per_sec          FLOP/s over the window
    device/mfu                    the former as a fraction of the device's peak; missing if the peak is not known
"""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from litgpt.recipe.gpu import find_peaks


def peak_flops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """Peak FLOP/s of a device in matmuls of a precision; None if the table does not have the device.

    Args:
        device_name: as returned by `torch.cuda.get_device_name`.
        precision: Fabric's name, such as `bf16-mixed`.
        tf32: whether float32 matmuls may use TF32 (`torch.get_float32_matmul_precision() != "highest"`).
    """
    if (peaks := find_peaks(device_name)) is None:
        return None
    if precision.startswith(("bf16", "16")):
        return peaks.half * 1e12
    if precision.startswith("32"):
        return (peaks.tf32 if tf32 else peaks.fp32) * 1e12
    return None


def get_device_peak(device: torch.device, precision: str) -> float | None:
    """`peak_flops` of a torch device; None on a CPU."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_flops(torch.cuda.get_device_name(device), precision, tf32=tf32)


def get_peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in 1e9 bytes: allocated on a CUDA device, otherwise the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Meter:
    """Counts the work of a run, and measures its throughput over the last few steps.

    Time in `with meter.exclude("evaluation")` is counted under that name, and excluded from throughput.

    Args:
        ranks: data ranks; each is assumed to train on as many samples.
        processes: processes that train; each is assumed to compute as much. None for one per data rank.
        peak: peak FLOP/s of one device, from `get_device_peak`.
        window: number of steps over which throughput is measured.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        *,
        ranks: int = 1,
        processes: int | None = None,
        peak: float | None = None,
        window: int = 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.ranks, self.processes, self.peak, self.clock = ranks, processes or ranks, peak, clock
        self.started = clock()
        self.other_seconds: dict[str, float] = {}
        self.counts = {"batches": 0, "samples": 0, "tokens": 0, "flops": 0.0}  # of this process since it started
        self.resumed = {"time": 0.0, "batches": 0, "samples": 0, "lengths": 0}  # totals of the resumed checkpoint
        self.window: deque[tuple[float, dict[str, float]]] = deque(maxlen=window + 1)
        self.first: tuple[float, dict[str, float]] | None = None  # after the first step

    @property
    def seconds(self) -> float:
        """Seconds since this process started, including evaluation and saving."""
        return self.clock() - self.started

    @property
    def training_seconds(self) -> float:
        """Seconds since this process started, without the excluded ones."""
        return self.seconds - sum(self.other_seconds.values())

    def update(self, *, samples: int, tokens: int, flops: float = 0.0, batches: int = 1) -> None:
        """Count one optimizer step of this process: its samples, tokens, FLOPs and micro-batches."""
        for name, count in (("batches", batches), ("samples", samples), ("tokens", tokens), ("flops", flops)):
            self.counts[name] += count
        self.window.append((self.training_seconds, dict(self.counts)))
        self.first = self.first or self.window[-1]

    @contextmanager
    def exclude(self, name: str) -> Iterator[None]:
        """Count the seconds of this block under `name`, not as training."""
        started = self.clock()
        try:
            yield
        finally:
            self.other_seconds[name] = self.other_seconds.get(name, 0.0) + self.clock() - started

    def totals(self) -> dict[str, float]:
        """The columns `time`, `batches`, `samples` and `lengths`, counted from the first start of the run."""
        counts = {"time": self.seconds, "lengths": self.counts["tokens"]}
        counts |= {name: self.counts[name] for name in ("batches", "samples")}
        return {name: self.resumed[name] + value for name, value in counts.items()}

    def rates(self) -> dict[str, float]:
        """The columns of throughput over the window; empty before the second update."""
        if len(self.window) < 2 or self.window[-1][0] <= self.window[0][0]:
            return {}
        (start, before), (end, after) = self.window[0], self.window[-1]
        columns = {"batches": "batches", "samples": "samples", "tokens": "items", "flops": "flops"}
        deltas = {column: after[name] - before[name] for name, column in columns.items()}
        rates = {f"{column}_per_sec": delta / (end - start) for column, delta in deltas.items() if delta}
        metrics = {f"device/{name}": rate for name, rate in rates.items()}
        if self.processes > 1:
            factors = {"flops_per_sec": self.processes}
            metrics |= {name: rate * factors.get(name, self.ranks) for name, rate in rates.items()}
        if self.peak and "flops_per_sec" in rates:
            metrics["device/mfu"] = rates["flops_per_sec"] / self.peak
        return metrics

    def mean_tokens_per_sec(self) -> float | None:
        """Tokens per second of all ranks over all steps of this process but the first; None before the second step."""
        if self.first is None or self.window[-1][0] <= self.first[0]:
            return None
        (start, before), (end, after) = self.first, self.window[-1]
        return self.ranks * (after["tokens"] - before["tokens"]) / (end - start)

    def estimate_remaining(self, steps: int | None, seconds: float | None) -> float | None:
        """Estimated seconds to the end of the run, whichever limit is reached first; None if not known yet.

        Steps are estimated to take as long as those of the window, which has neither the first step nor what is
        excluded.

        Args:
            steps: optimizer steps that are left; None without a limit.
            seconds: seconds that are left; None without a limit.
        """
        if len(self.window) < 2:
            return None
        seconds_per_step = (self.window[-1][0] - self.window[0][0]) / (len(self.window) - 1)
        limits = [] if seconds is None else [seconds]
        limits += [] if steps is None else [steps * seconds_per_step]
        return max(0.0, min(limits)) if limits else None

    def state_dict(self) -> dict[str, float]:
        """Return the totals for a checkpoint."""
        return self.totals()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from the totals of a checkpoint."""
        self.resumed = {name: state[name] for name in self.resumed}
