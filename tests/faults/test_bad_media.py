"""A thousand bad images and rows: all counted by their reason, no traceback, nothing run, memory bounded."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.bad_media import DURING_TRAINING, MARKER, write_bad_rows
from tests.vision_model import write_color_rows, write_vision_model

ROOT = Path(__file__).parents[2]
MEMORY = 150
"""Growth of the peak memory in MB: three rows have texts of 8 MB, which are copied; the bombs would take gigabytes."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_a_thousand_bad_images_and_rows(tmp_path: Path) -> None:
    expected = write_bad_rows(tmp_path / "bad", copies=3)
    (tmp_path / "good").mkdir()
    rows = [write_color_rows(tmp_path / "good"), tmp_path / "bad" / "rows.jsonl"]
    model = write_vision_model(tmp_path / "model", "qwen2_vl")
    good, later = expected.pop(""), expected.pop(DURING_TRAINING)
    assert expected.total() + later == 1000 and (good + later) % 8 == 0

    line = [sys.executable, "-m", "tests.faults.bad_media_worker", str(model), *map(str, rows)]
    run = subprocess.run(
        line, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=200
    )
    text = run.stdout + run.stderr
    assert run.returncode == 0 and "Traceback" not in text and "Warning" not in text, text[-4000:]
    ends = re.findall(r"ended with (\d); peak: (\d+) MB", run.stdout)
    assert [code for code, _ in ends] == ["0", "0"], text[-4000:]

    reasons = [f"{count} {reason}" for reason, count in expected.items()]
    (report,) = (line for line in run.stderr.splitlines() if "rows left out" in line and "bad/rows.jsonl" in line)
    assert f"{expected.total()} of {1000 + good:,} rows left out" in report
    assert sorted(report.split("left out: ")[1].split(", ")) == sorted(reasons)
    assert f"data: {later} samples were not trained, because an image of each could not be read" in run.stderr
    assert run.stderr.count("its sample is not trained") == 10  # the first are named
    (steps,) = (tmp_path / "out1").rglob("metrics.csv")
    with steps.open() as file:
        assert len([row for row in csv.DictReader(file) if row["loss"]]) == (good + later) // 8

    assert not list(tmp_path.rglob(MARKER)) and not list(ROOT.glob(MARKER))
    before, after = (int(peak) for _, peak in ends)
    assert after - before < MEMORY, f"{before} MB with good rows, {after} MB with bad ones"
