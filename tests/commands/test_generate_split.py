"""`generate_tp` and `generate_sequentially` write the texts of `generate`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from litgpt.cli import main
from tests.commands.tiny_models import write_tiny_models
from tests.processes import join_ranks, run_litgpt, start_ranks

EXACT = ["--precision", "64-true", "--max_new_tokens", "12", "--temperature", "1.5"]
COMMANDS = ["generate_tp", "generate_sequentially"]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_tiny_models(root, "tiny")
    return root / "tiny"


@pytest.mark.parametrize("command", COMMANDS)
def test_texts_on_two_devices_are_those_of_one(command: str, model: Path, tmp_path: Path, capsys: Captured) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the fox\na cat\n")
    line = [str(model), *EXACT, "--prompts", str(prompts), "--num_samples", "2"]
    assert main(["generate", *line]) == 0
    expected = capsys.readouterr().out
    processes = start_ranks(run_litgpt, command, *line, "--devices", "2", folder=tmp_path, ranks=2)
    assert join_ranks(processes) == [0, 0], (tmp_path / "rank-0.log").read_text()
    first, second = ((tmp_path / f"rank-{rank}.log").read_text() for rank in (0, 1))
    rows = [row for row in first.splitlines() if row.startswith("{")]
    assert rows == expected.splitlines() and len({json.loads(row)["text"] for row in rows}) == 4
    assert second == ""


@pytest.mark.slow
def test_a_command_starts_its_processes(model: Path, tmp_path: Path, capsys: Captured) -> None:
    line = [str(model), *EXACT, "--prompt", "the fox", "--num_samples", "2"]
    assert main(["generate", *line]) == 0
    expected = capsys.readouterr().out
    program = [sys.executable, "-m", "litgpt", "generate_tp", *line, "--devices", "2"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    assert done.stderr.count("Time for inference") == 2


def test_an_error_after_the_start_ends_all_processes(model: Path, tmp_path: Path) -> None:
    line = [str(model), "--devices", "2", "--prompt", "fox " * 500]
    assert join_ranks(start_ranks(run_litgpt, "generate_tp", *line, folder=tmp_path, ranks=2)) == [1, 1]
    for rank in (0, 1):
        *_, last = (tmp_path / f"rank-{rank}.log").read_text().splitlines()
        assert last.startswith("litgpt: error: prompt: ")
    assert "Traceback" not in (tmp_path / "rank-0.log").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_one_device_is_the_default_without_gpus(command: str, model: Path, capsys: Captured) -> None:
    texts = []
    for name in ("generate", command):
        assert main([name, str(model), "--prompt", "the fox", *EXACT]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate_tp --devices 3", "devices: 3 does not divide the model's n_head: 2; set 2"),
        ("generate_sequentially --devices 3", "devices: 3 is more than the model's 2 layers; set 2"),
        (
            "generate_tp --devices 2 --quantize bnb.nf4",
            "quantize: bnb.nf4 is not supported with devices: 2 of generate_tp",
        ),
        ("generate_tp --devices 2 --compile true", "compile: true is not supported with devices: 2; set false"),
        (f"generate_tp --devices 2 --image {__file__}", f"image: {__file__} is not supported with devices: 2; use"),
        ("generate_sequentially --devices 0", "devices: 0 is not valid; use auto or a number from 1"),
    ],
)
def test_what_cannot_be_split_is_refused_before_processes_start(
    line: str, message: str, model: Path, capsys: Captured
) -> None:
    command, *flags = line.split()
    assert main([command, str(model), *flags]) in (1, 2)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"litgpt: error: {message}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("generate_tp", ["--precision", "bf16-mixed"]),
        ("generate_sequentially", ["--precision", "bf16-mixed"]),
        ("generate_sequentially", ["--quantize", "bnb.nf4"]),
    ],
)
def test_other_precisions(command: str, flags: list[str], model: Path, tmp_path: Path, capsys: Captured) -> None:
    line = [str(model), "--prompt", "the fox", "--temperature", "0", "--max_new_tokens", "8", *flags]
    assert main(["generate", *line]) == 0
    expected = capsys.readouterr().out.rstrip()
    processes = start_ranks(run_litgpt, command, *line, "--devices", "2", folder=tmp_path, ranks=2)
    assert join_ranks(processes) == [0, 0] and expected in (tmp_path / "rank-0.log").read_text()
