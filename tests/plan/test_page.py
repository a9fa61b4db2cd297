"""The page of a plan: memory by kind and rank, the memory of a step, its time, and layouts."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from litgpt.cli import main
from litgpt.plan.layout_options import LayoutOption, Recomputation
from litgpt.plan.memory import KINDS
from litgpt.plan.page import write_plan_page
from litgpt.plan.repeated_layers import Estimate
from litgpt.plan.search import SearchResult
from litgpt.recipe.build import build_recipe
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.plan import Plan
from litgpt.recipe.pretrain import Pretrain
from tests.commands.test_plan import RUN
from tests.infer.server.chromium import PROGRAM, start_chromium

RECIPE = build_recipe(Pretrain, {"model_name": "tiny", "out_dir": "out/<b>bold</b>"})
LAYOUTS = [
    LayoutOption(
        RECIPE,
        replace(
            RECIPE,
            parallel=replace(RECIPE.parallel, tensor=2),
            train=replace(RECIPE.train, micro_batch_size=rows),
        ),
        Recomputation(RECIPE.recompute, 34, 1),
        RECIPE.loss,
        ParallelDims(tensor=2),
        128,
    )
    for rows in (1, 2, 4)
]
SEARCH = SearchResult(
    fitting=[(LAYOUTS[0], Estimate(30.0, 1.5)), (LAYOUTS[1], Estimate(60.0, 1.4))],
    too_large=[(LAYOUTS[2], Estimate(99.0, 1.3))],
)


def read_data(text: str) -> Any:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert match
    return json.loads(match[1])


def write_plan(path: Path, *argv: str) -> str:
    layout = ["--devices", "4", "--parallel.pipeline", "2"]
    assert main(["plan", *RUN, *layout, "--gpu", "RTX-3090", "--page_file", str(path), *argv]) == 0
    return path.read_text()


def test_the_page_has_the_memory_of_ranks_and_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_plan(tmp_path / "plan.html", "--json")
    shown = json.loads(capsys.readouterr().out)
    worst = shown["worst"]
    assert "pythia-14m: plan" in text and text.count('class="bar-label"') == 2
    assert f"Rank 0 (2 alike)<b>{worst['peak_gib']:.2f} GiB</b>" in text
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", text.partition('id="timeline"')[0])]
    assert sum(widths) == pytest.approx(
        sum(100 * rank["peak_gib"] / (1.02 * 23.7) for rank in shown["ranks"]), rel=0.02
    )
    timeline = read_data(text)["timeline"]
    sums = [sum(part["values"][i] for part in timeline["parts"]) for i in range(len(timeline["events"]))]
    allocated = worst["peak_gib"] - worst["parts"]["allowance"]
    assert max(sums) == pytest.approx(allocated, abs=1e-5) and sums.index(max(sums)) < len(sums) - 1
    assert {part["kind"] for part in timeline["parts"]} <= set(KINDS)
    assert timeline["events"] == sorted(set(timeline["events"])) and timeline["events"][-1] < timeline["last"]
    assert timeline["phases"][0][0] == "forward backward 1"
    assert "Matrix products" in text and f"{shown['step']['mfu']:.1%}" in text


def test_layouts_are_compared_and_what_a_recipe_says_is_text(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    write_plan_page(path, RECIPE, "<script>alert(1)</script>", None, Plan(gpu="A100-80GB"), SEARCH)
    text = path.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;: plan" in text
    assert "<b>bold" not in text and "out_dir: out/&lt;b&gt;bold&lt;/b&gt;" in text
    data = read_data(text)
    assert data["timeline"] is None and data["available"] == 79.2
    assert [(row["memory"], row["fits"]) for row in data["layouts"]] == [(30, True), (60, True), (99, False)]
    assert re.findall(r"<td>(yes|no)</td>", text) == ["yes", "yes", "no"]
    assert "tensor 2, data_shard 1, recompute none, micro-batch 4" in text


def test_a_page_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["plan", *RUN, "--page_file", str(tmp_path / "file" / "x.html")]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "page_file: " in captured.err and "cannot be written" in captured.err


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.html")
    write_plan_page(tmp_path / "search.html", RECIPE, "tiny", None, Plan(gpu="A100-80GB"), SEARCH)
    point = "new PointerEvent('pointermove', {clientX: 200, clientY: 400})"
    with start_chromium(tmp_path / "profile") as browser:
        for width in (1200, 390):
            browser.set_size(width, 900, is_dark=width == 390)
            browser.open(f"file://{tmp_path}/plan.html")
            areas = browser.evaluate("document.querySelectorAll('#timeline path.area').length")
            assert areas == len(read_data((tmp_path / "plan.html").read_text())["timeline"]["parts"])
            browser.evaluate(f"document.querySelector('#timeline .image').dispatchEvent({point})")
            readout = browser.evaluate("document.querySelector('#timeline .readout').textContent")
            assert readout.startswith("forward backward 1: ") and "Parameters" in readout
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            browser.open(f"file://{tmp_path}/search.html")
            marked = "[...document.querySelectorAll('#layouts circle')].map((e) => e.getAttribute('class'))"
            assert browser.evaluate(marked) == ["first", "first", "fifth"]
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"] == []
