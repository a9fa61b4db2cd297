"""The meter's figures against hand-worked ones, and what a person sees of them."""

import io

import pytest
import torch
from rich.console import Console

from litgpt.train.console import RunConsole, RunSummary, format_duration, format_progress, render_summary
from litgpt.train.metrics import Meter, get_peak_memory_gb, peak_flops


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def meter_after(steps: list[float], **settings: float) -> tuple[Meter, Clock]:
    """A meter after steps of 4 samples, 40 tokens and 1e9 FLOPs that took these seconds."""
    clock = Clock()
    meter = Meter(clock=clock, **settings)  # type: ignore[arg-type]
    for seconds in steps:
        clock.now += seconds
        meter.update(samples=4, tokens=40, flops=1e9, batches=2)
    return meter, clock


def test_rates_leave_out_the_first_step_which_compiles() -> None:
    meter, _ = meter_after([60.0, 2.0, 2.0])
    assert meter.rates() == pytest.approx(
        {
            "device/batches_per_sec": 1.0,
            "device/samples_per_sec": 2.0,
            "device/items_per_sec": 20.0,
            "device/flops_per_sec": 5e8,
        }
    )


def test_there_is_no_rate_after_one_step() -> None:
    assert meter_after([1.0])[0].rates() == {}


def test_the_window_forgets_older_steps() -> None:
    meter, _ = meter_after([1.0, 100.0, 2.0, 2.0], window=2)
    assert meter.rates()["device/items_per_sec"] == pytest.approx(20.0)


def test_several_ranks_have_the_sum_under_the_bare_name() -> None:
    rates = meter_after([1.0, 2.0], ranks=4)[0].rates()
    assert rates["device/items_per_sec"] == pytest.approx(20.0)
    assert rates["items_per_sec"] == pytest.approx(80.0)
    assert rates["samples_per_sec"] == pytest.approx(8.0)
    assert rates["flops_per_sec"] == pytest.approx(2e9)


def test_flops_are_those_of_all_processes_also_of_ranks_that_share_a_batch() -> None:
    rates = meter_after([1.0, 2.0], ranks=2, processes=8, peak=1e9)[0].rates()  # such as 2 data ranks of 4 processes
    assert rates["items_per_sec"] == pytest.approx(40.0)
    assert rates["device/flops_per_sec"] == pytest.approx(5e8) and rates["flops_per_sec"] == pytest.approx(4e9)
    assert rates["device/mfu"] == pytest.approx(0.5)
    shared = meter_after([1.0, 2.0], processes=4)[0].rates()
    assert shared["flops_per_sec"] == pytest.approx(2e9) and shared["items_per_sec"] == pytest.approx(20.0)


def test_mfu_is_a_share_of_the_peak_of_one_device() -> None:
    rates = meter_after([1.0, 2.0], ranks=4, peak=1e9)[0].rates()
    assert rates["device/mfu"] == pytest.approx(0.5)
    assert "device/mfu" not in meter_after([1.0, 2.0])[0].rates()


def test_flops_that_nobody_counted_are_not_a_column() -> None:
    clock = Clock()
    meter = Meter(clock=clock, peak=1e12)
    for _ in range(3):
        clock.now += 1
        meter.update(samples=1, tokens=1)
    assert not {"device/flops_per_sec", "device/mfu"} & meter.rates().keys()


def test_evaluation_is_in_no_rate_but_in_the_time() -> None:
    meter, clock = meter_after([1.0, 2.0])
    with meter.exclude("evaluation"):
        clock.now += 500
    clock.now += 2
    meter.update(samples=4, tokens=40, flops=1e9, batches=2)
    assert meter.rates()["device/items_per_sec"] == pytest.approx(20.0)
    assert meter.other_seconds == {"evaluation": 500.0}
    assert meter.training_seconds == pytest.approx(5.0)
    assert meter.totals() == {"time": 505.0, "batches": 6, "samples": 12, "lengths": 120}


def test_the_summary_and_the_line_have_the_same_tokens_per_second() -> None:
    meter, clock = meter_after([60.0, 2.0, 4.0, 3.0], ranks=2)
    with meter.exclude("saving"):
        clock.now += 50
    assert meter.mean_tokens_per_sec() == meter.rates()["items_per_sec"] == pytest.approx(2 * 40 * 3 / 9)
    assert meter_after([60.0])[0].mean_tokens_per_sec() is None
    late, _ = meter_after([60.0, 1.0, *[2.0] * 30])  # over a window, and over all steps
    assert late.rates()["device/items_per_sec"] == pytest.approx(20.0)
    assert late.mean_tokens_per_sec() == pytest.approx(40 * 31 / 61)


def test_a_continued_run_counts_on_but_measures_itself_only() -> None:
    earlier, _ = meter_after([1.0, 2.0])
    meter, clock = meter_after([])
    meter.load_state_dict(earlier.state_dict())
    clock.now += 4
    meter.update(samples=4, tokens=40, batches=2)
    assert meter.totals() == {"time": 7.0, "batches": 6, "samples": 12, "lengths": 120}
    assert meter.counts["tokens"] == 40
    assert meter.training_seconds == 4.0


def test_remaining_time_goes_by_steady_steps() -> None:
    """Neither the first step after a start nor evaluation and saving are in the time of a step."""
    meter, clock = meter_after([30.0])
    assert meter.estimate_remaining(100, None) is None
    with meter.exclude("evaluation"):
        clock.now += 500
    clock.now += 2
    meter.update(samples=4, tokens=40)
    assert meter.estimate_remaining(50, None) == pytest.approx(100.0)
    assert meter.estimate_remaining(50, 70.0) == 70.0
    assert meter.estimate_remaining(0, 70.0) == meter.estimate_remaining(None, -1.0) == 0.0
    assert meter.estimate_remaining(None, None) is None


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", False, 989.4),
        ("NVIDIA H100 PCIe", "bf16-true", False, 756.0),
        ("NVIDIA H100 NVL", "16-mixed", False, 835.5),
        ("NVIDIA A100-SXM4-80GB", "32-true", False, 19.5),
        ("NVIDIA A100-SXM4-80GB", "32-true", True, 156.0),
        ("NVIDIA A10G", "bf16-mixed", False, 70.0),
        ("NVIDIA A10", "bf16-mixed", False, 125.0),
        ("NVIDIA L40S", "bf16-mixed", False, 362.0),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", False, 165.2),
    ],
)
def test_peaks_by_device_name(name: str, precision: str, tf32: bool, teraflops: float) -> None:
    assert peak_flops(name, precision, tf32=tf32) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed"),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16-mixed"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-mixed"),
        ("NVIDIA H100 80GB HBM3", "64-true"),
        ("A device of tomorrow", "bf16-mixed"),
    ],
)
def test_a_peak_that_is_not_known_is_not_guessed(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


def test_memory_is_measured() -> None:
    cpu = torch.device("cpu")
    before = get_peak_memory_gb(cpu)
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert before > 0.005
    assert get_peak_memory_gb(cpu) >= before


METRICS = {
    "step": 12.0,
    "loss": 3.21,
    "device/items_per_sec": 2900.4,
    "learning_rate": 3e-4,
    "memory_gb": 1.25,
    "epoch": 0.5,
    "remaining_time": 3725.0,
}


def shown(
    *updates: dict[str, float], terminal: bool, enabled: bool = True, fraction: float | None = None, width: int = 200
) -> str:
    """What the progress line shows for these updates."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, soft_wrap=True)
    with RunConsole(total_steps=100, enabled=enabled, console=console) as progress:
        for metrics in updates:
            progress.update(metrics, fraction)
        progress.print("Saved step-00000012 [as it is]")
    return file.getvalue()


def test_without_a_terminal_each_update_is_an_ordinary_line() -> None:
    lines = shown(METRICS, {"step": 13.0, "val_loss": 3.4}, terminal=False, fraction=0.12).splitlines()
    assert lines[0] == (
        "step 12/100 | 1:02:05 left | loss 3.210 | 2,900 tokens/s | lr 3.00e-04 | 1.2 GB | epoch 0.50 | 12%"
    )
    assert "val 3.400" in lines[1] and "loss 3.210" in lines[1]
    assert lines[2:] == ["Saved step-00000012 [as it is]"]


def test_on_a_terminal_the_line_is_written_over() -> None:
    text = shown(METRICS, METRICS | {"step": 13.0}, terminal=True)
    assert "step 13/100" in text
    assert "\x1b[2K" in text
    assert "Saved step-00000012" in text


def test_the_line_of_a_terminal_of_80_columns_has_what_comes_first_and_does_not_wrap() -> None:
    most = METRICS | {"step": 123_456.0, "val_loss": 3.4, "skipped_steps": 2.0, "device/mfu": 0.41}
    line = format_progress(most, 200_000, 0.62, width=80)
    assert line == "step 123,456/200,000 | 1:02:05 left | loss 3.210 | val 3.400 | skipped 2"
    assert format_progress(most, 200_000, 0.62).startswith(line)
    for width in range(20, 120):
        assert len(format_progress(most, 200_000, 0.62, width=width)) < width
    text = shown(most, terminal=True, width=80)
    assert line.replace("200,000", "100") in text and "2,900" not in text and "…" not in text


def test_only_the_first_rank_prints() -> None:
    assert shown(METRICS, terminal=False, enabled=False) == ""
    assert shown(METRICS, terminal=True, enabled=False) == ""


def test_skipped_steps_show_only_if_there_are_any() -> None:
    assert "skipped" not in shown(METRICS | {"skipped_steps": 0}, terminal=False)
    assert "skipped 2" in shown(METRICS | {"skipped_steps": 2}, terminal=False)


def as_text(summary: RunSummary) -> str:
    """The end report as it is printed."""
    file = io.StringIO()
    Console(file=file, width=120).print(render_summary(summary))
    return file.getvalue()


def test_end_report_of_a_resumed_run_tells_its_own_speed() -> None:
    text = as_text(
        RunSummary(
            reason="max_steps: 100 reached",
            steps=100,
            steps_run=20,
            tokens=102_400,
            tokens_run=20_480,
            tokens_per_sec=2_000.0,
            training_seconds=10.24,
            other_seconds={"evaluation": 5.0, "saving": 1.5},
            val_losses={80: 3.25, 100: 3.5},
        )
    )
    assert "2,000, mean after the first step" in text
    assert "102,400 (20,480 in this run)" in text
    assert "training 10.2 s, evaluation 5.0 s, saving 1.5 s" in text
    assert "3.5000, best 3.2500 at step 80" in text


def test_end_report_leaves_out_what_is_not_known() -> None:
    text = as_text(
        RunSummary(
            reason="SIGTERM", steps=0, steps_run=0, tokens=0, tokens_run=0, tokens_per_sec=None, training_seconds=0.0
        )
    )
    assert "SIGTERM" in text
    assert not any(word in text for word in ("Tokens/s", "Validation", "Skipped", "None", "in this run"))


def test_durations_of_days_stay_in_hours() -> None:
    assert format_duration(59.6) == "0:01:00"
    assert format_duration(100 * 3600) == "100:00:00"
