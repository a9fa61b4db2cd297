"""The time of a step: rooflines, collectives within and between nodes, overlap, and pipelines."""

from dataclasses import replace

import pytest
import torch

from litgpt.parallel.collective_calls import Collective
from litgpt.plan.operations import Operation
from litgpt.plan.pipeline_time import DeviceTime, estimate_pipeline_step
from litgpt.plan.step_time import Efficiencies, Machine, PhaseTime, add_up, estimate_step
from litgpt.recipe.gpu import GPU_FIGURES, Gpu, build_gpu

GPU = Gpu(80, 100, 50, memory_bandwidth=1000, link_bandwidth=100, network_bandwidth=10, fp8_tflops=200)
IDEAL = Efficiencies(1, 1, 1, 1, 1, 0, 0)
MACHINE = Machine(GPU, 8, IDEAL)


def compute(seconds: float, number: int = 1, phase: str = "forward") -> Operation:
    return Operation("matmul", "mm", phase, number, False, flops=seconds * 1e14, dtype=torch.bfloat16)


def send(kind: str, size: float, ranks, *, overlaps: bool = False, phase: str = "forward", number: int = 1):
    collective = Collective(kind, int(size), tuple(ranks))
    return Operation("collective", kind, phase, number, False, collective=collective, overlaps=overlaps)


@pytest.mark.parametrize(
    ("dtype", "flops", "size", "seconds"),
    [
        (torch.bfloat16, 1e14, 1e9, 1.0),
        (torch.float32, 1e14, 1e9, 2.0),
        (torch.float8_e4m3fn, 1e14, 1e9, 0.5),
        (torch.bfloat16, 1e12, 3e12, 3.0),  # bound by memory
    ],
)
def test_an_operation_takes_its_products_or_its_traffic(dtype, flops, size, seconds):
    operation = Operation("matmul", "mm", "forward", 1, False, bytes=int(size), flops=flops, dtype=dtype)
    assert MACHINE.compute_seconds(operation) == pytest.approx(seconds)
    half = Machine(GPU, 8, replace(IDEAL, matmul=0.5, memory=0.5))
    assert half.compute_seconds(operation) == pytest.approx(2 * seconds)


@pytest.mark.parametrize(
    ("kind", "ranks", "seconds"),
    [
        ("all_gather", range(8), 7 / 8),  # 100 GB by 100 GB/s
        ("reduce_scatter", range(8), 7 / 8),
        ("all_reduce", range(8), 14 / 8),
        ("all_to_all", range(8), 7 / 8),
        ("send", (0, 1), 1.0),
        ("send", (0, 8), 10.0),
        ("all_gather", range(16), 10 / 2 / 8),  # half of it from the other node, by eight GPUs, is less than 15 / 16
        ("all_gather", (0, 8), 10 / 2),
        ("all_gather", (0, 1, 8, 9), 10 / 2 / 2),
        ("all_to_all", range(16), 10 / 2),
        ("all_gather", (3,), 0.0),
    ],
)
def test_a_collective_takes_its_slowest_connection(kind, ranks, seconds):
    expected = max(seconds, 15 / 16) if len(ranks) == 16 else seconds
    assert MACHINE.compute_seconds(send(kind, 1e11, ranks)) == pytest.approx(expected)


def test_sharding_is_hidden_but_for_its_ends():
    gathers = [send("all_gather", 1e11, (0, 1), overlaps=True) for _ in range(4)]  # 0.5 s each
    assert add_up([*gathers, compute(5.0)], MACHINE).total() == pytest.approx(5.5)
    assert add_up([*gathers, compute(1.0)], MACHINE).total() == pytest.approx(2.0)
    waiting = send("all_gather", 1e11, (0, 1))
    assert add_up([*gathers, compute(5.0), waiting], MACHINE).total() == pytest.approx(6.0)


def test_micro_batches_are_repeated_and_the_rest_is_done_once():
    operations = [
        *(compute(1.0, number, phase) for number in (1, 2) for phase in ("forward", "backward")),
        send("all_gather", 1e11, (0, 1), overlaps=True, number=1),  # ZeRO-2: parameters stay gathered
        send("reduce_scatter", 1e11, (0, 1), overlaps=True, phase="backward", number=2),
        compute(0.25, 1, "optimizer"),
    ]
    parts = estimate_step(operations, MACHINE, planned=2, micro_batches=2)
    assert sum(parts.values()) == pytest.approx(4 + 0.5 + 0.5 + 0.25)
    longer = estimate_step(operations, MACHINE, planned=2, micro_batches=10)
    assert longer["collectives"] == pytest.approx(parts["collectives"]) == pytest.approx(1.0)
    assert longer["matmul"] == pytest.approx(20.25)


def build_device(forward: float, backward: float, transfer: float = 0.0) -> DeviceTime:
    times = [PhaseTime({"matmul": seconds, "attention": 0.0, "memory": 0.0}) for seconds in (forward, backward)]
    return DeviceTime(*times, PhaseTime(), transfer)


@pytest.mark.parametrize(("schedule", "stages", "bubble"), [("1f1b", 4, 9.0), ("gpipe", 4, 9.0)])
def test_a_pipeline_waits_for_its_first_and_last_micro_batches(schedule, stages, bubble):
    devices = [build_device(1.0, 2.0)] * 4
    parts = estimate_pipeline_step(devices, schedule=schedule, stages=stages, micro_batches=8)
    assert parts["bubble"] == pytest.approx(bubble)  # (devices - 1) x (forward + backward)
    assert parts["matmul"] == pytest.approx(24.0)


def test_more_stages_and_split_backward_passes_shorten_the_bubble():
    devices = [build_device(1.0, 2.0)] * 4
    bubbles = [
        estimate_pipeline_step(devices, schedule=schedule, stages=stages, micro_batches=8)["bubble"]
        for schedule, stages in (("1f1b", 4), ("interleaved", 8), ("zbv", 8))
    ]
    assert bubbles == sorted(bubbles, reverse=True) and bubbles[0] > 1.5 * bubbles[1] > bubbles[2]


def test_the_slowest_stage_and_transfers_delay_a_pipeline():
    uneven = [build_device(1.0, 2.0), build_device(2.0, 4.0)]
    parts = estimate_pipeline_step(uneven, schedule="1f1b", stages=2, micro_batches=4)
    assert parts["matmul"] == pytest.approx(24.0) and parts["bubble"] == pytest.approx(3.0)
    slow = [build_device(1.0, 2.0, 0.5)] * 2
    fast = [build_device(1.0, 2.0)] * 2
    slow_bubble, fast_bubble = (
        estimate_pipeline_step(devices, schedule="gpipe", stages=2, micro_batches=4)["bubble"]
        for devices in (slow, fast)
    )
    assert slow_bubble == pytest.approx(fast_bubble + 1.0)


@pytest.mark.parametrize("name", GPU_FIGURES)
def test_every_gpu_has_figures(name):
    gpu = build_gpu(name)
    assert gpu.network_bandwidth < gpu.link_bandwidth < gpu.memory_bandwidth
    assert gpu.tf32_tflops < gpu.bf16_tflops <= (gpu.fp8_tflops or gpu.bf16_tflops)
