"""Pipeline parallelism: every device has some layers, and micro-batches pass through all devices one after the other.

Axes: B batch, P tokens of this process, D model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from litgpt.model.gpt import GPT, MissingLayer
from litgpt.parallel.mesh import Mesh
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
    assign_stages,
    build_schedule,
    split_layers,
)
from litgpt.recipe.parallel import ParallelArgs

build_schedule_cached = cache(build_schedule)


@dataclass(frozen=True)
class Stage:
    """Some layers of a model and what came out of those before; is called as the whole model would be.

    Attributes:
        layers: gives the hidden states (B, P, D) after these, or, if they are the `last`, what the model gives.
        hidden_BPD: of the layers before, if there are such.
    """

    model: GPT
    layers: range
    last: bool
    hidden_BPD: Tensor | None = None

    def __call__(self, ids_BT: Tensor, **named: Any) -> Any:
        return self.model(ids_BT, layers=self.layers, hidden_BTD=self.hidden_BPD, **named)


StageFunction = Callable[[Stage, int], Tensor]


class Pipeline:
    """The stages of a model that lie here, and how micro-batches pass through all of them.

    Attributes:
        local_stages: numbers of the stages that lie here.
        needs_sync_each: whether parameters are gathered for every micro-batch anew.
        tied_copies: names of the parameters that another device has too, and keeps: those of the embedding beside the
            last layers, if it is tied to the head.
    """

    def __init__(self, model: GPT, mesh: Mesh, settings: ParallelArgs, dtype: torch.dtype) -> None:
        """Take out of a model what lies elsewhere.

        Args:
            model: whole, on the meta device.
            dtype: of hidden states.

        Raises:
            UserError: if the layers do not go round.
        """
        self.model, self.dtype = model, dtype
        self.schedule, self.devices = settings.pipeline_schedule, mesh.dims.pipeline
        self.needs_sync_each = settings.level == 3
        self.sequence_shards = mesh.dims.tensor if settings.sequence else 1
        self.layers = split_layers(settings, model.config.n_layer)
        self.stages = len(self.layers)
        self.group, self.device = mesh.group("pipeline"), mesh.rank("pipeline")
        self.local_stages = assign_stages(self.schedule, self.device, self.devices, self.stages)
        self.owners = {
            stage: device
            for device in range(self.devices)
            for stage in assign_stages(self.schedule, device, self.devices, self.stages)
        }
        self.moving: list[tuple[dist.Work, Tensor]] = []
        self._remove_other_layers()
        shared = model.config.tie_embeddings and self.owners[0] != self.owners[self.stages - 1]
        self.has_tied_embedding = shared and self.device in (self.owners[0], self.owners[self.stages - 1])
        copied = self.has_tied_embedding and self.has_last
        self.tied_copies = frozenset(self._embedding() if copied else ())

    @property
    def has_last(self) -> bool:
        """Whether losses and scores are computed here."""
        return self.stages - 1 in self.local_stages

    def _remove_other_layers(self) -> None:
        model, first, last = self.model, 0 in self.local_stages, self.has_last
        here = {layer for stage in self.local_stages for layer in self.layers[stage]}
        for layer in range(len(model.blocks)):
            if layer not in here:
                model.blocks[layer] = MissingLayer()
        needed = {
            "embedding": first or (last and model.config.tie_embeddings),
            "position_embedding": first,
            "norm": last,
            "head": last,
        }
        for name, kept in needed.items():
            if getattr(model, name) is not None and not kept:
                setattr(model, name, MissingLayer())

    def _embedding(self) -> dict[str, nn.Parameter]:
        return {f"embedding.{name}": parameter for name, parameter in self.model.embedding.named_parameters()}

    def step(self, shapes: Sequence[torch.Size], run: StageFunction) -> None:
        """Forward and backward of micro-batches; leaves gradients on the parameters.

        All ranks of the pipeline have the same batches and call it together.

        Args:
            shapes: (B, P) of the local tokens of each micro-batch; they may differ.
            run: what a stage makes of the micro-batch of a number: hidden states, or the loss.
        """
        runner = ScheduleRunner(self, shapes, run, self.first_trained_stage())
        for task in build_schedule_cached(self.schedule, self.devices, self.stages, len(shapes))[self.device]:
            runner.run_task(task)
        self.wait_sends()

    def evaluate(self, shape: torch.Size, run: Callable[[Stage], Any]) -> Any:
        """One micro-batch forward; what the last stage makes of it, None where that does not lie.

        A device does not wait for those after it, so that several of these overlap.
        """
        made = None
        for stage in self.local_stages:
            if stage and self.owners[stage - 1] != self.device:
                made, work = self.receive(shape, stage - 1, 0)
                work.wait()
            made = run(self.build_stage(stage, made))
            if stage + 1 < self.stages and self.owners[stage + 1] != self.device:
                self.send(made, stage + 1, 0)
                made = None
        return made

    def build_stage(self, number: int, hidden_BPD: Tensor | None) -> Stage:
        """A stage with what comes in."""
        return Stage(self.model, self.layers[number], number == self.stages - 1, hidden_BPD)

    def send(self, tensor: Tensor, stage: int, tag: int) -> None:
        """Begin to send something to a stage; what was sent long ago is then known to have arrived."""
        if len(self.moving) >= 2 * self.stages:
            self.moving.pop(0)[0].wait()
        sent = tensor.detach().to(self.dtype).contiguous()
        work = dist.isend(sent, group=self.group, group_dst=self.owners[stage], tag=tag)
        assert work is not None
        self.moving.append((work, sent))

    def receive(self, shape: torch.Size, stage: int, tag: int) -> tuple[Tensor, dist.Work]:
        """Begin to receive hidden states, or their gradient, of a micro-batch of this shape from a stage."""
        rows, tokens = self.tokens(shape)
        device = next(self.model.parameters()).device
        buffer = torch.empty(rows, tokens, self.model.config.n_embd, dtype=self.dtype, device=device)
        work = dist.irecv(buffer, group=self.group, group_src=self.owners[stage], tag=tag)
        assert work is not None
        return buffer, work

    def tokens(self, shape: torch.Size) -> tuple[int, int]:
        """Rows and tokens of the hidden states between blocks for a micro-batch of this shape."""
        return shape[0], shape[1] // self.sequence_shards

    def wait_sends(self) -> None:
        """Wait until what was sent has arrived."""
        while self.moving:
            self.moving.pop(0)[0].wait()

    def first_trained_stage(self) -> int:
        """The first stage that trains anything; those before need no backward. As many as there are, if none does."""
        trains = [stage for stage in self.local_stages if any(p.requires_grad for p in self.stage_parameters(stage))]
        device = next(self.model.parameters()).device
        first = torch.tensor(min(trains, default=self.stages), device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=self.group)
        return int(first)

    def stage_parameters(self, stage: int) -> list[nn.Parameter]:
        """What a stage computes with."""
        model = self.model
        parts: list[nn.Module | None] = [model.blocks[layer] for layer in self.layers[stage]]
        if stage == 0:
            parts += [model.embedding, model.position_embedding]
        if stage == self.stages - 1:
            parts += [model.norm, model.embedding if model.config.tie_embeddings else model.head]
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def sum_tied_gradients(self) -> None:
        """Add up the gradients of parameters that lie on two devices."""
        if not self.has_tied_embedding:
            return
        other = self.owners[0] if self.has_last else self.owners[self.stages - 1]
        for parameter in self._embedding().values():
            if parameter.requires_grad:
                here = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                local = getattr(here, "_local_tensor", here)
                there = torch.empty_like(local)
                moves = [
                    dist.P2POp(dist.isend, local, group=self.group, group_peer=other),
                    dist.P2POp(dist.irecv, there, group=self.group, group_peer=other),
                ]
                for work in dist.batch_isend_irecv(moves):
                    work.wait()
                local += there
                parameter.grad = here

    def reduce_norm(self, norm: Tensor) -> Tensor:
        """The norm over all stages, of norms over what each has."""
        square = norm.to(next(self.model.parameters()).device).double().square()  # not all stages have gradients
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def broadcast_from_last(self, number: int) -> int:
        """A number that those who have the last stage know, on all."""
        told = torch.tensor(number, device=next(self.model.parameters()).device)
        dist.broadcast(told, group=self.group, group_src=self.owners[self.stages - 1])
        return int(told)


class ScheduleRunner:
    """The way of one step's micro-batches through the stages of a device.

    What is known of a micro-batch at a stage lies under (stage, number) until it is no longer needed.
    """

    def __init__(self, pipeline: Pipeline, shapes: Sequence[torch.Size], run: StageFunction, first: int) -> None:
        self.pipeline, self.shapes, self.run, self.first = pipeline, shapes, run, first
        self.arriving: dict[Task, tuple[Tensor, dist.Work | None]] = {}
        self.graphs: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.input_grads: dict[tuple[int, int], Tensor] = {}
        self.split: dict[tuple[int, int], Any] = {}
        self.actions: dict[str, Callable[[int, int], None]] = {
            FORWARD: self.forward,
            BACKWARD: self.backward,
            INPUT: self.backward_input,
            WEIGHT: self.backward_weight,
            SEND: self.send,
            RECEIVE: self.receive,
            SEND_GRAD: self.send_grad,
            RECEIVE_GRAD: self.receive_grad,
        }

    def run_task(self, task: Task) -> None:
        """Do one task."""
        self.actions[task.kind](task.stage, task.micro)

    def tag(self, kind: str, stage: int, number: int) -> int:
        """A number that no other move of the step has."""
        return 1 + (number * self.pipeline.stages + stage) * 2 + (kind == RECEIVE_GRAD)

    def wait_received(self, kind: str, stage: int, number: int) -> Tensor:
        """What was received, once it is there."""
        tensor, work = self.arriving.pop(Task(kind, stage, number))
        if work is not None:
            work.wait()
        return tensor

    def pass_locally(self, kind: str, stage: int, number: int, tensor: Tensor) -> None:
        """Give something to a stage if that lies here; what lies elsewhere is sent when it is time."""
        if stage in self.pipeline.local_stages:
            self.arriving[Task(kind, stage, number)] = (tensor, None)

    def forward(self, stage: int, number: int) -> None:
        """Let a stage run; what enters it is a leaf of its own graph."""
        hidden = None
        if stage:
            hidden = self.wait_received(RECEIVE, stage, number).requires_grad_(stage > self.first)
        made = self.run(self.pipeline.build_stage(stage, hidden), number)
        self.graphs[stage, number] = (hidden, made)
        if stage < self.pipeline.stages - 1:
            self.pass_locally(RECEIVE, stage + 1, number, made.detach())

    def backward(self, stage: int, number: int) -> None:
        """Gradients of a stage's weights and of what entered it."""
        if stage < self.first:
            del self.graphs[stage, number]
            return
        hidden, made = self.graphs.pop((stage, number))
        made.backward(self.output_grad(stage, number))
        if hidden is not None and hidden.requires_grad:
            self._pass_grad(stage, number, hidden)

    def backward_input(self, stage: int, number: int) -> None:
        """The gradient of what entered a stage; where that has none, all is left for `backward_weight`."""
        if stage <= self.first:
            return
        hidden, made = self.graphs.pop((stage, number))
        assert hidden is not None
        grad = self.output_grad(stage, number)
        weights = self.trained_parameters(stage)
        _, groups = stage_backward_input([made], None if grad is None else [grad], [hidden], iter(weights))
        self.split[stage, number] = groups
        self._pass_grad(stage, number, hidden)

    def backward_weight(self, stage: int, number: int) -> None:
        """The gradients of a stage's weights."""
        if stage <= self.first:
            self.backward(stage, number)
        else:
            stage_backward_weight(iter(self.trained_parameters(stage)), self.split.pop((stage, number)))

    def trained_parameters(self, stage: int) -> list[nn.Parameter]:
        """What is trained of a stage."""
        return [parameter for parameter in self.pipeline.stage_parameters(stage) if parameter.requires_grad]

    def output_grad(self, stage: int, number: int) -> Tensor | None:
        """The gradient of what a stage gave; none for the loss."""
        return None if stage == self.pipeline.stages - 1 else self.wait_received(RECEIVE_GRAD, stage, number)

    def _pass_grad(self, stage: int, number: int, hidden: Tensor) -> None:
        grad = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
        if stage - 1 not in self.pipeline.local_stages:
            self.input_grads[stage, number] = grad
        self.pass_locally(RECEIVE_GRAD, stage - 1, number, grad)

    def send(self, stage: int, number: int) -> None:
        """Begin to send what a stage gave."""
        _, made = self.graphs[stage, number]
        self.pipeline.send(made, stage + 1, self.tag(RECEIVE, stage + 1, number))

    def receive(self, stage: int, number: int) -> None:
        """Begin to receive what the stage before gave."""
        tag = self.tag(RECEIVE, stage, number)
        self.arriving[Task(RECEIVE, stage, number)] = self.pipeline.receive(self.shapes[number], stage - 1, tag)

    def send_grad(self, stage: int, number: int) -> None:
        """Begin to send the gradient of what entered a stage."""
        if stage > self.first:
            grad = self.input_grads.pop((stage, number))
            self.pipeline.send(grad, stage - 1, self.tag(RECEIVE_GRAD, stage - 1, number))

    def receive_grad(self, stage: int, number: int) -> None:
        """Begin to receive the gradient of what a stage gave."""
        if stage >= self.first:
            tag = self.tag(RECEIVE_GRAD, stage, number)
            self.arriving[Task(RECEIVE_GRAD, stage, number)] = self.pipeline.receive(
                self.shapes[number], stage + 1, tag
            )
