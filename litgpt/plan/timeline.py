"""The memory of a step over its allocations, in few enough points to draw."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from litgpt.plan.allocations import Allocation, StepPhase

TIMELINE_POINTS = 500


@dataclass(frozen=True)
class Timeline:
    """What the memory of a device holds during a step.

    Attributes:
        events: numbers of the allocations and releases after which the memory is counted, from 0.
        parts: the bytes of each kind after each of them.
        phases: name, number from 1, and first and last event of each phase.
        last: number of events of the step.
    """

    events: list[int]
    parts: dict[str, list[int]]
    phases: list[tuple[str, int, int, int]]
    last: int


def build_timeline(allocations: Iterable[tuple[Allocation, str]], first: int, last: int) -> Timeline:
    """Count the memory after the events in [first, last), and keep the largest sums of as many neighbors.

    Args:
        allocations: each with its kind.
    """
    changes: dict[int, list[tuple[str, int]]] = {first: []}
    phases: dict[int, StepPhase] = {}
    kinds = set()
    for allocation, kind in allocations:
        if allocation.start >= last or (allocation.end is not None and allocation.end <= first):
            continue
        kinds.add(kind)
        changes.setdefault(max(first, allocation.start), []).append((kind, allocation.bytes))
        if allocation.end is not None and allocation.end < last:
            changes.setdefault(allocation.end, []).append((kind, -allocation.bytes))
        if allocation.phase.start >= first:
            phases[allocation.phase.start] = allocation.phase
    size = -(-len(changes) // TIMELINE_POINTS)
    events: list[int] = []
    parts: dict[str, list[int]] = {kind: [] for kind in kinds}
    now = dict.fromkeys(kinds, 0)
    best = (-1, first, now)
    for index, event in enumerate(sorted(changes)):
        for kind, change in changes[event]:
            now[kind] += change
        if (total := sum(now.values())) > best[0]:
            best = (total, event, dict(now))
        if (index + 1) % size == 0 or index + 1 == len(changes):
            events.append(best[1] - first)
            for kind, values in parts.items():
                values.append(best[2][kind])
            best = (-1, first, now)
    return Timeline(events, parts, list_phases(list(phases.values()), first, last), last - first)


def list_phases(phases: Sequence[StepPhase], first: int, last: int) -> list[tuple[str, int, int, int]]:
    """Name, number among those of its name, and first and last event of phases, in order."""
    counts: dict[str, int] = {}
    rows = []
    for phase in sorted(phases, key=lambda phase: phase.start):
        counts[phase.name] = counts.get(phase.name, 0) + 1
        end = last if phase.end is None else min(phase.end, last)
        rows.append((phase.name, counts[phase.name], phase.start - first, end - first))
    return rows
