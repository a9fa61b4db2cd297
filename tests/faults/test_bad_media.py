"""A thousand bad images, and a thousand bad videos and sounds: all counted by their reason, no traceback, nothing run,
memory bounded."""

import csv
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.audio_model import write_audio_model, write_sound_rows
from tests.faults.bad_media import DURING_TRAINING, IMAGES, MARKER, write_bad_rows
from tests.faults.bad_sounds import SOUNDS
from tests.faults.bad_videos import VIDEOS
from tests.vision_model import write_color_rows, write_vision_model

ROOT = Path(__file__).parents[2]
MEMORY = 150
"""Growth of the peak memory in MB: three rows have texts of 8 MB, which are copied; the bombs would take gigabytes."""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")]


def finetune(folder: Path, runs: Sequence[tuple[str, str, str]]) -> tuple[str, list[int]]:
    """Finetune in one process; what it has printed, and its peak memory after each run in MB.

    Args:
        runs: the tower that is trained, and the folders of the model and of the rows.
    """
    line = [sys.executable, "-m", "tests.faults.bad_media_worker"]
    for tower, model, rows in runs:
        line += [tower, str(folder / model), str(folder / rows / "rows.jsonl")]
    settings = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    run = subprocess.run(line, capture_output=True, text=True, timeout=200, **settings)  # type: ignore[call-overload]
    text = run.stdout + run.stderr
    assert run.returncode == 0 and "Traceback" not in text and "Warning" not in text, text[-4000:]
    ends = re.findall(r"ended with (\d); peak: (\d+) MB", run.stdout)
    assert [code for code, _ in ends] == ["0"] * len(runs), text[-4000:]
    assert not list(folder.rglob(MARKER)) and not list(ROOT.glob(MARKER))
    return run.stderr, [int(peak) for _, peak in ends]


def check_counts(said: str, folder: Path, rows: str, expected: Counter[str]) -> None:
    """Check that each reason is counted as often as it should be, and that all other rows are trained."""
    expected = Counter(expected)
    good, later = expected.pop(""), expected.pop(DURING_TRAINING)
    reasons = [f"{count} {reason}" for reason, count in expected.items()]
    (report,) = (line for line in said.splitlines() if "rows left out" in line and f"{rows}/rows.jsonl" in line)
    assert f"{expected.total()} of {expected.total() + good + later:,} rows left out" in report
    assert sorted(report.split("left out: ")[1].split(", ")) == sorted(reasons)
    cause = "because an image, video or sound of each could not be read"
    assert f"data: {later} samples were not trained, {cause}" in said
    (steps,) = (folder / f"out-{rows}").rglob("metrics.csv")
    with steps.open() as file:
        assert len([row for row in csv.DictReader(file) if row["loss"]]) == (good + later) // 8


def test_a_thousand_bad_images_and_rows(tmp_path: Path) -> None:
    expected = write_bad_rows(tmp_path / "bad", IMAGES, copies=3)
    assert expected.total() - expected[""] == 1000 and (expected[""] + expected[DURING_TRAINING]) % 8 == 0
    (tmp_path / "good").mkdir()
    write_color_rows(tmp_path / "good")
    write_vision_model(tmp_path / "model", "qwen2_vl")
    said, (before, after) = finetune(tmp_path, [("vision", "model", "good"), ("vision", "model", "bad")])
    check_counts(said, tmp_path, "bad", expected)
    assert said.count("its sample is not trained") == 10  # the first are named
    assert after - before < MEMORY, f"{before} MB with good rows, {after} MB with bad ones"


def test_a_thousand_bad_videos_and_sounds(tmp_path: Path) -> None:
    videos = write_bad_rows(tmp_path / "videos", VIDEOS, copies=2, share=2)
    sounds = write_bad_rows(tmp_path / "sounds", SOUNDS, copies=2, share=2)
    assert videos.total() - videos[""] + sounds.total() - sounds[""] == 1000
    assert (videos[""] + videos[DURING_TRAINING]) % 8 == (sounds[""] + sounds[DURING_TRAINING]) % 8 == 0
    for name, write in (("images", write_color_rows), ("tones", write_sound_rows)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    write_vision_model(tmp_path / "seeing", "qwen2_vl")
    write_audio_model(tmp_path / "hearing")
    runs = [("vision", "seeing", "images"), ("audio", "hearing", "tones")]
    said, peaks = finetune(tmp_path, [*runs, ("vision", "seeing", "videos"), ("audio", "hearing", "sounds")])
    check_counts(said, tmp_path, "videos", videos)
    check_counts(said, tmp_path, "sounds", sounds)
    assert said.count("its sample is not trained") == 20
    assert peaks[3] - peaks[1] < MEMORY, f"peaks in MB: {peaks}"
