"""The report page: complete, self-contained, and plain about what is missing."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from litgpt.cli import main
from litgpt.commands.report import run
from litgpt.errors import UserError
from litgpt.recipe.report import Report
from litgpt.train.comparison import compare_recipes, write_comparison
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


def write_record(out_dir: Path, **changes: Any) -> None:
    """The record of a finetuning run that was interrupted at step 120 and resumed."""
    start = {
        "date": "2026-03-01T10:00:00+00:00",
        "step": 0,
        "host": "rack-7",
        "system": "Linux x86_64",
        "processes": 2,
        "layout": {"data_shard": 2, "tensor": 1},
        "device": "cpu",
        "precision": "bf16-mixed",
        "versions": {"litgpt": "0.1.0", "torch": "2.14.1", "Python": "3.11.7"},
        "end": {"date": "2026-03-01T11:00:00+00:00", "step": 120, "reason": "SIGINT received"},
    }
    record = {
        "task": "finetune",
        "model": {"name": "toy-llama", "parameters": 1_000_000, "trained_parameters": 25_000},
        "tuner": "LoRA",
        "weights": "checkpoints/toy",
        "data": {
            "source": "Conversations",
            "settings": {"sources": ["chats.jsonl"]},
            "samples": 900,
            "tokens": 12_345,
            "validation_samples": 100,
            "sequence_length": 64,
        },
        "steps": 300,
        "changes": {"seed": 7},
        "starts": [start, start | {"date": "2026-03-02T10:00:00+00:00", "step": 120, "end": None}],
    }
    (out_dir / "run.json").write_text(json.dumps(record | changes))


def read_data(text: str) -> Any:
    """The numbers that the page's script draws."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert match
    return json.loads(match[1])


def test_the_page_has_its_figures_curves_and_events(out_dir: Path) -> None:
    text = write_report(out_dir).read_text()
    page = Page(text)
    for words in ("Loss", "Learning rate", "Tokens per second", "Gradient norm", "3,000", "0:10:00", "4.7000", "900"):
        assert words in page.text
    assert re.search(r"50\s*1 skipped since the previous row", page.text)
    assert "step 200: loss 50.0000 is a spike" in page.text
    data = read_data(text)
    assert [[curve["name"] for curve in chart["curves"]] for chart in data["charts"]] == [
        ["loss", "val_loss"],
        ["learning_rate"],
        ["device/items_per_sec"],
        ["grad_norm"],
    ]
    assert data["rows"]["training"]["loss"][199] == 50.0
    validation = data["rows"]["validation"]
    assert validation == {
        "step": [100, 200, 300],
        "tokens": [1000, 2000, 3000],
        "time": [200, 400, 600],
        "val_loss": [4.9, 4.8, 4.7],
    }


def test_the_page_has_the_facts_of_the_record(out_dir: Path) -> None:
    write_record(out_dir)
    (out_dir / "recipe.yaml").write_text("seed: 7\nguard: {}\n")
    text = write_report(out_dir).read_text()
    page = Page(text)
    for words in (
        "toy-llama",
        "2026-03-01 10:00",
        "no end was recorded",
        "1,000,000, 25,000 trained (2.50%)",
        "Conversations, sources: ['chats.jsonl']",
        "900 an epoch, 12,345 tokens in all, at most 64 tokens each; 100 for validation",
        "checkpoints/toy",
        "rack-7, Linux x86_64, 2 x cpu",
        "data_shard 2",
        "torch 2.14.1",
        "ended: SIGINT received",
    ):
        assert words in page.text
    assert "tensor 1" not in page.text
    assert page.text.index("What differs") < page.text.index("guard: {}")  # the changes come before the whole recipe
    assert read_data(text)["marks"] == [{"step": 120, "tokens": 1200, "time": 240, "text": "resumed"}]


def test_the_answer_of_a_sample_comes_before_a_long_prompt(out_dir: Path) -> None:
    prompt = "a long system prompt " * 10
    rows = [{"step": step, "prompt": prompt, "text": f"{prompt}answer {step}"} for step in (5, 9)]
    (out_dir / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Page(write_report(out_dir).read_text()).text
    assert text.index("answer 9") < text.index(prompt.strip()) < text.index("answer 5")


def test_a_long_run_has_few_points_and_missing_values_are_null(tmp_path: Path) -> None:
    history = tmp_path / "logs" / "csv" / "version_0" / "metrics.csv"
    history.parent.mkdir(parents=True)
    history.write_text("step,loss\n" + "".join(f"{step},{step if step > 9 else 'nan'}\n" for step in range(1, 4001)))
    training = read_data(write_report(tmp_path).read_text())["rows"]["training"]
    assert len(training["step"]) == len(training["loss"]) == 1334
    assert training["loss"][:4] == [None, None, None, 11] and training["tokens"][0] is None


def test_the_page_asks_nothing_of_any_network(out_dir: Path) -> None:
    text = write_report(out_dir).read_text()
    for tag, attributes in Page(text).tags:
        assert tag not in ("link", "img", "iframe", "object")
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import|@font-face|https?:|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'" in text  # so that a browser refuses any request


@pytest.mark.skipif(shutil.which("node") is None, reason="node, which checks the script's syntax, is not installed")
def test_the_script_of_the_page_is_valid(out_dir: Path, tmp_path: Path) -> None:
    script = re.findall(r"<script>(.*?)</script>", write_report(out_dir).read_text(), flags=re.DOTALL)[-1]
    (tmp_path / "page.js").write_text(script)
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True)


def test_text_of_the_run_cannot_become_markup(out_dir: Path) -> None:
    attack = "<script>alert(1)</script>"
    (out_dir / "recipe.yaml").write_text(f"model_name: {attack!r}\n")
    (out_dir / "samples.jsonl").write_text(json.dumps({"step": 5, "prompt": attack, "text": attack * 2}) + "\n")
    (out_dir / "data_report.json").write_text(json.dumps({attack: {"rows": 2, "first": [attack]}}))
    (out_dir / "profile").mkdir()
    (out_dir / "profile" / "summary.md").write_text(attack)
    page = Page(write_report(out_dir).read_text())
    assert [tag for tag, _ in page.tags].count("script") == 2  # the page's own: numbers and code
    assert page.text.count(attack) == 6


def test_the_page_has_the_report_on_the_data(out_dir: Path) -> None:
    rows = {"rows": 5000, "reasons": {"no answer": 1200}, "first": ["chats.jsonl:4: no answer"], "unread": {"id": 5000}}
    padding = {"places": 2000, "padding": 300, "group_by_length": True}
    (out_dir / "data_report.json").write_text(json.dumps({"chats.jsonl": rows, "padding": padding}))
    text = Page(write_report(out_dir).read_text()).text
    for words in (
        "1,200 of 5,000 rows left out: 1,200 no answer",
        "not read: id (5,000 rows)",
        "chats.jsonl:4: no answer",
        "15.0% of 2,000 tokens",
    ):
        assert words in text


def test_the_newest_version_is_shown(out_dir: Path) -> None:
    History(out_dir / "logs" / "csv" / "version_10" / "metrics.csv").append({"step": 7, "loss": 1.2345})
    assert "1.2345" in write_report(out_dir).read_text()


def test_a_run_that_only_just_began_has_a_page(tmp_path: Path) -> None:
    History(tmp_path / "logs" / "csv" / "version_0" / "metrics.csv").append({"step": 1, "loss": float("nan")})
    assert "Steps" in write_report(tmp_path).read_text()


def test_the_best_checkpoint_is_marked(out_dir: Path) -> None:
    write_record(out_dir)
    (out_dir / "recipe.yaml").write_text("checkpoint:\n  best: {metric: val_loss, mode: max}\n")
    text = write_report(out_dir).read_text()
    assert "the best checkpoint: val_loss 4.9000 at step 100" in text and "step 100</dd>" in text
    mark = {"step": 100, "tokens": 1000, "time": 200, "text": "the best checkpoint"}
    assert read_data(text)["marks"][1:] == [mark]
    (out_dir / "recipe.yaml").write_text("checkpoint:\n  best:\n")
    assert "best checkpoint" not in write_report(out_dir).read_text()
    (out_dir / "recipe.yaml").write_text("checkpoint:\n  best: 3\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: cannot be read"):
        write_report(out_dir)


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
        ("run.json", '{"task": "pretrain"}', "run.json"),
        ("data_report.json", '{"rows.jsonl": {"rows": "many"}}', "data_report.json: is not a report on data"),
        ("data_report.json", '{"padding": {"places": 0}}', "data_report.json: is not a report on data"),
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


def test_several_runs_are_compared_on_one_page(
    out_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(out_dir, other)
    (out_dir / "recipe.yaml").write_text(
        "seed: 7\noptimizer: {class_path: AdamW, init_args: {lr: 0.1}}\ntrain: {a: 1}\n"
    )
    (other / "recipe.yaml").write_text("seed: 7\noptimizer: {class_path: AdamW, init_args: {lr: 0.2}}\ntrain: {a: 2}\n")
    assert main(["report", str(out_dir), str(other), str(out_dir)]) == 0
    page = out_dir / "comparison.html"
    assert capsys.readouterr().out == f"Comparison: {page}\n"
    text = page.read_text()
    assert re.search(r"optimizer\.lr\s*0\.1\s*0\.2\s*0\.1\s*train\.a\s*1\s*2\s*1", Page(text).text)
    assert "seed" not in Page(text).text.split("Settings that differ")[1]
    data = read_data(text)
    assert [chart["title"] for chart in data["charts"]][:2] == ["Loss, training", "Loss, validation"]
    assert [curve["rows"] for curve in data["charts"][1]["curves"]] == [f"validation/{number}" for number in range(3)]
    assert data["rows"]["validation/1"]["val_loss"] == [4.9, 4.8, 4.7]


def test_a_setting_of_another_class_has_no_value() -> None:
    first = {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 1}}}
    muon = {"optimizer": {"class_path": "Muon", "init_args": {"lr": 2}}}
    third = {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 3}}}
    assert compare_recipes([first, muon, third]) == [
        ("optimizer", ["AdamW", "Muon", "AdamW"]),
        ("optimizer.lr", ["1", "", "3"]),
    ]


def test_more_runs_than_colors_are_refused(out_dir: Path) -> None:
    with pytest.raises(UserError, match="others: 8 are too many"):
        write_comparison([out_dir] * 9)
