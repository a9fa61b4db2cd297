"""Estimate the time of a training step of a pipeline, by running its schedule with the times of its stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from litgpt.parallel.schedules import (
    BACKWARD,
    FORWARD,
    INPUT,
    WEIGHT,
    Task,
    assign_devices,
    build_pipeline_schedule,
)
from litgpt.plan.operations import Operation
from litgpt.plan.step_time import TIME_PARTS, Machine, PhaseTime, add_up


@dataclass(frozen=True)
class DeviceTime:
    """Seconds of a device of a pipeline.

    Attributes:
        forward, backward: of all stages of the device, for one micro-batch.
        once: of a step, apart from these.
        transfer: of hidden states to another device.
    """

    forward: PhaseTime
    backward: PhaseTime
    once: PhaseTime
    transfer: float

    def compute_tasks(self, stages: int) -> dict[str, float]:
        """Seconds of each kind of task of one of the device's stages, which are taken to be equal."""
        forward, backward = (time.total() / stages for time in (self.forward, self.backward))
        return {FORWARD: forward, BACKWARD: backward, INPUT: backward / 2, WEIGHT: backward / 2}


def measure_device(operations: Sequence[Operation], machine: Machine, *, planned: int, syncs_each: bool) -> DeviceTime:
    """Add up the operations of a device.

    Args:
        operations: of a step of `planned` micro-batches.
        syncs_each: whether parameters are gathered for every micro-batch, and not once in a step.
    """
    passes = [o for o in operations if o.phase == "forward_backward"]
    often = [o for o in passes if syncs_each or not o.overlaps]
    forward, backward = (
        divide(add_up((o for o in often if o.backward == is_backward), machine), planned)
        for is_backward in (False, True)
    )
    once = add_up((o for o in operations if o.phase != "forward_backward"), machine)
    if not syncs_each:
        synchronization = add_up((o for o in passes if o.overlaps), machine)
        once.collectives += max(0.0, synchronization.overlapped - forward.total() - backward.total())
    return DeviceTime(forward, backward, once, max([0.0, *forward.transfers, *backward.transfers]))


def divide(time: PhaseTime, count: int) -> PhaseTime:
    """The time of one of several equal micro-batches."""
    computation = {kind: seconds / count for kind, seconds in time.computation.items()}
    overlapped = time.overlapped / count
    return PhaseTime(computation, time.collectives / count, overlapped, transfers=time.transfers)


def estimate_pipeline_step(
    devices: Sequence[DeviceTime], *, schedule: str, stages: int, micro_batches: int
) -> dict[str, float]:
    """Seconds of a step by `TIME_PARTS`, of which the bubble is what the busiest device waits for others.

    Args:
        schedule: name of the pipeline schedule.
        stages: of all devices.
    """
    end = run_schedule(devices, schedule, stages, micro_batches)

    def busy(device: DeviceTime) -> float:
        return micro_batches * (device.forward.total() + device.backward.total())

    busiest = max(devices, key=busy)
    parts = dict.fromkeys(TIME_PARTS, 0.0)
    for time in (busiest.forward, busiest.backward):
        time.add_to(parts, micro_batches)
    parts["bubble"] = end - busy(busiest)
    max((device.once for device in devices), key=PhaseTime.total).add_to(parts)
    return parts


def run_schedule(devices: Sequence[DeviceTime], schedule: str, stages: int, micro_batches: int) -> float:
    """The time at which the last device is done with its tasks, each of which starts once those it needs are done."""
    owners = assign_devices(schedule, len(devices), stages)
    seconds = [device.compute_tasks(stages // len(devices)) for device in devices]
    queues = [
        [task for task in tasks if task.kind in seconds[0]]
        for tasks in build_pipeline_schedule(schedule, len(devices), stages, micro_batches)
    ]
    ends: dict[Task, float] = {}
    clocks, positions = [0.0] * len(devices), [0] * len(devices)
    while any(position < len(queue) for position, queue in zip(positions, queues, strict=True)):
        for device, queue in enumerate(queues):
            while positions[device] < len(queue):
                task = queue[positions[device]]
                start = find_arrival(task, ends, stages, owners, devices)
                if start is None:
                    break
                clocks[device] = ends[task] = max(start, clocks[device]) + seconds[device][task.kind]
                positions[device] += 1
    return max(clocks)


def find_arrival(
    task: Task, ends: Mapping[Task, float], stages: int, owners: Sequence[int], devices: Sequence[DeviceTime]
) -> float | None:
    """When what a task needs has arrived; None if some of it is not done."""
    kind, stage, micro = task
    needed = []
    if kind == WEIGHT:
        needed.append(Task(INPUT, stage, micro))
    elif kind == FORWARD:
        needed += [Task(FORWARD, stage - 1, micro)] if stage else []
    else:
        needed += [Task(FORWARD, stage, micro), *([Task(kind, stage + 1, micro)] if stage + 1 < stages else [])]
    if any(other not in ends for other in needed):
        return None
    arrivals = [
        ends[other] + (devices[owners[other.stage]].transfer if owners[other.stage] != owners[stage] else 0.0)
        for other in needed
    ]
    return max(arrivals, default=0.0)
