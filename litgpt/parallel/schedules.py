"""Pipeline schedules: the layers of each stage, and the order in which devices run micro-batches.

A stage is a range of consecutive layers; a device has one stage, or several that are not adjacent. A schedule is built
by simulating the devices in ticks, as if all tasks took equally long, which also gives the order of transfers.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from itertools import accumulate, pairwise, product
from typing import NamedTuple

from litgpt.errors import UserError
from litgpt.recipe.parallel import ParallelArgs

FORWARD, BACKWARD, INPUT, WEIGHT = "forward", "backward", "backward_input", "backward_weight"
SEND, RECEIVE, SEND_GRAD, RECEIVE_GRAD = "send", "receive", "send_grad", "receive_grad"


class Task(NamedTuple):
    """What a device runs for one of its stages and one micro-batch.

    Attributes:
        kind: the method of `pipeline.ScheduleRunner` that runs it: `forward`; `backward`, or its two halves
            `backward_input` and `backward_weight`; or a transfer, of hidden states to the next stage or of their
            gradients to the previous one.
    """

    kind: str
    stage: int
    micro: int


def split_layers(settings: ParallelArgs, layers: int, *, tower: int = 0) -> list[range]:
    """The layers of every stage.

    Args:
        tower: the number of layers that cost as much as the towers, which the first stage has.

    Raises:
        UserError: if the settings do not fit the number of layers, naming the number to change.
    """
    given, devices = settings.pipeline_layers, settings.pipeline
    stages = devices * (2 if settings.pipeline_schedule in ("interleaved", "zbv") else 1)
    if isinstance(given, list):
        is_allowed = len(given) == stages or (settings.pipeline_schedule == "interleaved" and len(given) > stages)
        if not is_allowed or len(given) % devices:
            raise UserError(
                f"parallel.pipeline_layers: {len(given)} numbers, but {settings.pipeline_schedule} on {devices} "
                f"devices has {stages} stages; give {stages} numbers"
            )
        sizes = share_layers(given, layers)
        if sum(sizes) != layers:
            last = sizes[-1] + layers - sum(sizes)
            cure = f"change the last to {last}" if last > 0 else f"give {len(sizes)} numbers of sum {layers}"
            raise UserError(
                f"parallel.pipeline_layers: {' + '.join(map(str, sizes))} = {sum(sizes)}, but the model has {layers} "
                f"layers; {cure}, or set auto"
            )
    else:
        if layers < stages:
            raise UserError(
                f"parallel.pipeline: {devices} makes {stages} stages, but the model has {layers} layers; "
                f"set parallel.pipeline: {layers * devices // stages or 1}"
            )
        sizes = balance_layers(layers, stages, tower=tower)
    return [range(start, end) for start, end in pairwise(accumulate(sizes, initial=0))]


def share_layers(sizes: Sequence[int | None], layers: int) -> list[int]:
    """Give stages without a number equal shares of the layers that are left.

    Raises:
        UserError: if these do not divide equally.
    """
    rest, stages = layers - sum(size or 0 for size in sizes), sizes.count(None)
    if stages and (rest < stages or rest % stages):
        shown = ", ".join("null" if size is None else str(size) for size in sizes)
        raise UserError(
            f"parallel.pipeline_layers: [{shown}] leaves {rest} of {layers} layers for {stages} stages, which does not "
            "divide equally; change a number, or set auto"
        )
    return [rest // stages if size is None else size for size in sizes]


def balance_layers(layers: int, stages: int, *, tower: int = 0) -> list[int]:
    """Layers of each stage, as if embedding and head were a layer each; stages in the middle get the remaining ones.

    Args:
        tower: as in `split_layers`.
    """
    sizes = [1] * stages
    order = [*range(stages - 2, 0, -1), 0, stages - 1]
    for _ in range(layers - stages):
        lightest = min(order, key=lambda stage: sizes[stage] + (stage == 0) * (1 + tower) + (stage == stages - 1))
        sizes[lightest] += 1
    return sizes


def assign_devices(schedule: str, devices: int, stages: int) -> list[int]:
    """The device of every stage: in rotation, or, for `zbv`, in a V shape."""
    if schedule == "zbv":
        return [*range(devices), *reversed(range(devices))]
    return [stage % devices for stage in range(stages)]


@cache
def build_pipeline_schedule(schedule: str, devices: int, stages: int, micro_batches: int) -> list[list[Task]]:
    """The tasks of each device, transfers included, in an order without deadlocks.

    Transfers are in the same order on all devices, so that they may also be synchronous.
    """
    owners = assign_devices(schedule, devices, stages)
    tasks: list[list[Task]] = [[] for _ in range(devices)]
    for tick in simulate_ticks(schedule, devices, stages, micro_batches):
        for device, task in tick.items():
            tasks[device].append(task)
        for task in tick.values():
            for sender, receiver in list_transfers(task, stages):
                if owners[sender.stage] != owners[receiver.stage]:
                    tasks[owners[sender.stage]].append(sender)
                    tasks[owners[receiver.stage]].append(receiver)
    return tasks


def list_transfers(task: Task, stages: int) -> Iterator[tuple[Task, Task]]:
    """The send and the receive that follow a task, if any."""
    kind, stage, micro = task
    if kind == FORWARD and stage < stages - 1:
        yield Task(SEND, stage, micro), Task(RECEIVE, stage + 1, micro)
    elif kind in (BACKWARD, INPUT) and stage > 0:
        yield Task(SEND_GRAD, stage, micro), Task(RECEIVE_GRAD, stage - 1, micro)


def simulate_ticks(schedule: str, devices: int, stages: int, micro_batches: int) -> Iterator[dict[int, Task]]:
    """The tasks that devices run at the same time, until all are done."""
    owners = assign_devices(schedule, devices, stages)
    pickers = []
    for device in range(devices):
        local_stages = [stage for stage in range(stages) if owners[stage] == device]
        pickers.append(SCHEDULES[schedule](device, local_stages, devices, micro_batches))
    done: set[Task] = set()
    remaining = stages * micro_batches * (3 if schedule == "zbv" else 2)
    while remaining:
        chosen = {device: task for device in range(devices) if (task := pickers[device](done, stages))}
        assert chosen, f"{schedule}: {devices} devices with {stages} stages and {micro_batches} micro-batches are stuck"
        done |= set(chosen.values())
        remaining -= len(chosen)
        yield chosen


def is_ready(task: Task, done: Collection[Task], stages: int) -> bool:
    """Whether the tasks that a task depends on are done."""
    kind, stage, micro = task
    if kind == FORWARD:
        return stage == 0 or Task(FORWARD, stage - 1, micro) in done
    if kind == WEIGHT:
        return Task(INPUT, stage, micro) in done
    has_grad = stage == stages - 1 or Task(kind, stage + 1, micro) in done
    return has_grad and Task(FORWARD, stage, micro) in done


TaskPicker = Callable[[Collection[Task], int], Task | None]
"""Given the tasks that are done and the number of stages, the next task of a device, or None to wait."""


def pick_in_order(tasks: Sequence[Task]) -> TaskPicker:
    """Tasks in a fixed order, each once it is ready."""
    index = 0

    def pick(done: Collection[Task], stages: int) -> Task | None:
        nonlocal index
        if index == len(tasks) or not is_ready(tasks[index], done, stages):
            return None
        index += 1
        return tasks[index - 1]

    return pick


def schedule_gpipe(_device: int, local_stages: Sequence[int], _devices: int, micro_batches: int) -> TaskPicker:
    """GPipe (Huang et al. 2019): all micro-batches forward, then all backward."""
    numbers = range(micro_batches)
    return pick_in_order([Task(kind, local_stages[0], number) for kind in (FORWARD, BACKWARD) for number in numbers])


def schedule_1f1b(device: int, local_stages: Sequence[int], devices: int, micro_batches: int) -> TaskPicker:
    """1F1B, interleaved if devices have several stages (Narayanan et al. 2021, section 2.2).

    A device with several stages runs a group of micro-batches through one of them before the next. Groups have as many
    micro-batches as there are devices, or a few more, the larger ones first.
    """
    groups = max(1, micro_batches // devices)
    sizes = [micro_batches // groups + (number < micro_batches % groups) for number in range(groups)]
    ranges = [range(start, end) for start, end in pairwise(accumulate(sizes, initial=0))]
    forward = [Task(FORWARD, stage, number) for group in ranges for stage in local_stages for number in group]
    last_first = local_stages[::-1]
    backward = [Task(BACKWARD, stage, number) for group in ranges for stage in last_first for number in group]
    warmup = devices - 1 - device
    if len(local_stages) > 1:
        warmup = 2 * warmup + (len(local_stages) - 1) * sizes[0]
    paired = [task for pair in zip(forward[warmup:], backward, strict=False) for task in pair]
    return pick_in_order([*forward[:warmup], *paired, *backward[max(len(forward) - warmup, 0) :]])


def schedule_zero_bubble(_device: int, local_stages: Sequence[int], devices: int, micro_batches: int) -> TaskPicker:
    """ZB-V: stages in a V shape, and weight gradients delayed into the bubbles (Qi et al. 2024).

    Input gradients have priority over forwards, and later stages over earlier ones. A new micro-batch waits while the
    device holds as many as 1F1B would at most. Weight gradients are computed when nothing else is ready.
    """
    held = 0
    next_micro = dict.fromkeys(product((INPUT, FORWARD, WEIGHT), reversed(local_stages)), 0)

    def pick(done: Collection[Task], stages: int) -> Task | None:
        nonlocal held
        for (kind, stage), micro in next_micro.items():
            task = Task(kind, stage, micro)
            is_full = kind == FORWARD and stage == local_stages[0] and held >= 2 * devices
            if micro < micro_batches and not is_full and is_ready(task, done, stages):
                next_micro[kind, stage] += 1
                held += {FORWARD: 1, WEIGHT: -1}.get(kind, 0)
                return task
        return None

    return pick


SCHEDULES: dict[str, Callable[[int, Sequence[int], int, int], TaskPicker]] = {
    "gpipe": schedule_gpipe,
    "1f1b": schedule_1f1b,
    "interleaved": schedule_1f1b,
    "zbv": schedule_zero_bubble,
}
