"""The report page: complete, self-contained, and plain about what is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from litgpt.commands.report import run
from litgpt.errors import UserError
from litgpt.recipe.report import Report
from litgpt.train.history import History
from litgpt.train.report import write_report


@pytest.fixture
def out_dir(tmp_path: Path) -> Path:
    """A run of 300 steps with two validations, a skipped step and a spike."""
    history = History(tmp_path / "run" / "logs" / "csv" / "version_0" / "metrics.csv")
    for step in range(1, 301):
        loss = 50.0 if step == 200 else 4.0 + 0.01 * (step % 7)
        row = {
            "step": step,
            "loss": loss,
            "learning_rate": 1e-3,
            "device/items_per_sec": 900.0,
            "total_tokens": step * 10,
        }
        history.append(row | {"grad_norm": 1.0, "skipped_steps": int(step >= 50), "time": step * 2.0})
        if step % 100 == 0:
            history.append({"step": step, "val_loss": 5.0 - step / 1000, "val_ppl": 100.0})
    return tmp_path / "run"


class Page(HTMLParser):
    """The tags and the visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_its_figures_curves_and_events(out_dir: Path) -> None:
    page = Page(write_report(out_dir).read_text())
    for words in ("Loss", "Learning rate", "Tokens per second", "Gradient norm", "3,000", "0:10:00", "4.7000", "900"):
        assert words in page.text
    assert [tag for tag, _ in page.tags].count("svg") == 4
    assert re.search(r"50\s*1 skipped since the previous row", page.text)
    assert "step 200: loss 50.0000 is a spike" in page.text


def test_the_page_asks_nothing_of_any_network(out_dir: Path) -> None:
    text = write_report(out_dir).read_text()
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import|@font-face|<!DOCTYPE svg|<\?xml", text)


def test_every_chart_is_sound_and_takes_the_colour_of_the_page(out_dir: Path) -> None:
    charts = re.findall(r"<svg.*?</svg>", write_report(out_dir).read_text(), flags=re.DOTALL)
    for chart in charts:
        ElementTree.fromstring(chart)
        assert "currentColor" in chart
        assert "#000000" not in chart and "#010203" not in chart


def test_text_of_the_run_cannot_become_markup(out_dir: Path) -> None:
    attack = "<script>alert(1)</script>"
    (out_dir / "recipe.yaml").write_text(f"model_name: {attack!r}\n")
    (out_dir / "samples.jsonl").write_text(json.dumps({"step": 5, "prompt": attack, "text": attack * 2}) + "\n")
    page = Page(write_report(out_dir).read_text())
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text.count(attack) == 3


def test_the_newest_version_is_shown(out_dir: Path) -> None:
    History(out_dir / "logs" / "csv" / "version_10" / "metrics.csv").append({"step": 7, "loss": 1.2345})
    assert "1.2345" in write_report(out_dir).read_text()


def test_a_run_that_only_just_began_has_a_page(tmp_path: Path) -> None:
    History(tmp_path / "logs" / "csv" / "version_0" / "metrics.csv").append({"step": 1, "loss": float("nan")})
    assert "Steps" in write_report(tmp_path).read_text()


def test_the_spike_rule_is_the_recipes(out_dir: Path) -> None:
    (out_dir / "recipe.yaml").write_text("guard:\n  spike_sigma: 1000000\n")
    assert "is a spike" not in write_report(out_dir).read_text()


def test_the_command_says_where_the_page_lies(
    out_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "elsewhere" / "page.html"
    run(Report(out_dir, page))
    assert capsys.readouterr().out == f"Report: {page}\n"
    assert page.read_text().startswith("<!doctype html>")


def test_the_same_run_gives_the_same_page(out_dir: Path) -> None:
    first = write_report(out_dir).read_bytes()
    assert write_report(out_dir).read_bytes() == first


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("samples.jsonl", '{"step": 1}\n', "samples.jsonl: line 1"),
        ("samples.jsonl", "3\n", "samples.jsonl: line 1"),
        ("samples.jsonl", '{"step": 1, "prompt": 2, "text": 3}\n', "samples.jsonl: line 1"),
        ("recipe.yaml", "guard: {no_such: 1}\n", "recipe.yaml"),
        ("recipe.yaml", "a: [\n", "recipe.yaml"),
        ("recipe.yaml", "- 1\n", "recipe.yaml"),
        ("logs/csv/version_0/metrics.csv", "step,loss\n", "no step was logged"),
        ("logs/csv/version_0/metrics.csv", "\0\n", "line 1"),
        ("logs/csv/version_0/metrics.csv", "step,loss\n1,x\n", "line 2"),
    ],
)
def test_a_file_that_is_not_right_is_named(out_dir: Path, file: str, text: str, says: str) -> None:
    (out_dir / file).write_text(text)
    with pytest.raises(UserError, match=says):
        write_report(out_dir)


@pytest.mark.parametrize("folder", ["", "missing"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(UserError, match="give "):
        write_report(tmp_path / folder)
    assert list(tmp_path.iterdir()) == []
