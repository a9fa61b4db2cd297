"""The board over HTTP: what it shows of runs, and to whom."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.board.board_server import KEY, run_board, write_metrics, write_run

POSTS = ("/api/check", "/api/start", "/api/stop", "/api/resume", "/api/plan")
ROUTES = (
    *POSTS,
    "/api/form",
    "/api/runs",
    "/api/run",
    "/api/comparison",
    "/",
    "/page/board.js",
    "/api",
    "/api/%2e%2e",
    "/api/run/%00",
)
VALUES = ("%00", "%ff", "..%2f..", "%", "b", "")
FIELDS = ("run", "stamp", "command", "values", "name", "gpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a secret beside it, and runs in it."""
    parent = tmp_path_factory.mktemp("board")
    (parent / "secret.json").write_text('{"secret": "xyzzy"}')
    write_run(parent / "out" / "pretrain" / "a")
    write_run(parent / "out" / "b", steps=50)
    (parent / "out" / "b" / "recipe.yaml").write_text("seed: 8\ntrain: {max_steps: 50}\n")
    write_metrics(parent / "out" / "group" / "version_3", 5)
    return parent / "out"


@pytest.fixture(scope="module")
def board(folder: Path) -> Iterator[httpx.Client]:
    with run_board(folder) as client:
        yield client


def test_runs_are_listed_with_their_last_figures(board: httpx.Client) -> None:
    runs = {run["name"]: run for run in board.get("/api/runs").json()["runs"]}
    assert set(runs) == {"pretrain/a", "b", "group/version_3"}
    run = runs["b"]
    assert (run["task"], run["model"], run["steps"], run["state"]) == ("pretrain", "toy", 50, "finished")
    assert run["last"]["loss"] == 2.02 and run["last"]["val_loss"] == 3.02 and len(run["curve"]) > 20


def test_the_page_of_a_run_has_what_its_report_has(board: httpx.Client) -> None:
    run = board.get("/api/run", params={"run": "pretrain/a"}).json()
    assert run["title"] == "toy" and ["Steps", "30"] in run["tiles"] and run["problems"] == []
    sample = {"step": 10, "prompt": "once", "text": " <b>more</b>", "images": [], "seen": []}
    assert run["samples"] == [sample | {"question": None, "target": ""}]
    assert run["page"]["rows"]["validation"]["val_loss"] == [3.1, 3.05, 3.03333]
    lines = ["1 of 9 rows left out: 1 no answer; 2 samples longer than the model reads", "chats.jsonl:4: no answer"]
    assert run["load"] == [[0, [[1.5, 0.75], [0.5, 0.25]]]] and run["profile"] == "# Profile of steps 2 to 3\n"
    assert run["data"] == [["chats.jsonl", lines], ["padding", ["25.0% of 200 tokens"]]]
    assert run["checkpoints"] == [
        {"name": "step-00000030", "bytes": 2048, "files": 1},
        {"name": "final", "bytes": 2048, "files": 1},
    ]
    again = board.get("/api/run", params={"run": "pretrain/a", "stamp": run["stamp"]})
    assert again.status_code == 204 and again.content == b""


def test_runs_are_compared(board: httpx.Client) -> None:
    comparison = board.get("/api/comparison", params={"run": ["b", "pretrain/a"]}).json()
    assert comparison["differences"] == [["seed", ["8", "7"]], ["train.max_steps", ["50", "30"]]]
    assert ["Steps", ["50", "30"]] in comparison["tiles"]
    for names in (["b"], ["b"] * 9):
        answer = board.get("/api/comparison", params={"run": names})
        assert answer.status_code == 400 and "choose from 2 to 8 runs" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "file", ["run.json", "recipe.yaml", "samples.jsonl", "data_report.json", "logs/csv/version_0/metrics.csv"]
)
def test_files_that_are_half_written_or_not_valid_hide_no_other(board: httpx.Client, folder: Path, file: str) -> None:
    run = folder / "half"
    shutil.rmtree(run, ignore_errors=True)
    write_run(run)
    (run / "samples.jsonl").open("a").write('{"step": 20, "prom')
    with (run / "logs/csv/version_0/metrics.csv").open("a") as metrics:
        metrics.write("31,1.")
    (run / "step-00000031.partial").mkdir()
    shown = board.get("/api/run", params={"run": "half"}).json()
    assert shown["problems"] == [] and len(shown["samples"]) == 1 and ["Steps", "30"] in shown["tiles"]
    whole = (run / file).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\xff\xfe\0", b"[", b"a: [\n"):
        (run / file).write_bytes(damaged)
        answer = board.get("/api/run", params={"run": "half"})
        assert answer.status_code == 200 and len(answer.json()["page"]["charts"]) >= (file[:4] != "logs")
        assert board.get("/api/runs").status_code == 200
    shutil.rmtree(run)


@pytest.mark.parametrize(
    "file",
    ["run.json", "recipe.yaml", "samples.jsonl", "data_report.json", "logs/csv", "logs/csv/version_0/metrics.csv"],
)
def test_no_link_leads_out_of_the_folder(tmp_path: Path, file: str) -> None:
    write_run(tmp_path / "secret")
    write_run(tmp_path / "out" / "a")
    path = tmp_path / "out" / "a" / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(tmp_path / "secret" / file)
    (tmp_path / "out" / "link").symlink_to(tmp_path / "secret")
    with run_board(tmp_path / "out") as board:
        answer = board.get("/api/run", params={"run": "a"})
        assert answer.status_code == 400 and "leads out of" in answer.json()["error"]["message"]
        [run] = board.get("/api/runs").json()["runs"]  # and not the link to a folder
        assert "leads out of" in run["problem"] and run["last"] == {}


@pytest.mark.parametrize(
    "name",
    ["..", "../out/b", "b/..", "/etc", "b/logs", "b\0", "b/", "./b", "", "%2e%2e", "..\\b", "C:\\", "~", "\ud800"],
)
def test_only_names_of_the_list_are_runs(board: httpx.Client, name: str) -> None:
    encoded = name.encode("utf-8", "surrogatepass")
    answer = board.get("/api/run", params={"run": encoded})
    assert answer.status_code == 404 and "is not a run" in answer.json()["error"]["message"]


def test_no_path_leads_to_other_files(board: httpx.Client, folder: Path) -> None:
    paths = ["/page/../../secret.json", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/..%2fapp.py", "/secret.json"]
    for path in [
        *paths,
        "/../secret.json",
        "/api/../../secret.json",
        "/page/",
        "/page/report.py",
        f"/{folder}/b/run.json",
    ]:
        request = board.build_request("GET", "/")
        request.url = request.url.copy_with(raw_path=path.encode())
        answer = board.send(request)
        assert answer.status_code == 404 and "xyzzy" not in answer.text


def test_the_key_is_needed_for_all_but_the_page(board: httpx.Client) -> None:
    for key in ("?", "wrong", f"{KEY}x", KEY[:-1], "é"):
        for header in ({"Authorization": f"Bearer {key}".encode()}, {"Authorization": key.encode()}):
            for path in ("/api/runs", "/api/run?run=b", "/api/comparison?run=b&run=b", "/other"):
                assert board.get(path, headers=header).status_code == 401
    for path in ("/", "/page/board.js", "/page/charts.js", "/page/report.css", "/page/icon.svg"):
        answer = httpx.get(f"{board.base_url}{path}")
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://{host}"}, 200),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "LOCALHOST"}, 200),
        ({"Host": "[::1]:{port}"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example", "Host": "evil.example"}, 403),  # a name that was pointed to this machine
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:{port}"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_no_page_of_another_origin_is_answered(board: httpx.Client, headers: dict[str, str], status: int) -> None:
    host = board.base_url.netloc.decode()
    filled = {name: value.format(host=host, port=board.base_url.port) for name, value in headers.items()}
    answer = board.get("/api/runs", headers=filled)
    assert answer.status_code == status
    assert not any(name.startswith("access-control") for name in answer.headers)


def draw_value(draw: random.Random) -> Any:
    """A value that hardly any field accepts."""
    values = (
        None,
        True,
        -1,
        1e400,
        "",
        "\0",
        "é\ud800",
        "../..",
        [],
        {},
        [[]],
        {"a": {"b": []}},
        "x" * 5000,
        "{{7*7}}",
    )
    return draw.choice(values)


def test_malformed_requests_are_errors_of_their_client(board: httpx.Client) -> None:
    draw, statuses = random.Random(1), set[int]()
    for _ in range(500):
        path, method = draw.choice(ROUTES), draw.choice(("GET", "POST", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"))
        fields = {draw.choice(FIELDS): draw_value(draw) for _ in range(draw.randrange(4))}
        values = {draw.choice(("data", "train", "out_dir", "a.b")): draw_value(draw)}
        forms = [{"command": "pretrain", "values": values}] * (path in ("/api/check", "/api/start"))
        body = json.dumps(draw.choice((*forms, fields, draw_value(draw)))).encode()
        body = draw.choice((body, body[: len(body) // 2], bytes(draw.randrange(256) for _ in range(20)), b""))
        query = "&".join(
            f"{draw.choice(FIELDS)}={draw.choice(('%00', '%ff', '..%2f..', '%', 'b', ''))}" for _ in fields
        )
        headers = {"Content-Type": draw.choice(("application/json", "text/plain", "multipart/form-data", "\xff"))}
        request = board.build_request(
            method, "/", content=body, headers={k: v.encode("latin-1") for k, v in headers.items()}
        )
        request.url = request.url.copy_with(raw_path=f"{path}?{query}".encode())
        statuses.add(board.send(request).status_code)
    assert max(statuses) < 500 and {400, 404, 405} <= statuses
