"""Pipeline schedules: layers of stages; tasks in a valid order, without deadlocks, and with short bubbles."""

from collections import Counter
from itertools import product
from typing import Any

import pytest

from litgpt.errors import UserError
from litgpt.parallel.schedules import (
    BACKWARD,
    FORWARD,
    INPUT,
    RECEIVE,
    RECEIVE_GRAD,
    SEND,
    SEND_GRAD,
    WEIGHT,
    Task,
    assign_devices,
    balance_layers,
    build_pipeline_schedule,
    is_ready,
    simulate_ticks,
    split_layers,
)
from litgpt.recipe.parallel import ParallelArgs

KINDS = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2)]
SIZES = list(product((2, 3, 4, 7), (1, 2, 3, 4, 5, 8, 11)))


def stage_sizes(layers: int, **settings: Any) -> list[int]:
    return [len(stage) for stage in split_layers(ParallelArgs(**settings), layers)]


def test_layers_are_balanced_with_embedding_and_head() -> None:
    assert balance_layers(8, 2) == [4, 4]
    assert balance_layers(7, 2) == [4, 3]
    assert balance_layers(10, 4) == [2, 3, 3, 2]
    assert balance_layers(48, 4) == [11, 13, 13, 11]
    assert balance_layers(4, 4) == [1, 1, 1, 1]
    assert balance_layers(28, 4, tower=3) == [4, 8, 9, 7]
    assert balance_layers(4, 2, tower=9) == [1, 3]
    assert all(sum(balance_layers(layers, stages)) == layers for stages in range(2, 9) for layers in range(stages, 40))


def test_stages_are_consecutive_layers() -> None:
    assert split_layers(ParallelArgs(pipeline=2, pipeline_layers=[1, 3]), 4) == [range(1), range(1, 4)]
    assert stage_sizes(8, pipeline=2, pipeline_schedule="zbv") == [1, 3, 3, 1]
    assert stage_sizes(28, pipeline=4, pipeline_layers=[5, None, None, 7]) == [5, 8, 8, 7]
    assert stage_sizes(9, pipeline=3, pipeline_schedule="interleaved", pipeline_layers=[1] * 9) == [1] * 9
    assert assign_devices("zbv", 4, 8) == [0, 1, 2, 3, 3, 2, 1, 0]
    assert assign_devices("interleaved", 4, 12) == [0, 1, 2, 3] * 3


@pytest.mark.parametrize(
    ("settings", "layers", "message"),
    [
        ({"pipeline": 4, "pipeline_schedule": "zbv"}, 6, "parallel.pipeline: 4 makes 8 stages, but the model has 6 "
         "layers; set parallel.pipeline: 3"),
        ({"pipeline": 2, "pipeline_layers": [3, 4]}, 8, "parallel.pipeline_layers: 3 + 4 = 7, but the model has 8 "
         "layers; change the last to 5, or set auto"),
        ({"pipeline": 4, "pipeline_layers": [1, None, None, 2]}, 8, "parallel.pipeline_layers: [1, null, null, 2] "
         "leaves 5 of 8 layers for 2 stages, which does not divide equally; change a number, or set auto"),
        ({"pipeline": 2, "pipeline_layers": [6, 4]}, 5, "parallel.pipeline_layers: 6 + 4 = 10, but the model has 5 "
         "layers; give 2 numbers of sum 5, or set auto"),
        ({"pipeline": 2, "pipeline_schedule": "zbv", "pipeline_layers": [4, 4]}, 8, "parallel.pipeline_layers: "
         "2 numbers, but zbv on 2 devices has 4 stages; give 4 numbers"),
        ({"pipeline": 2, "pipeline_layers": [2, 2, 2, 2]}, 8, "parallel.pipeline_layers: 4 numbers, but 1f1b on 2 "
         "devices has 2 stages; give 2 numbers"),
    ],
)  # fmt: skip
def test_layers_that_do_not_fit_are_refused(settings: dict[str, Any], layers: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        stage_sizes(layers, **settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(("schedule", "stages_per_device"), KINDS)
def test_every_task_runs_once_and_after_its_inputs(schedule: str, stages_per_device: int) -> None:
    for devices, micro_batches in SIZES:
        stages = devices * stages_per_device
        halves = (INPUT, WEIGHT) if schedule == "zbv" else (BACKWARD,)
        expected = Counter(
            Task(kind, stage, number)
            for kind in (FORWARD, *halves)
            for stage in range(stages)
            for number in range(micro_batches)
        )
        done: list[Task] = []
        for tick in simulate_ticks(schedule, devices, stages, micro_batches):
            before = set(done)
            for device, task in tick.items():
                assert assign_devices(schedule, devices, stages)[task.stage] == device
                assert is_ready(task, before, stages), task
            done += tick.values()
        assert Counter(done) == expected


@pytest.mark.parametrize(("schedule", "stages_per_device"), KINDS)
def test_schedules_have_no_deadlocks(schedule: str, stages_per_device: int) -> None:
    """Also if a sender waits until its partner receives the same tensor."""
    partner = {SEND: (RECEIVE, 1), SEND_GRAD: (RECEIVE_GRAD, -1)}
    for devices, micro_batches in SIZES:
        left = [
            list(reversed(tasks))
            for tasks in build_pipeline_schedule(schedule, devices, devices * stages_per_device, micro_batches)
        ]
        while any(left):
            moved = False
            for device in left:
                while device and device[-1].kind in (FORWARD, BACKWARD, INPUT, WEIGHT):
                    device.pop()
                    moved = True
            waiting = {device[-1]: device for device in left if device}
            for task, device in waiting.items():
                if task.kind in partner:
                    kind, step = partner[task.kind]
                    if (other := waiting.get(Task(kind, task.stage + step, task.micro))) is not None:
                        device.pop()
                        other.pop()
                        moved = True
            assert moved, (schedule, devices, micro_batches, [device[-3:] for device in left])


def count_idle_ticks(schedule: str, devices: int, stages: int, micro_batches: int) -> int:
    """Ticks in which a device is idle."""
    work = stages // devices * micro_batches * (3 if schedule == "zbv" else 2)
    return sum(1 for _ in simulate_ticks(schedule, devices, stages, micro_batches)) - work


@pytest.mark.parametrize(("schedule", "stages_per_device"), KINDS)
def test_bubbles_are_as_short_as_published(schedule: str, stages_per_device: int) -> None:
    for devices, micro_batches in SIZES:
        if micro_batches >= devices:
            idle_ticks = count_idle_ticks(schedule, devices, devices * stages_per_device, micro_batches)
            assert idle_ticks <= 1.5 * devices if schedule == "zbv" else idle_ticks == 2 * (devices - 1)


def count_held(schedule: str, devices: int, stages: int, micro_batches: int) -> int:
    """The most forwards whose backward is not over, of all devices."""
    most, now = 0, [0] * devices
    ends = WEIGHT if schedule == "zbv" else BACKWARD
    for tick in simulate_ticks(schedule, devices, stages, micro_batches):
        for device, task in tick.items():
            now[device] += (task.kind == FORWARD) - (task.kind == ends)
        most = max(most, *now)
    return most


def test_memory_does_not_grow_with_micro_batches() -> None:
    assert count_held("gpipe", 4, 4, 32) == 32
    assert count_held("1f1b", 4, 4, 32) == 4
    assert count_held("interleaved", 4, 8, 32) == 11
    assert count_held("zbv", 4, 8, 32) <= 12
