"""A board in this process, and runs whose files it shows."""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from litgpt.board.app import BoardServer, BoardSettings, build_board
from litgpt.board.run_processes import PROGRAM, RunProcesses
from litgpt.infer.server.listener import open_socket

KEY = "secret"


@contextlib.contextmanager
def run_board(folder: Path, program: Sequence[str] = PROGRAM) -> Iterator[httpx.Client]:
    """A client with the key of a board, which is stopped at the end.

    Args:
        program: starts litgpt.
    """
    app = build_board(BoardServer(folder, BoardSettings("127.0.0.1", KEY), RunProcesses(program)))
    listener = open_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    listener.listen()
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def write_metrics(folder: Path, steps: int, *, version: int = 0) -> Path:
    """Write the metrics of a run with a validation at every tenth step, and return the file."""
    path = folder / "logs" / "csv" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    lines = ["step,loss,learning_rate,total_tokens,time,val_loss"]
    for step in range(1, steps + 1):
        lines.append(f"{step},{2 + 1 / step:.5f},0.001,{step * 8},{step / 2},")
        if step % 10 == 0:
            lines.append(f"{step},,,,,{3 + 1 / step:.5f}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_run(folder: Path, steps: int = 30, **record: Any) -> None:
    """Write all files of a run that has ended."""
    write_metrics(folder, steps)
    start = {
        "date": "2026-03-01T10:00:00+00:00", "step": 0, "host": "rack-7", "system": "Linux x86_64", "processes": 1,
        "layout": {}, "device": "cpu", "precision": "32-true", "versions": {"litgpt": "0.1.0"},
        "end": {"date": "2026-03-01T11:00:00+00:00", "step": steps, "reason": f"train.max_steps: all {steps} are done"},
    }  # fmt: skip
    about = {
        "task": "pretrain", "model": {"name": "toy", "parameters": 1000, "trained_parameters": 1000}, "tuner": None,
        "weights": None, "loss": None, "steps": steps, "changes": {"seed": 7}, "starts": [start],
        "data": {"source": "TextFiles", "settings": {}, "samples": 9, "tokens": 99, "validation_samples": 3,
                 "sequence_length": 8},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about | record))
    (folder / "recipe.yaml").write_text("seed: 7\ntrain: {max_steps: 30}\n")
    (folder / "samples.jsonl").write_text(json.dumps({"step": 10, "prompt": "once", "text": "once <b>more</b>"}) + "\n")
    rows = {
        "rows": 9,
        "reasons": {"no answer": 1},
        "first": ["chats.jsonl:4: no answer"],
        "overlong": 2,
        "untrained": 0,
    }
    padding = {"places": 200, "padding": 50, "group_by_length": False}
    (folder / "data_report.json").write_text(json.dumps({"chats.jsonl": rows, "padding": padding}))
    (folder / "expert_load.json").write_text('{"0": [1.5, 0.5]}')
    (folder / "profile").mkdir()
    (folder / "profile" / "summary.md").write_text("# Profile of steps 2 to 3\n")
    for name in (f"step-{steps:08}", "final"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(bytes(2048))
