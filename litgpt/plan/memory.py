"""The memory of a training step by what it holds, from the step itself."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from litgpt.data.stream.batch import Batch
from litgpt.model.gpt import GPT
from litgpt.parallel.apply import list_gathered_parameters
from litgpt.parallel.mesh import Mesh
from litgpt.plan.accelerator_paths import accelerator_paths
from litgpt.plan.allocations import HOST, Allocation, AllocationRecorder, find_peak, list_in_use
from litgpt.plan.batches import build_batches, rated_rows
from litgpt.plan.fake_tensors import fake_tensors
from litgpt.plan.host_memory import list_offloaded_states, mark_host_copies
from litgpt.plan.operations import OperationRecorder
from litgpt.plan.planned_media import PlannedMedia, placed_media
from litgpt.plan.routed_rows import RoutedRows
from litgpt.plan.timeline import Timeline, build_timeline
from litgpt.recipe.training import Training
from litgpt.store.adapters.folder import is_adapter
from litgpt.train.build_state import build_meta_model, build_train_state
from litgpt.train.initial_weights import find_trained_names, hold_reference
from litgpt.train.objective import Objective
from litgpt.train.objectives import build_objective
from litgpt.train.reference import Reference, copy_values
from litgpt.train.run_spec import RunSpec
from litgpt.train.step import train_step
from litgpt.train.step_timers import StepTimers
from litgpt.train.train_state import TrainState

KINDS = (
    *("parameters", "gradients", "optimizer", "activations", "logits", "gathered_parameters", "communication"),
    *("reference", "temporary", "other"),
)
"""What the memory of a device holds."""


@dataclass(frozen=True)
class StepMemory:
    """The memory of one rank in a training step, when most of that of its device is in use.

    Attributes:
        peak: bytes.
        parts: the bytes of each of `KINDS` at that time.
        host: bytes of host memory, at the time when most of that is in use.
        phase: of the step, and the number of its micro-batch, from 1.
        op, shape, op_bytes: the operation that reached the peak, the shape of its result, and its bytes.
        timeline: of the whole step.
    """

    peak: int
    parts: dict[str, int]
    host: int
    phase: str
    micro_batch: int
    op: str
    shape: tuple[int, ...]
    op_bytes: int
    timeline: Timeline


class PhaseTimers(StepTimers):
    """Tells a recorder of allocations in which phase a step is, and what the gradients are after each backward pass."""

    def __init__(self, recorder: AllocationRecorder, state: TrainState) -> None:
        super().__init__(state.device)
        self.recorder, self.state = recorder, state

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Name the phase in the block."""
        with self.recorder.enter_phase(phase):
            yield
        if "backward" in phase:
            self.recorder.mark("gradients", [parameter.grad for parameter in self.state.parameters()])


def plan_step_memory(
    recipe: Training,
    spec: RunSpec,
    mesh: Mesh | None,
    *,
    length: int,
    steps: int,
    micro_batches: int,
    routed: RoutedRows | None = None,
    operations: OperationRecorder | None = None,
    media: PlannedMedia | None = None,
) -> StepMemory:
    """Build a rank of a run on fake tensors, train it for a step, and count its memory.

    Args:
        mesh: of the rank; None for a single process.
        length: tokens per row.
        steps: of the whole run.
        micro_batches: of a step that is planned, as of `alike_ranks.AlikeRanks`.
        routed: the rows of experts; None for as many on each rank.
        operations: also records those of the step, for its time.
        media: of each row.
    """
    device = torch.device("cpu")
    with accelerator_paths():
        model = build_meta_model(recipe, spec, mesh, device)
    recorder = AllocationRecorder()
    applied, placed = (routed or RoutedRows()).applied(), placed_media(media, length)
    with accelerator_paths(), fake_tensors(), applied, placed, rated_rows(), recorder:
        built = leave_scores_ahead(spec)
        state = build_train_state(recipe, built, mesh, device, resumed=True, steps=steps, meta_model=model)
        if spec.needs_reference and not spec.scores_ahead:
            state.reference = allocate_reference(state.core, spec)
        batches = build_batches(recipe, spec, length, micro_batches, media)
        return record_step(
            recorder,
            state,
            batches,
            build_objective(recipe, spec, ()),
            max_norm=recipe.train.max_norm,
            host_kinds=list_host_kinds(recipe, spec),
            operations=operations,
        )


def allocate_reference(model: GPT, spec: RunSpec) -> Reference:
    """The weights of a reference, as `initial_weights.build_reference` keeps them: all those of another model."""
    settings = spec.preference
    assert settings is not None
    is_other = settings.reference is not None and not is_adapter(settings.reference)
    names = dict(model.named_parameters()) if is_other else find_trained_names(model)
    return hold_reference(copy_values(model, names, in_host_memory=settings.reference_offload), settings)


def leave_scores_ahead(spec: RunSpec) -> RunSpec:
    """The spec of a run whose reference has no scores yet that are computed ahead, which takes no part in the step."""
    if spec.preference is None:
        return spec
    return replace(spec, preference=replace(spec.preference, precompute_ref_log_probs=False))


def list_host_kinds(recipe: Training, spec: RunSpec) -> set[str]:
    """What a run keeps in host memory, of `HOST` and `KINDS`."""
    kinds = {HOST}
    if recipe.parallel.cpu_offload:
        kinds |= {"parameters", "gradients", "optimizer", "reference"}
    if spec.preference is not None and spec.preference.reference_offload:
        kinds.add("reference")
    return kinds


def record_step(
    recorder: AllocationRecorder,
    state: TrainState,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    max_norm: float | None,
    host_kinds: Collection[str] = (HOST,),
    operations: OperationRecorder | None = None,
) -> StepMemory:
    """Take a step in which the optimizers allocate their states, then another one, whose memory is counted.

    Args:
        recorder: is active.
        host_kinds: what is in host memory, from `list_host_kinds`.
        operations: also records those of the other step.
    """
    state.timers = PhaseTimers(recorder, state)
    state.begin_step(0)
    recorder.mark("parameters", [*state.core.parameters(), *state.core.buffers()])
    if state.reference is not None:
        recorder.mark("reference", state.reference.values.values())
    with mark_host_copies(recorder):
        train_step(state, batches[:1], objective, max_norm=max_norm)
        for optimizer in state.optimizers:
            recorder.mark(HOST, list_offloaded_states(optimizer))
            recorder.mark("optimizer", list_state_tensors(optimizer))
        recorder.mark("gathered_parameters", list_gathered_parameters(state.core))
        first = recorder.events
        with nullcontext() if operations is None else operations.of_step(lambda: recorder.phase, len(batches)):
            train_step(state, batches, objective, max_norm=max_norm)
    rows = state.core.config.padded_vocab_size or 0
    vocabularies = {rows} if state.mesh is None else {rows, -(-rows // state.mesh.dims.tensor)}
    return sum_by_kind(recorder.allocations, first, recorder.events, vocabularies=vocabularies, host_kinds=host_kinds)


def list_state_tensors(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The tensors of an optimizer's states, among other values."""
    return [value for state in optimizer.state.values() for value in tree_leaves(state)]


def sum_by_kind(
    allocations: Sequence[Allocation],
    first: int,
    last: int,
    *,
    vocabularies: Collection[int],
    host_kinds: Collection[str] = (HOST,),
) -> StepMemory:
    """Sum the allocations at the peak between two events by what they hold.

    Args:
        vocabularies: rows of the output matrix, which logits have as their last dimension, and of its shards.
        host_kinds: what is in host memory, whose peak is another one.
    """
    kinds = [classify(allocation, first, vocabularies) for allocation in allocations]
    of_device = []
    by_place: dict[bool, list[Allocation]] = {False: [], True: []}
    for allocation, kind in zip(allocations, kinds, strict=True):
        place = is_on_host(allocation, kind, host_kinds)
        by_place[place].append(allocation)
        if not place:
            of_device.append((allocation, kind))
    peak, host_peak = (find_peak(by_place[place], first, last) for place in (False, True))
    parts = dict.fromkeys(KINDS, 0)
    in_use = list_in_use(by_place[False], peak)
    for allocation in in_use:
        parts[classify(allocation, first, vocabularies)] += allocation.bytes
    latest = max(in_use, key=lambda allocation: allocation.start)
    return StepMemory(
        peak=sum(parts.values()),
        parts=parts,
        host=sum(allocation.bytes for allocation in list_in_use(by_place[True], host_peak)),
        phase=latest.phase.name,
        micro_batch=latest.phase.number,
        op=latest.op,
        shape=latest.shape,
        op_bytes=latest.bytes,
        timeline=build_timeline(of_device, first, last),
    )


def is_on_host(allocation: Allocation, kind: str, host_kinds: Collection[str]) -> bool:
    """Whether an allocation is in host memory, where optimizers also compute if they keep their states there."""
    is_of_update = kind == "temporary" and allocation.phase.name == "optimizer"
    return kind in host_kinds or (is_of_update and "optimizer" in host_kinds)


def classify(allocation: Allocation, first: int, vocabularies: Collection[int]) -> str:
    """What an allocation holds, one of `KINDS`.

    Args:
        first: the event at which the step began.
        vocabularies: as for `sum_by_kind`.
    """
    kind, phase = allocation.kind, allocation.phase
    if kind is not None:
        return kind
    if allocation.start < first:
        return "other"
    if allocation.shape and allocation.shape[-1] in vocabularies and phase.name != "optimizer":
        return "logits"
    is_saved = phase.name == "forward" and (allocation.end is None or allocation.end > (phase.end or first))
    # a backward pass records a graph only where it recomputes; that of a stage is not a phase of its own
    is_of_forward = phase.name in ("backward", "forward_backward") and allocation.records_graph
    if is_saved or is_of_forward:
        return "activations"
    return "communication" if allocation.is_sent else "temporary"
