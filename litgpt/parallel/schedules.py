"""Which layers each stage of a pipeline has, and in which order its devices work on micro-batches.

A stage is a run of consecutive layers; a device has one, or several that are not neighbours. A schedule is built by
letting the devices work in ticks that all tasks last, which settles the order in which results travel, too.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from litgpt.errors import UserError
from litgpt.recipe.parallel import ParallelArgs

FORWARD, BACKWARD, INPUT, WEIGHT = "forward", "backward", "input", "weight"
SEND, RECEIVE, SEND_GRAD, RECEIVE_GRAD = "send", "receive", "send_grad", "receive_grad"


class Task(NamedTuple):
    """What a device does, with a stage of its own, for a micro-batch.

    Attributes:
        kind: `forward` and `backward`; `input` and `weight` are the halves of a backward that is split; the others move
            hidden states to the next stage and their gradients back.
    """

    kind: str
    stage: int
    micro: int


def split_layers(settings: ParallelArgs, layers: int) -> list[range]:
    """The layers of every stage.

    Raises:
        UserError: if they do not go round, naming the number to change.
    """
    given, devices = settings.pipeline_layers, settings.pipeline
    stages = devices * (2 if settings.pipeline_schedule in ("interleaved", "zbv") else 1)
    if isinstance(given, list):
        allowed = len(given) == stages or (settings.pipeline_schedule == "interleaved" and len(given) > stages)
        if not allowed or len(given) % devices:
            raise UserError(
                f"parallel.pipeline_layers: {len(given)} numbers, but {settings.pipeline_schedule} on {devices} "
                f"devices has {stages} stages; give {stages} numbers"
            )
        if sum(given) != layers:
            last = given[-1] + layers - sum(given)
            would_do = f"change the last to {last}" if last > 0 else f"give {len(given)} numbers of sum {layers}"
            raise UserError(
                f"parallel.pipeline_layers: {' + '.join(map(str, given))} = {sum(given)}, but the model has {layers} "
                f"layers; {would_do}, or set auto"
            )
        sizes = given
    else:
        if layers < stages:
            would_do = f"parallel.pipeline: {layers * devices // stages or 1}"
            raise UserError(
                f"parallel.pipeline: {devices} makes {stages} stages, but the model has {layers} layers; set {would_do}"
            )
        sizes = balance_layers(layers, stages)
    return [range(start, end) for start, end in pairwise(accumulate(sizes, initial=0))]


def balance_layers(layers: int, stages: int) -> list[int]:
    """Layers of each stage, where embedding and head weigh as much as a layer; a middle one gets more than the ends."""
    sizes = [1] * stages
    order = [*range(stages - 2, 0, -1), 0, stages - 1]
    for _ in range(layers - stages):
        lightest = min(order, key=lambda stage: sizes[stage] + (stage == 0) + (stage == stages - 1))
        sizes[lightest] += 1
    return sizes


def assign_stages(schedule: str, device: int, devices: int, stages: int) -> tuple[int, ...]:
    """The stages of a device: every so many, or, for `zbv`, there and back again."""
    if schedule == "zbv":
        return device, 2 * devices - 1 - device
    return tuple(range(device, stages, devices))


def build_schedule(schedule: str, devices: int, stages: int, micro_batches: int) -> list[list[Task]]:
    """What each device does, moves included, in an order in which no two devices wait for each other.

    All moves between devices are in one order everywhere, so that they may also be made one after the other.
    """
    owners = {stage: device for device in range(devices) for stage in assign_stages(schedule, device, devices, stages)}
    made: list[list[Task]] = [[] for _ in range(devices)]
    for tick in simulate_ticks(schedule, devices, stages, micro_batches):
        for device, task in tick.items():
            made[device].append(task)
        for task in tick.values():
            for sender, receiver in list_transfers(task, stages):
                if owners[sender.stage] != owners[receiver.stage]:
                    made[owners[sender.stage]].append(sender)
                    made[owners[receiver.stage]].append(receiver)
    return made


def list_transfers(task: Task, stages: int) -> Iterator[tuple[Task, Task]]:
    """What has to be sent after a task, and what is received for that."""
    kind, stage, micro = task
    if kind == FORWARD and stage < stages - 1:
        yield Task(SEND, stage, micro), Task(RECEIVE, stage + 1, micro)
    elif kind in (BACKWARD, INPUT) and stage > 0:
        yield Task(SEND_GRAD, stage, micro), Task(RECEIVE_GRAD, stage - 1, micro)


def simulate_ticks(schedule: str, devices: int, stages: int, micro_batches: int) -> Iterator[dict[int, Task]]:
    """What the devices do at the same time, until all is done."""
    own = [assign_stages(schedule, device, devices, stages) for device in range(devices)]
    choices = [SCHEDULES[schedule](device, devices, own[device], micro_batches) for device in range(devices)]
    done: set[Task] = set()
    left = stages * micro_batches * (3 if schedule == "zbv" else 2)
    while left:
        chosen = {device: task for device in range(devices) if (task := choices[device](done, stages))}
        assert chosen, f"{schedule}: {devices} devices with {stages} stages and {micro_batches} micro-batches are stuck"
        done |= set(chosen.values())
        left -= len(chosen)
        yield chosen


def is_ready(task: Task, done: Collection[Task], stages: int) -> bool:
    """Whether what a task needs is there."""
    kind, stage, micro = task
    if kind == FORWARD:
        return stage == 0 or Task(FORWARD, stage - 1, micro) in done
    if kind == WEIGHT:
        return Task(INPUT, stage, micro) in done
    after = stage == stages - 1 or Task(kind, stage + 1, micro) in done
    return after and Task(FORWARD, stage, micro) in done


TaskPicker = Callable[[Collection[Task], int], Task | None]


def pick_in_order(tasks: Sequence[Task]) -> TaskPicker:
    """Always the next task of a list, once it is ready."""
    place = 0

    def choose(done: Collection[Task], stages: int) -> Task | None:
        nonlocal place
        if place == len(tasks) or not is_ready(tasks[place], done, stages):
            return None
        place += 1
        return tasks[place - 1]

    return choose


def schedule_gpipe(device: int, devices: int, own: Sequence[int], micro_batches: int) -> TaskPicker:
    """GPipe (Huang et al. 2019): every micro-batch forward, then every one backward."""
    numbers = range(micro_batches)
    return pick_in_order([Task(kind, own[0], number) for kind in (FORWARD, BACKWARD) for number in numbers])


def schedule_1f1b(device: int, devices: int, own: Sequence[int], micro_batches: int) -> TaskPicker:
    """1F1B, over several stages interleaved (Narayanan et al. 2021, section 2.2).

    With several stages a device works on one of them with a whole group of micro-batches before it turns to the next.
    Groups are of as many as there are devices, or of a few more, the larger ones first.
    """
    groups = max(1, micro_batches // devices)
    sizes = [micro_batches // groups + (number < micro_batches % groups) for number in range(groups)]
    members = [range(start, end) for start, end in pairwise(accumulate(sizes, initial=0))]
    forward = [Task(FORWARD, stage, number) for group in members for stage in own for number in group]
    backward = [Task(BACKWARD, stage, number) for group in members for stage in reversed(own) for number in group]
    before = devices - 1 - device
    if len(own) > 1:
        before = 2 * before + (len(own) - 1) * sizes[0]
    paired = [task for pair in zip(forward[before:], backward, strict=False) for task in pair]
    return pick_in_order([*forward[:before], *paired, *backward[max(len(forward) - before, 0) :]])


def schedule_zero_bubble(device: int, devices: int, own: Sequence[int], micro_batches: int) -> TaskPicker:
    """Stages there and back again, the gradients of weights put off into the gaps (Qi et al. 2024, "ZB-V").

    A backward goes first, then a forward, and what is nearer to the loss; a new micro-batch waits while a device holds
    what 1F1B would hold at most. The gradients of weights are for when there is nothing else to do.
    """
    held = 0
    next_of = {(kind, stage): 0 for kind in (INPUT, FORWARD, WEIGHT) for stage in own}

    def choose(done: Collection[Task], stages: int) -> Task | None:
        nonlocal held
        for kind, stage in ((kind, stage) for kind in (INPUT, FORWARD, WEIGHT) for stage in reversed(own)):
            task = Task(kind, stage, next_of[kind, stage])
            full = kind == FORWARD and stage == own[0] and held >= 2 * devices
            if task.micro < micro_batches and not full and is_ready(task, done, stages):
                next_of[kind, stage] += 1
                held += {FORWARD: 1, WEIGHT: -1}.get(kind, 0)
                return task
        return None

    return choose


SCHEDULES: dict[str, Callable[[int, int, Sequence[int], int], TaskPicker]] = {
    "gpipe": schedule_gpipe,
    "1f1b": schedule_1f1b,
    "interleaved": schedule_1f1b,
    "zbv": schedule_zero_bubble,
}
