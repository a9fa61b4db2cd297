"""A run that is killed, stopped or resumed elsewhere ends where an unbroken one does."""

import os
import random
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from litgpt.store.checkpoint_load import find_latest
from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.runs import read_losses, write_recipe, write_text

DROPOUT = {"model_config__dropout": 0.1, "data__init_args__num_workers": 2}


def train(folder: Path, *flags: str, ranks: int = 1) -> list[int | None]:
    return join_ranks(
        start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", *flags, folder=folder, ranks=ranks)
    )


def prepare(folder: Path, ranks: int = 1, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder)
    write_recipe(folder, devices=ranks, **changes)
    return folder


def read_log(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("rank-*.log")))


def run_uninterrupted(folder: Path, ranks: int = 1, **changes: object) -> dict[int, float]:
    assert train(prepare(folder, ranks, **changes), ranks=ranks) == [0] * ranks, read_log(folder)
    return read_losses(folder)


def kill_and_resume(folder: Path, *, kills: int, ranks: int, seconds: float, seed: int) -> None:
    """Kill a run at random instants, each time check its newest checkpoint, then let it finish."""
    chance = random.Random(seed)
    flags = ("pretrain", "--config", "recipe.yaml", "--resume", "auto")
    for _ in range(kills):
        processes = start_ranks(run_litgpt, *flags, folder=folder, ranks=ranks)
        victim = processes[chance.randrange(ranks)]
        victim.join(chance.uniform(0, seconds))  # or until it has ended
        victim.kill()
        join_ranks(processes, timeout=2)  # as torchrun does, end the others soon after one is gone
        refused: list[str] = []
        find_latest(folder / "out", refused.append)
        assert not refused
    assert train(folder, "--resume", "auto", ranks=ranks) == [0] * ranks, read_log(folder)


def list_survivors(folder: Path, seconds: float = 20) -> list[str]:
    """The processes that still work in a folder after so many seconds at most."""
    until = time.monotonic() + seconds
    while True:
        alive = [link.parent.name for link in Path("/proc").glob("[0-9]*/cwd") if works_in(link, folder)]
        if not alive or time.monotonic() > until:
            return alive
        time.sleep(0.2)


def works_in(link: Path, folder: Path) -> bool:
    try:
        return link.resolve().is_relative_to(folder)
    except OSError:  # it has just ended, or is not ours to look at
        return False


def campaign(tmp_path: Path, *, kills: int, rounds: int, ranks: int, seconds: float) -> None:
    expected = run_uninterrupted(tmp_path / "unbroken", ranks, **DROPOUT)
    assert len(expected) == 12
    for number in range(rounds):
        folder = prepare(tmp_path / f"killed-{number}", ranks, **DROPOUT)
        kill_and_resume(folder, kills=kills, ranks=ranks, seconds=seconds, seed=number)
        assert read_losses(folder) == expected
        assert not list_survivors(folder)


def test_a_killed_run_ends_with_the_same_losses_to_the_bit(tmp_path: Path) -> None:
    campaign(tmp_path, kills=3, rounds=1, ranks=1, seconds=2)


@pytest.mark.slow
def test_a_run_of_two_ranks_survives_the_death_of_one(tmp_path: Path) -> None:
    campaign(tmp_path, kills=1, rounds=1, ranks=2, seconds=4)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", [1, 2])
def test_fifty_kills(tmp_path: Path, ranks: int) -> None:
    campaign(tmp_path, kills=5, rounds=10, ranks=ranks, seconds=4)


def test_two_ranks_then_one(tmp_path: Path) -> None:
    expected = run_uninterrupted(tmp_path / "unbroken", ranks=2)
    folder = prepare(tmp_path / "elastic", ranks=2)
    assert train(folder, "--train.max_steps", "6", "--train.lr_decay_steps", "12", ranks=2) == [0, 0], read_log(folder)
    assert train(folder, "--resume", "auto", "--devices", "1", ranks=1) == [0], read_log(folder)
    assert read_losses(folder) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("signalled", [(0,), (1,), (0, 1)])
def test_a_signal_to_any_of_two_ranks_saves_and_ends_both(tmp_path: Path, signalled: tuple[int, ...]) -> None:
    folder = prepare(tmp_path, 2, train__max_steps=100_000, train__save_interval=None)
    ranks = start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", folder=folder, ranks=2)
    end = time.monotonic() + 100
    while "step 2/100" not in read_log(folder) and ranks[0].is_alive():
        assert time.monotonic() < end, read_log(folder)
        time.sleep(0.01)
    for rank in signalled:
        os.kill(ranks[rank].pid, signal.SIGTERM)
    assert join_ranks(ranks) == [0, 0], read_log(folder)
    assert read_log(folder).count("SIGTERM: finishing step") == (0 in signalled)
    assert not (folder / "rank-1.log").read_text()
    assert find_latest(folder / "out") is not None and not (folder / "out" / "final").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_leaves_with_zero_and_loses_nothing(tmp_path: Path, number: signal.Signals) -> None:
    expected = run_uninterrupted(tmp_path / "unbroken", **DROPOUT)
    for attempt in range(3):  # on a busy machine, a run may be over before this process gets to signal it
        folder = prepare(tmp_path / f"stopped-{attempt}", **DROPOUT, train__save_interval=None)
        (process,) = start_ranks(run_litgpt, "pretrain", "--config", "recipe.yaml", folder=folder)
        end = time.monotonic() + 60
        while "step 2/12" not in read_log(folder) and process.is_alive():
            assert time.monotonic() < end, read_log(folder)
            time.sleep(0.01)
        with suppress(ProcessLookupError):  # it has ended
            os.kill(process.pid, number)
        assert join_ranks([process]) == [0], read_log(folder)
        log = read_log(folder)
        if not (folder / "out" / "final").exists():
            break
    (step,) = re.findall(rf"{number.name}: finishing [a-z ]*(\d+), then saving", log)
    assert f"{number.name} received" in log and f"step {step}/12" in log and f"step {int(step) + 1}/12" not in log
    saved = find_latest(folder / "out")
    assert saved is not None
    assert not (folder / "out" / "final").exists()
    assert train(folder, "--resume", "true") == [0], read_log(folder)
    assert f"Start     Resuming training from out/{saved.name}, after step {step}\n" in read_log(folder)
    assert read_losses(folder) == expected
    assert (folder / "out" / "final" / "model.safetensors").is_file()


def test_the_header_names_the_older_checkpoint_if_the_newest_one_is_damaged(tmp_path: Path) -> None:
    folder = prepare(tmp_path, train__max_steps=4)
    assert train(folder) == [0], read_log(folder)
    (folder / "out" / "step-00000004" / "progress.json").write_text("{}")
    assert train(folder, "--resume", "auto") == [0], read_log(folder)
    log = read_log(folder).split("litgpt pretrain toy")[-1]
    starts = [f"Start     Resuming training from out/step-0000000{step}, after step {step}\n" for step in (4, 2)]
    assert log.index(starts[0]) < log.index("step-00000004 refused") < log.index(starts[1]) < log.index("step 3/4")
