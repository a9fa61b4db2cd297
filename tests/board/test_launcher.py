"""Runs that are started, stopped and resumed over HTTP, by a program in place of litgpt; the form and its errors."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from litgpt.board.form import RUN_COMMANDS, describe_form, fill_form, find_wrong_key, list_form_fields, read_form
from litgpt.errors import UserError
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.keys import list_keys
from litgpt.train.run_process import find_machine, identify_process
from tests.board.board_server import KEY, run_board, write_run

PROGRAM = """import json, os, signal, sys
def stop(number, frame):
    print("stopped", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print(json.dumps(sys.argv[1:]), flush=True)
if sys.argv[1] == "plan":
    sys.exit("litgpt: error: train.max_steps: 0 is not valid; use 1" if "H200" in sys.argv else 0)
while True:
    signal.pause()
"""
TEXTS = {"model_name": "pythia-14m", "data": "PythonDocs", "tokenizer.kind": "bytes", "train.max_steps": "3"}
RECIPE = "model_name: pythia-14m\ndata: PythonDocs\ntokenizer: {kind: bytes}\n"


@pytest.fixture
def board(tmp_path: Path) -> Iterator[httpx.Client]:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "out").mkdir()
    with run_board(tmp_path / "out", ["python3", str(tmp_path / "program.py")]) as client:
        yield client


def wait_for(ready: Callable[[], Any]) -> Any:
    end = time.monotonic() + 10
    while not (value := ready()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def send(board: httpx.Client, path: str, **body: Any) -> httpx.Response:
    return board.post(f"/api/{path}", json=body)


def test_a_run_is_started_stopped_and_resumed(board: httpx.Client, tmp_path: Path) -> None:
    out_dir = tmp_path / "out" / "a" / "b"
    values = TEXTS | {"out_dir": str(out_dir)}
    assert send(board, "start", command="pretrain", values=values).json() == {"run": "a/b"}
    output = wait_for(lambda: board.get("/api/run", params={"run": "a/b"}).json()["output"])
    config = out_dir / ".board" / "recipe.yaml"
    assert json.loads(output) == ["pretrain", "--config", str(config), "--out_dir", str(out_dir)]
    assert "max_steps: '3'" in config.read_text()
    [run] = board.get("/api/runs").json()["runs"]
    assert run["state"] == "running"
    again = send(board, "start", command="pretrain", values=values)
    assert again.status_code == 400 and "is that of a run in progress" in again.json()["error"]["message"]

    with run_board(tmp_path / "out") as later:  # finds the process of the first one
        assert send(later, "stop", run="a/b").status_code == 200
        wait_for(lambda: not later.get("/api/run", params={"run": "a/b"}).json()["is_running"])
        assert later.get("/api/run", params={"run": "a/b"}).json()["output"].endswith("stopped\n")
        assert "has ended, or runs on another machine" in send(later, "stop", run="a/b").json()["error"]["message"]
        assert [run["state"] for run in later.get("/api/runs").json()["runs"]] == ["failed"]  # it wrote no record

    refused = send(board, "resume", run="a/b")
    assert refused.status_code == 400 and "does not name a command" in refused.json()["error"]["message"]
    write_run(out_dir, command="pretrain")
    (out_dir / "recipe.yaml").write_text(RECIPE)
    assert send(board, "resume", run="a/b").status_code == 200
    words = ["pretrain", "--config", str(out_dir / "recipe.yaml"), "--resume", "true", "--out_dir", str(out_dir)]
    wait_for(lambda: json.dumps(words) in (out_dir / ".board" / "output.log").read_text())
    assert send(board, "stop", run="a/b").status_code == 200


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process of the run `out/cli`, which no board has started."""
    process = subprocess.Popen(["python3", str(tmp_path / "program.py"), "train"], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()  # its handler of SIGTERM is set
    yield process
    process.kill()
    process.wait()


def write_started_run(folder: Path, process: Any) -> None:
    """Write a run in progress with the process in its record."""
    write_run(folder, command="pretrain")
    record = json.loads((folder / "run.json").read_text())
    record["starts"][0] |= {"process": process, "end": None}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "recipe.yaml").write_text(RECIPE)


def test_a_run_that_no_board_has_started_is_stopped(
    board: httpx.Client, tmp_path: Path, other_run: subprocess.Popen[bytes]
) -> None:
    pid = other_run.pid
    process = {"machine": find_machine(), "pid": pid, "identity": identify_process(pid)}
    write_started_run(tmp_path / "out" / "cli", process)
    assert board.get("/api/runs").json()["runs"][0]["state"] == "running"
    assert board.get("/api/run", params={"run": "cli"}).json()["is_running"]
    assert "run in progress" in send(board, "resume", run="cli").json()["error"]["message"]
    assert send(board, "stop", run="cli").status_code == 200
    assert other_run.wait(10) == 0  # after SIGTERM, which the program handles
    assert board.get("/api/runs").json()["runs"][0]["state"] == "killed"
    assert send(board, "stop", run="cli").status_code == 400


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"identity": "0" * 64}, "killed"),  # a later process has the number
        ({"identity": ""}, "killed"),
        ({"pid": 2**22 + 1}, "killed"),
        ({"pid": -1}, "killed"),
        ({"pid": "1"}, "killed"),
        ({"machine": "another"}, "running"),
    ],
)
def test_no_process_but_that_of_the_run_gets_a_signal(
    board: httpx.Client, tmp_path: Path, other_run: subprocess.Popen[bytes], changes: dict[str, Any], state: str
) -> None:
    pid = other_run.pid
    process = {"machine": find_machine(), "pid": pid, "identity": identify_process(pid)} | changes
    write_started_run(tmp_path / "out" / "cli", process)
    assert board.get("/api/runs").json()["runs"][0]["state"] == state
    assert "has ended, or runs on another machine" in send(board, "stop", run="cli").json()["error"]["message"]
    if state == "running":  # its files are new
        message = send(board, "resume", run="cli").json()["error"]["message"]
        assert message == "run: cli has written files on rack-7 in the last 60 s; stop it there"
    assert other_run.poll() is None


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"train.max_steps": "x"}, "train.max_steps", "train.max_steps: 'x' is not valid; use an integer from 1"),
        ({"model_name": ""}, "model_name", "model_name: missing"),
        ({"train.max_step": "3"}, "train.max_step", "did you mean train.max_steps?"),
        ({"model_config": "a: ["}, "model_config", "model_config:1: not valid YAML"),
        ({"out_dir": "/tmp"}, "out_dir", "is not in"),
        ({"out_dir": "{out}/../x"}, "out_dir", "is not in"),
        ({"out_dir": "{out}"}, "out_dir", "is not in"),
        ({"out_dir": "{out}/old"}, "out_dir", "holds a run already"),
        ({"resume": "true"}, "resume", "is not a field of this form"),
        (
            {"data": "secret.yaml"},
            "data",
            "is not a class of litgpt",
        ),  # no file is read as settings, and no class imported
        ({"data": "http://127.0.0.1:1/x"}, "data", "not"),
        ({"train": "secret.yaml"}, "train", "is a single value"),
        ({"model_config": "secret.yaml"}, "model_config", "use keys and values"),
        ({"optimizer": "os.path.join"}, "optimizer", "may name others; use AdamW"),
    ],
)
def test_errors_name_their_field(
    board: httpx.Client, tmp_path: Path, changes: dict[str, str], key: str, says: str
) -> None:
    out = tmp_path / "out"
    write_run(out / "old")
    (tmp_path / "secret.yaml").write_text("max_steps: xyzzy\n")
    values = TEXTS | {"out_dir": str(out / "new")} | changes
    values = {
        name: text.replace("{out}", str(out)).replace("secret", f"{tmp_path}/secret") for name, text in values.items()
    }
    for route in ("check", "start"):
        answer = send(board, route, command="pretrain", values=values)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == key and says in error["message"]
        assert "xyzzy" not in answer.text and "\n" not in error["message"]
    assert not (out / "new").exists()


def test_plans_are_those_of_the_command(board: httpx.Client) -> None:
    answer = send(board, "plan", command="pretrain", values=TEXTS, gpu="B200").json()["plan"]
    words = json.loads(answer)
    assert words[:2] == ["plan", "pretrain"] and words[-2:] == ["--gpu", "B200"]
    refused = send(board, "plan", command="pretrain", values=TEXTS, gpu="H200")
    assert refused.json()["error"]["param"] == "train.max_steps" and refused.status_code == 400


def test_no_other_page_and_nobody_without_the_key_starts_a_run(board: httpx.Client, tmp_path: Path) -> None:
    body = {"command": "pretrain", "values": TEXTS | {"out_dir": str(tmp_path / "out" / "a")}}
    host = board.base_url.netloc.decode()
    for headers, status in (
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": f"http://{host}:1"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": ""}, 401),
        ({"Cookie": f"key={KEY}", "Authorization": ""}, 401),
    ):
        assert board.post("/api/start", json=body, headers=headers).status_code == status
    form = board.post("/api/start", content=json.dumps(body), headers={"Content-Type": "text/plain"})
    assert form.status_code == 400  # what a form of another page could send
    assert list((tmp_path / "out").iterdir()) == []


def test_the_form_has_every_key_of_its_command() -> None:
    recipe = COMMANDS["pretrain"].import_recipe()
    shown = {item.key for item in list_form_fields(recipe)}
    missing = {key for key in list_keys(recipe) if key not in shown and not any(k.startswith(f"{key}.") for k in shown)}
    assert missing == {"resume", "add_version"}
    form = describe_form("pretrain")
    assert set(form["first"]) <= shown and form["first"][0] == "model_name"
    optimizer = next(item for item in form["fields"] if item["key"] == "optimizer")
    assert {item["key"] for item in optimizer["classes"]["Muon"]} >= {"optimizer.lr", "optimizer.momentum"}
    assert next(item for item in form["fields"] if item["key"] == "train.max_steps")["default"] == "null"


def test_a_form_is_filled_with_the_settings_of_a_run() -> None:
    changes = {
        "model_name": "toy", "model_config": {"n_layer": 2}, "out_dir": "out", "train": {"max_steps": 3},
        "data": {"class_path": "TextFiles", "init_args": {"train_data_path": "text"}}, "compile": False,
    }  # fmt: skip
    texts = fill_form("pretrain", changes)
    assert texts == {
        "model_name": "toy", "model_config": '{"n_layer": 2}', "out_dir": "out", "train.max_steps": "3",
        "data": "TextFiles", "data.train_data_path": "text", "compile": "false",
    }  # fmt: skip
    assert read_form("pretrain", texts)["model_config"] == {"n_layer": 2}


def test_an_error_of_no_field_has_no_key() -> None:
    assert find_wrong_key(UserError("the disk is full"), {"data": ""}) is None
    assert find_wrong_key(UserError("data.sources is not a key"), {"data": "", "data.sources": ""}) == "data.sources"
    assert set(RUN_COMMANDS) <= set(COMMANDS)
