"""The learning rate of every decay style, held against values worked out by hand."""

import pytest

from litgpt.errors import UserError
from litgpt.recipe.train import TrainArgs
from litgpt.train.schedule import Schedule, count_warmup_steps


def rates(style: str, steps: list[int], **settings: object) -> list[float]:
    train = TrainArgs(lr_decay_style=style, min_lr=0.1, **settings)  # type: ignore[arg-type]
    schedule = Schedule.from_args(train, peak=1.0, warmup=10, steps=110)
    return [schedule.at(step) for step in steps]


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "inverse-sqrt", "wsd"])
def test_warm_up_rises_in_equal_parts_and_trains_from_the_first_step(style: str) -> None:
    assert rates(style, [0, 4, 9]) == pytest.approx([0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("cosine", [1.0, 0.55, 0.1, 0.1]),
        ("linear", [1.0, 0.55, 0.1, 0.1]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_decay_at_start_middle_end_and_beyond(style: str, expected: list[float]) -> None:
    assert rates(style, [10, 60, 110, 500]) == pytest.approx(expected)


def test_inverse_sqrt_falls_with_the_root_of_the_step() -> None:
    assert rates("inverse-sqrt", [39, 89, 10**6]) == pytest.approx([0.5, 1 / 3, 0.1])


@pytest.mark.parametrize(
    ("style", "middle"),
    [
        ("linear", 0.55),
        ("cosine", 0.55),
        ("exponential", 0.1 + 0.9 * (2**0.5 - 1)),
        ("minus-sqrt", 0.1 + 0.9 * (1 - 0.5**0.5)),
    ],
)
def test_wsd_is_flat_and_then_falls(style: str, middle: float) -> None:
    got = rates("wsd", [10, 90, 100, 110], wsd_decay_steps=20, wsd_decay_style=style)
    assert got == pytest.approx([1.0, 1.0, middle, 0.1])


def test_decay_steps_end_the_decay_before_the_run_does() -> None:
    assert rates("linear", [35, 60, 100], lr_decay_steps=60) == pytest.approx([0.55, 0.1, 0.1])


def test_a_floor_above_the_peak_does_not_raise_the_rate() -> None:
    schedule = Schedule.from_args(TrainArgs(min_lr=1.0), peak=0.5, warmup=0, steps=10)
    assert max(schedule.at(step) for step in range(20)) == 0.5


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({"lr_warmup_steps": None, "lr_warmup_fraction": 0.1}, 30, 3),
        ({"lr_warmup_steps": None, "lr_warmup_fraction": 0.07}, 30, 3),
        ({"lr_warmup_steps": None, "lr_warmup_fraction": 0.1, "lr_decay_steps": 20}, 30, 2),
        ({"lr_warmup_steps": None, "lr_warmup_fraction": 0.1, "lr_decay_steps": 20}, None, 2),
        ({"lr_warmup_steps": None, "lr_warmup_fraction": 0.0}, 30, 0),
        ({"lr_warmup_steps": 7}, None, 7),
        ({"lr_warmup_steps": 7}, 5, 5),
        ({"lr_warmup_steps": None}, 5, 0),
    ],
)
def test_a_fraction_of_warm_up_is_of_the_run(settings: dict[str, object], steps: int | None, expected: int) -> None:
    assert count_warmup_steps(TrainArgs(**settings), steps) == expected  # type: ignore[arg-type]


def test_a_fraction_of_a_run_without_end_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"train.lr_warmup_fraction: 0.1 needs the number of steps; set train.max_steps"
    ):
        count_warmup_steps(TrainArgs(lr_warmup_steps=None, lr_warmup_fraction=0.1), None)
