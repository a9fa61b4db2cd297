"""The parts of a step, read from a profile, have the FLOPs of their products and all of the step's time."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.limit import compute_seconds_at_limit, count_optimizer_bytes, read_trace
from litgpt.train.cross_entropy import Labels, chunked_cross_entropy
from litgpt.train.profiler import TRACE, StepProfiler


def profile_steps(folder: Path) -> None:
    """Profile two steps of 48 tokens: a product of 16 x 24, attention of 2 heads of 12, a head of 40 rows."""
    layer, head = nn.Linear(16, 24), nn.Linear(24, 40, bias=False)
    optimizer = torch.optim.AdamW([*layer.parameters(), *head.parameters()], fused=True)
    labels = Labels(torch.arange(48).remainder(40).view(4, 12))
    profiler = StepProfiler((1, 2), folder, torch.device("cpu"), lambda _line: None)
    for step in (1, 2):
        with profiler.profile_step(step):
            with torch.profiler.record_function("forward"):
                hidden = layer(torch.ones(4, 12, 16))
                heads = hidden.unflatten(-1, (2, 12)).transpose(1, 2)
                mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
                hidden = mixed.transpose(1, 2).flatten(2)
                loss = chunked_cross_entropy(hidden, head.weight, None, target=labels, chunk_rows=48)
            with torch.profiler.record_function("backward"):
                loss.backward()
            with torch.profiler.record_function("optimizer"):
                optimizer.step()


def test_parts_have_their_work_and_the_time_of_the_step(tmp_path: Path) -> None:
    profile_steps(tmp_path)
    parts, shapes = read_trace(tmp_path / TRACE)
    assert parts["products"]["float32"] == 2 * (2 * 48 * 16 * 24)  # the input needs no gradient
    assert parts["head and loss"]["float32"] == 3 * (2 * 48 * 24 * 40)
    assert parts["attention"]["float32"] == 7 * (2 * 4 * 2 * 12 * 12 * 12) / 2
    assert shapes["bfloat16"] == [] and shapes["float32"][0] in {(48, 24, 40), (48, 40, 24), (40, 48, 24)}
    events = json.loads(gzip.decompress((tmp_path / TRACE).read_bytes()))["traceEvents"]
    steps = [event["dur"] / 1e6 for event in events if str(event.get("name")).startswith("step ")]
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(sum(steps) / 2, rel=1e-3)
    assert all(part["seconds"] > 0 for part in parts.values())


def test_the_bytes_of_the_optimizer_are_those_of_all_trained_parameters(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"model": {"parameters": 50, "trained_parameters": 40}}))
    assert count_optimizer_bytes(tmp_path / "profile" / TRACE) == 28 * 40


def test_the_time_at_the_limit_adds_products_and_bytes() -> None:
    part = {"seconds": 9.0, "float32": 30.0, "bfloat16": 40.0, "bandwidth": 5.0}
    assert compute_seconds_at_limit(part, {"float32": 10.0, "bfloat16": 20.0, "bandwidth": 5.0}) == 6
