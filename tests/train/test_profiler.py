"""The profile of steps: which are profiled, what is written, and that the summary agrees with what ran."""

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from litgpt.errors import UserError
from litgpt.model.attention import attend
from litgpt.model.cpu_attention import BY_PRODUCTS
from litgpt.recipe.profile import ProfileArgs
from litgpt.train.profile_summary import OTHER_KIND, REST, Gap, find_gaps, find_kind
from litgpt.train.profiler import StepProfiler

PAUSE = 0.05  # seconds


def take_steps(folder: Path, steps: list[int] | None, count: int = 5) -> list[str]:
    """Take some steps with two products of matrices, a sum and a pause each; returns what the profiler prints."""
    lines: list[str] = []
    left, right = torch.ones(128, 256), torch.ones(256, 512)
    with StepProfiler(steps, folder, torch.device("cpu"), lines.append) as profiler:
        for step in range(1, count + 1):
            with profiler.profile_step(step):
                with record_function("forward"):
                    left @ right
                time.sleep(PAUSE)
                with record_function("backward"):
                    (left @ right).sum()
    return lines


def read_tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of the tables of a summary, without their heads, by section."""
    sections = {part.partition("\n")[0]: part for part in text.split("## ")[1:]}
    rows = {
        name: [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
        for name, part in sections.items()
    }
    return {name: part[1:] for name, part in rows.items()}


def test_the_summary_agrees_with_the_steps(tmp_path: Path) -> None:
    (line,) = take_steps(tmp_path / "profile", [2, 4])
    assert line == f"profile of steps 2 to 4: {tmp_path}/profile/summary.md"
    text = (tmp_path / "profile/summary.md").read_text()
    tables = read_tables(text)
    phases, kinds, gaps, operations, allocations = tables.values()
    assert phases[0][0] == REST and {row[0] for row in phases} == {REST, "forward", "backward"}
    for rows in (phases, kinds):
        assert sum(float(row[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.5)
    assert {"matrix products", OTHER_KIND} <= {row[0] for row in kinds}
    assert all(float(row[0]) >= 1e3 * PAUSE for row in gaps[:3])
    assert ["aten::mm", "128x256 256x512", "6"] in [row[:3] for row in operations]
    assert allocations[0] == ["aten::mm", "128x256 256x512", "6", "0.26"]  # 128 x 512 x 4 bytes
    with gzip.open(tmp_path / "profile/trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step 2", "step 4", "forward", "aten::mm"} <= names and not {"step 1", "step 5"} & names


def test_a_run_that_ends_within_the_range_or_before_it(tmp_path: Path) -> None:
    assert take_steps(tmp_path / "within", [4, 9]) == [f"profile of steps 4 to 5: {tmp_path}/within/summary.md"]
    assert take_steps(tmp_path / "none", None) == []
    assert take_steps(tmp_path / "before", [8, 9]) == [
        "profile.steps: [8, 9] has no effect: the run did not take these steps"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["within"]


def test_an_error_in_a_step_is_not_hidden_and_stops_the_profiler(tmp_path: Path) -> None:
    profiler = StepProfiler([1, 3], tmp_path / "profile", torch.device("cpu"), print)
    with pytest.raises(UserError, match="broken"), profiler, profiler.profile_step(1):
        raise UserError("data: broken")
    assert profiler.running is None and not (tmp_path / "profile").exists()
    assert take_steps(tmp_path / "profile", [1, 1], count=1)  # another one can start


def make_event(name: str, start: float, end: float) -> Any:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def test_gaps_are_between_operations_that_may_overlap() -> None:
    events = [make_event("b", 20, 30), make_event("a", 10, 40), make_event("c", 45, 50), make_event("early", 0, 5)]
    idle, gaps = find_gaps(events, 4, 60)
    assert idle == 20
    assert gaps == [Gap(10, "c", "the end"), Gap(5, "early", "a"), Gap(5, "a", "c")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("nvjet_tst_128x256_64x4_gemm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and conversions"),
        ("aten::_fused_rms_norm", "normalization"),
        ("triton_poi_fused_mul_0", "compiled kernels"),
        ("aten::mul", OTHER_KIND),
    ],
)
def test_kinds_of_operations(name: str, kind: str) -> None:
    assert find_kind(name) == kind


@pytest.mark.parametrize("steps", [[3], [4, 2], [1, 2, 3]])
def test_steps_that_are_no_range_are_refused(steps: list[int]) -> None:
    with pytest.raises(UserError, match=r"profile.steps: .* is not valid; use the first and the last step"):
        ProfileArgs(steps)


def test_what_an_own_operation_calls_is_of_its_kind(tmp_path: Path) -> None:
    q, k, v = (torch.randn(1, 2, BY_PRODUCTS.start, 8, requires_grad=True) for _ in range(3))
    with StepProfiler([1, 1], tmp_path, torch.device("cpu"), lambda _: None) as profiler, profiler.profile_step(1):
        attend(q, k, v, mask=None, causal=True, scale=1.0)
    kinds = read_tables((tmp_path / "summary.md").read_text())["Operations on the CPU, by kind"]
    assert [row[0] for row in kinds] == ["attention"]
