"""Runs that are killed while they upload to an object store resume from it, on another machine, to the bit."""

import multiprocessing
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import requests
from safetensors.torch import load_file

from litgpt.cli import main
from litgpt.files import MANIFEST, verify_manifest
from litgpt.store.object_store import ObjectStore
from tests.faults.test_killed_training import prepare, read_log, run_uninterrupted
from tests.processes import CONTEXT, join_ranks, run_litgpt, start_ranks
from tests.runs import read_losses

pytest.importorskip("moto", reason="needs moto, a local S3 server: pip install 'litgpt[test]'")
pytest.importorskip("s3fs", reason="needs s3fs: pip install 'litgpt[s3]'")

URL = "s3://bucket/run"
SHARD = "step-00000100/shard-00000-of-00001.safetensors"
STEP = re.compile(r"step \d+/100")
DROPOUT = {"model_config__dropout": 0.1}
FLAGS = ("pretrain", "--config", "recipe.yaml", "--checkpoint.upload_to", URL, "--resume", "auto")


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment in which s3:// is a local server with an empty bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    files = ObjectStore(URL).files
    files.mkdir("bucket")
    yield variables
    requests.post(f"{variables['AWS_ENDPOINT_URL']}/moto-api/reset", timeout=10)  # its objects are those of the process
    files.clear_instance_cache()  # which has a connection to this server
    server.stop()


def run_with(variables: dict[str, str], *argv: str) -> int:
    os.environ.update(variables)
    return run_litgpt(*argv)


def kill_often(variables: dict[str, str], kills: int, killed: Connection) -> None:
    """Start a run and kill it at a random moment, again and again, each time on a machine without its files.

    Most are killed while they train and upload. `killed` sends the number of each kill, and waits for an answer.
    """
    import s3fs  # noqa: F401  here, so that no run has to import it

    chance, fork, log = random.Random(0), multiprocessing.get_context("fork"), Path("rank-0.log")
    for number in range(kills):
        begin = len(log.read_text())
        run = fork.Process(target=run_with, args=(variables, *FLAGS))
        run.start()
        while number % 5 and run.is_alive() and not STEP.search(log.read_text(), begin):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.8))
        run.kill()
        run.join()
        shutil.rmtree("out", ignore_errors=True)
        killed.send(number)
        killed.recv()


def list_kept(folder: Path) -> list[int]:
    """The steps in the store, after the newest one has been downloaded and verified."""
    store = ObjectStore(URL)
    refused: list[str] = []
    if (latest := store.download_latest(folder, refused.append)) is not None:
        verify_manifest(latest)
        assert latest.name == f"step-{store.list_steps()[0]:08d}"
    assert not refused
    return store.list_steps()


def count_interrupted() -> int:
    """The number of folders in the store that are no checkpoint, because their upload was interrupted."""
    names = ObjectStore(URL).list_sizes()
    return len({name.split("/")[0] for name in names} - {name.split("/")[0] for name in names if MANIFEST in name})


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path, credentials: dict[str, str]) -> None:
    changes = {**DROPOUT, "train__max_steps": 100, "train__save_interval": 1}
    expected = run_uninterrupted(tmp_path / "unbroken", **changes)
    folder = prepare(tmp_path / "killed", **changes)
    ours, theirs = CONTEXT.Pipe()
    processes = start_ranks(kill_often, credentials, 20, theirs, folder=folder)
    newest = interrupted = 0
    for number in range(20):
        assert ours.poll(60) and ours.recv() == number, read_log(folder)
        kept = list_kept(tmp_path / f"after-{number}")
        assert max(kept, default=0) >= newest, "no upload that ended is lost"
        newest, interrupted = max(kept, default=0), interrupted + count_interrupted()
        ours.send(None)
    assert join_ranks(processes) == [0], read_log(folder)
    assert read_log(folder).count("Resuming training from") >= 5 and interrupted >= 1
    print(f"20 kills, {interrupted} of them inside an upload, {newest} steps")
    assert join_ranks(start_ranks(run_with, credentials, *FLAGS, folder=folder)) == [0], read_log(folder)
    losses = read_losses(folder)
    assert losses.items() <= expected.items() and sorted(losses)[-1] == 100
    assert list_kept(tmp_path / "end") == [100, 99] and count_interrupted() == 0
    resumed, unbroken = (load_file(path / "out" / SHARD) for path in (folder, tmp_path / "unbroken"))
    assert resumed.keys() == unbroken.keys()
    assert [name for name, tensor in resumed.items() if not tensor.equal(unbroken[name])] == []


@pytest.mark.slow
@pytest.mark.usefixtures("credentials")
def test_a_store_that_cannot_be_read_ends_the_run_before_its_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepare(tmp_path))
    flags = ["pretrain", "--config", "recipe.yaml", "--checkpoint.upload_to"]
    assert main([*flags, "s3://none/run", "--resume", "auto"]) == 1
    assert "litgpt: error: checkpoint.upload_to: s3://none/run cannot be read" in capsys.readouterr().err
    assert main([*flags, URL, "--resume", "true"]) == 1
    assert "litgpt: error: resume: true, but" in capsys.readouterr().err
    assert main([*flags, URL, "--train.max_steps", "2"]) == 0
    shutil.rmtree("out")
    assert main([*flags, URL]) == 1
    assert "checkpoint.upload_to: s3://bucket/run holds a run already; set resume: auto" in capsys.readouterr().err
    assert main([*flags, URL, "--resume", "true", "--train.max_steps", "2"]) == 0
    assert "Resuming training from out/step-00000002" in capsys.readouterr().out
