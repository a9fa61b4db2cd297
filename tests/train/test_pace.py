"""A run that a limit on time ends has decayed its learning rate by then, and one that ends before has not noticed."""

import itertools
import json
import math
import os
from pathlib import Path

import pytest

from litgpt.recipe.train import TrainArgs
from litgpt.train import loop
from litgpt.train.metrics import Meter
from litgpt.train.pace import Pace
from litgpt.train.schedule import Schedule
from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.runs import read_losses, write_recipe, write_text

FLOOR, WARMUP = 0.1, 5


def simulate(
    seconds: list[float], limit: float | None, *, steps: int | None = None, pace: Pace | None = None, **train: object
) -> list[float]:
    """The learning rates of a process whose steps take these seconds, until its time is over."""
    settings = TrainArgs(min_lr=FLOOR, **{"lr_decay_style": "linear", **train})  # type: ignore[arg-type]
    schedule = Schedule.from_args(settings, peak=1.0, warmup=WARMUP, steps=steps)
    pace = pace or Pace(limit)
    done, now, rates = pace.steps, 0.0, []
    last = pace.estimate_last(done, now)
    for duration in seconds[:steps]:
        rates.append(schedule.at(done, last=last))
        now, done = now + duration, done + 1
        last = pace.estimate_last(done, now)  # as the loop does, before the step is counted
        pace.record(now)
        if limit is not None and now >= limit:
            break
    return rates


@pytest.mark.parametrize("style", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [None, 1000])
def test_the_floor_is_reached_when_time_is_over(style: str, steps: int | None) -> None:
    rates = simulate([20.0, *[1.0] * 1000], limit=119.5, steps=steps, lr_decay_style=style)
    assert len(rates) == 101  # one of 20 s, and 99.5 of 1 s
    assert rates[:WARMUP] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(FLOOR, abs=0.06)
    assert rates[WARMUP:] == sorted(rates[WARMUP:], reverse=True)


def test_the_decay_is_that_of_a_run_of_as_many_steps() -> None:
    timed, counted = simulate([1.0] * 200, limit=100.0), simulate([1.0] * 100, limit=None, steps=100)
    assert timed == pytest.approx(counted)


def test_a_limit_that_the_steps_do_not_reach_changes_no_bit() -> None:
    seconds = [20.0, *[1.0 + number % 3 / 10 for number in range(99)]]
    assert simulate(seconds, limit=180.0, steps=100) == simulate(seconds, limit=None, steps=100)


def test_the_floor_is_reached_although_steps_become_slower() -> None:
    rates = simulate([*[1.0] * 50, *[3.0] * 100], limit=200.0, steps=250)
    assert len(rates) == 100
    assert rates[-1] == pytest.approx(FLOOR, abs=0.05)


def test_a_decay_until_a_given_step_is_not_shortened() -> None:
    settings = {"limit": 50.0, "lr_decay_steps": 100}
    assert simulate([1.0] * 200, **settings) == simulate([1.0] * 50, limit=None, lr_decay_steps=100)  # type: ignore[arg-type]


def test_a_resumed_process_knows_the_pace_before_its_first_step() -> None:
    pace = Pace(100.0)
    simulate([1.0] * 61, limit=61.0, pace=pace)
    resumed = Pace(40.0)
    assert resumed.estimate_last(61, 0.0) == math.inf
    resumed.load_state_dict(json.loads(json.dumps(pace.state_dict())))
    assert resumed.estimate_last(61, 0.0) == 61 + 40
    resumed.record(30.0)  # its first step, which compiles
    assert resumed.estimate_last(62, 30.0) == 62 + 10


def run_with_slow_clock() -> int:
    """Run litgpt with a clock that goes on by 0.1 s on the first rank and 0.03 s on the second whenever it is read."""
    rank = int(os.environ["RANK"])
    ticks = itertools.count()
    loop.Meter = lambda **settings: Meter(**settings, clock=lambda: next(ticks) * (0.03 if rank else 0.1))  # type: ignore[assignment,misc]
    rates, set_rate = [], loop.set_learning_rate

    def record_rate(optimizers: list[object], share: float) -> None:
        rates.append(share)
        set_rate(optimizers, share)  # type: ignore[arg-type]

    loop.set_learning_rate = record_rate  # type: ignore[assignment]
    save = loop.Loop.save

    def save_with_rates(run: loop.Loop, **settings: bool) -> None:
        save(run, **settings)
        Path(f"rates-{rank}.json").write_text(json.dumps(rates))

    loop.Loop.save = save_with_rates  # type: ignore[method-assign]
    return run_litgpt("pretrain", "--config", "recipe.yaml")


def test_ranks_with_other_clocks_decay_together(tmp_path: Path) -> None:
    write_text(tmp_path)
    train = {"train__max_steps": None, "train__max_time": 40.0, "train__save_interval": 1000, "train__max_norm": None}
    write_recipe(tmp_path, devices=2, parallel={"data_replicate": 2}, **train)
    assert join_ranks(start_ranks(run_with_slow_clock, folder=tmp_path, ranks=2)) == [0, 0], [
        path.read_text() for path in sorted(tmp_path.glob("rank-*.log"))
    ]
    first, second = (json.loads((tmp_path / f"rates-{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first) == max(read_losses(tmp_path)) > 20
    assert first[2] > 0.9 and first[-1] < 0.1
