"""Pipeline parallelism: each device has some of the layers, and micro-batches pass through all devices.

Axes: B batch, P tokens of this rank, D model width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from litgpt.model.gpt import GPT, MissingLayer
from litgpt.model.media import Media
from litgpt.parallel import schedules
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.model_sizes import assign_layers
from litgpt.parallel.schedules import RECEIVE, RECEIVE_GRAD, Task
from litgpt.recipe.parallel import ParallelArgs


@dataclass(frozen=True)
class Stage:
    """A pipeline stage with its input; called like the whole model.

    Attributes:
        layers: the blocks of the stage, which returns their hidden states (B, P, D).
        last: whether it returns the model's output instead.
        hidden_BPD: hidden states of the stage before; None for the first stage.
    """

    model: GPT
    layers: range
    last: bool
    hidden_BPD: Tensor | None = None

    def __call__(self, ids_BT: Tensor, *, media: Media | None = None, **named: Any) -> Any:
        """Run the stage on ids of a micro-batch, (B, T); only the first one reads its media."""
        media = None if self.layers.start else media
        return self.model(ids_BT, layers=self.layers, hidden_BTD=self.hidden_BPD, media=media, **named)


StageFunction = Callable[[Stage, int], Tensor]
"""Given a stage and the number of a micro-batch, the stage's hidden states, or the loss for the last stage."""


class Pipeline:
    """The stages of a model on this device, and the transfers to the others.

    Attributes:
        local_stages: the indices of this device's stages.
        predicts: whether the last stage runs prediction layers in training.
        needs_sync_each: whether parameters are resharded, and gradients reduced, after every micro-batch.
        tied_copies: names of the parameters that are copies of another device's: those of the embedding on the last
            device, if its head or its prediction layers use it.
    """

    def __init__(self, model: GPT, mesh: Mesh, settings: ParallelArgs, dtype: torch.dtype) -> None:
        """Remove the other devices' layers from a model.

        Args:
            model: the whole model, on the meta device.
            dtype: type of the hidden states that are sent.

        Raises:
            UserError: if the settings do not fit the number of layers.
        """
        self.model, self.dtype = model, dtype
        self.schedule, self.devices = settings.pipeline_schedule, mesh.dims.pipeline
        self.needs_sync_each = settings.level == 3
        self.sequence_shards = mesh.dims.tensor if settings.sequence else 1
        self.layers = assign_layers(settings, model.config, model.config.n_layer)
        self.stages = len(self.layers)
        self.group, self.device = mesh.group("pipeline"), mesh.rank("pipeline")
        self.owners = schedules.assign_devices(self.schedule, self.devices, self.stages)
        self.local_stages = [stage for stage in range(self.stages) if self.owners[stage] == self.device]
        self.sending: list[tuple[dist.Work, Tensor]] = []
        self.predicts = model.trains_predictions
        self.embeds_twice = model.config.tie_embeddings or self.predicts
        self._remove_other_layers()
        is_split = self.embeds_twice and self.owners[0] != self.owners[self.stages - 1]
        self.has_tied_embedding = is_split and self.device in (self.owners[0], self.owners[self.stages - 1])
        self.tied_copies = frozenset(self._embedding() if self.has_tied_embedding and self.has_last else ())

    @property
    def has_last(self) -> bool:
        """Whether this device has the last stage, and so computes losses and logits."""
        return self.stages - 1 in self.local_stages

    def _remove_other_layers(self) -> None:
        model, first, last = self.model, 0 in self.local_stages, self.has_last
        local_layers = {layer for stage in self.local_stages for layer in self.list_blocks(stage)}
        for layer in range(len(model.blocks)):
            if layer not in local_layers:
                model.blocks[layer] = MissingLayer()
        is_needed = {
            "embedding": first or (last and self.embeds_twice),
            "position_embedding": first,
            "vision": first,
            "audio": first,
            "norm": last,
            "head": last,
            "score": last,
        }
        for name, needed in is_needed.items():
            if getattr(model, name) is not None and not needed:
                setattr(model, name, MissingLayer())

    def list_blocks(self, stage: int) -> list[int]:
        """The numbers of a stage's blocks: its layers and, for the last one, the prediction layers."""
        config = self.model.config
        predictions = range(config.n_layer, config.n_blocks) if stage == self.stages - 1 else ()
        return [*self.layers[stage], *predictions]

    def _embedding(self) -> dict[str, nn.Parameter]:
        return {f"embedding.{name}": parameter for name, parameter in self.model.embedding.named_parameters()}

    def step(self, shapes: Sequence[torch.Size], run: StageFunction) -> None:
        """Run forward and backward of all micro-batches of a step, which accumulates gradients in the parameters.

        All ranks of the pipeline have the same batches, and call this together.

        Args:
            shapes: (B, P) of the local tokens of each micro-batch; they may differ.
            run: runs a stage on a micro-batch.
        """
        runner = ScheduleRunner(self, shapes, run, self.first_trained_stage())
        tasks = schedules.build_pipeline_schedule(self.schedule, self.devices, self.stages, len(shapes))[self.device]
        for kind, stage, micro in tasks:
            getattr(runner, kind)(stage, micro)
        self.wait_sends()

    def evaluate(self, shape: torch.Size, run: Callable[[Stage], Any]) -> Any:
        """Run one micro-batch forward.

        A device does not wait for the next one, so that several calls overlap.

        Returns:
            what `run` returns for the last stage; None on devices without it.
        """
        output = None
        for stage in self.local_stages:
            if stage and self.owners[stage - 1] != self.device:
                output, work = self.receive(shape, stage - 1, 0)
                work.wait()
            output = run(self.build_stage(stage, output))
            if stage + 1 < self.stages and self.owners[stage + 1] != self.device:
                self.send(output, stage + 1, 0)
                output = None
        return output

    def build_stage(self, stage: int, hidden_BPD: Tensor | None) -> Stage:
        """A stage with its input."""
        return Stage(self.model, self.layers[stage], stage == self.stages - 1, hidden_BPD)

    def send(self, tensor: Tensor, stage: int, tag: int) -> None:
        """Start to send a tensor to a stage, after freeing what has arrived, and waiting for the rest if it is much."""
        while self.sending and (self.sending[0][0].is_completed() or len(self.sending) >= 2 * self.stages):
            self.sending.pop(0)[0].wait()
        buffer = tensor.detach().to(self.dtype).contiguous()
        work = dist.isend(buffer, group=self.group, group_dst=self.owners[stage], tag=tag)
        assert work is not None
        self.sending.append((work, buffer))

    def receive(self, shape: torch.Size, stage: int, tag: int) -> tuple[Tensor, dist.Work]:
        """Start to receive hidden states, or their gradient, of a micro-batch of shape (B, P) from a stage."""
        hidden_shape = (shape[0], shape[1] // self.sequence_shards, self.model.config.n_embd)
        buffer = torch.empty(hidden_shape, dtype=self.dtype, device=next(self.model.parameters()).device)
        work = dist.irecv(buffer, group=self.group, group_src=self.owners[stage], tag=tag)
        assert work is not None
        return buffer, work

    def wait_sends(self) -> None:
        """Wait until everything that was sent has arrived."""
        while self.sending:
            self.sending.pop(0)[0].wait()

    def first_trained_stage(self) -> int:
        """The first stage with trained parameters, before which no backward is needed; if none has, their number."""
        trained = [stage for stage in self.local_stages if self.trained_parameters(stage)]
        first = torch.tensor(min(trained, default=self.stages), device=next(self.model.parameters()).device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=self.group)
        return int(first)

    def trained_parameters(self, stage: int) -> list[nn.Parameter]:
        """The trained parameters of a stage."""
        model = self.model
        modules: list[nn.Module | None] = [model.blocks[layer] for layer in self.list_blocks(stage)]
        if stage == 0:
            modules += [model.embedding, model.position_embedding, model.vision, model.audio]
        if stage == self.stages - 1:
            modules += [model.norm, model.score, model.head, model.embedding if self.embeds_twice else None]
        return [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]

    def sum_tied_gradients(self) -> None:
        """Sum the gradients of an embedding that is on two devices."""
        if not self.has_tied_embedding:
            return
        other = self.owners[0] if self.has_last else self.owners[self.stages - 1]
        for parameter in self._embedding().values():
            if parameter.requires_grad:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                local = getattr(grad, "_local_tensor", grad)
                received = torch.empty_like(local)
                transfers = [
                    dist.P2POp(dist.isend, local, group=self.group, group_peer=other),
                    dist.P2POp(dist.irecv, received, group=self.group, group_peer=other),
                ]
                for work in dist.batch_isend_irecv(transfers):
                    work.wait()
                local += received
                parameter.grad = grad

    def reduce_norm(self, norm: Tensor) -> Tensor:
        """The gradient norm over all stages, from the norm of each."""
        device = next(self.model.parameters()).device  # the norm of a stage without gradients is on the CPU
        square = norm.to(device).double().square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    def broadcast_from_last(self, number: int) -> int:
        """Broadcast a number from the device of the last stage to all devices."""
        value = torch.tensor(number, device=next(self.model.parameters()).device)
        dist.broadcast(value, group=self.group, group_src=self.owners[self.stages - 1])
        return int(value)


class ScheduleRunner:
    """Runs a device's tasks of one step.

    Attributes:
        received: tensors that have arrived, or will when their work is done, by the task that receives them.
        graphs: input and output of each forward whose backward is not done, by (stage, micro-batch).
        input_grads: gradients to send to other devices, by (stage, micro-batch).
        weight_groups: what `stage_backward_weight` needs, by (stage, micro-batch).
    """

    def __init__(self, pipeline: Pipeline, shapes: Sequence[torch.Size], run: StageFunction, first: int) -> None:
        self.pipeline, self.shapes, self.run, self.first = pipeline, shapes, run, first
        self.received: dict[Task, tuple[Tensor, dist.Work | None]] = {}
        self.graphs: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.input_grads: dict[tuple[int, int], Tensor] = {}
        self.weight_groups: dict[tuple[int, int], Any] = {}

    def tag(self, kind: str, stage: int, micro: int) -> int:
        """A tag that no other transfer of the step has."""
        return 1 + (micro * self.pipeline.stages + stage) * 2 + (kind == RECEIVE_GRAD)

    def wait_received(self, kind: str, stage: int, micro: int) -> Tensor:
        """A received tensor, once it has arrived."""
        tensor, work = self.received.pop(Task(kind, stage, micro))
        if work is not None:
            work.wait()
        return tensor

    def pass_locally(self, kind: str, stage: int, micro: int, tensor: Tensor) -> None:
        """Pass a tensor to a stage if it is on this device; the others get it by a task of its own."""
        if stage in self.pipeline.local_stages:
            self.received[Task(kind, stage, micro)] = (tensor, None)

    def forward(self, stage: int, micro: int) -> None:
        """Run a stage; its input is a leaf of the stage's own graph."""
        hidden = self.wait_received(RECEIVE, stage, micro).requires_grad_(stage > self.first) if stage else None
        output = self.run(self.pipeline.build_stage(stage, hidden), micro)
        self.graphs[stage, micro] = (hidden, output)
        if stage < self.pipeline.stages - 1:
            self.pass_locally(RECEIVE, stage + 1, micro, output.detach())

    def backward(self, stage: int, micro: int) -> None:
        """Compute the gradients of a stage's parameters and of its input."""
        if stage < self.first:
            del self.graphs[stage, micro]
            return
        hidden, output = self.graphs.pop((stage, micro))
        output.backward(self.output_grad(stage, micro))
        if hidden is not None and hidden.requires_grad:
            self._pass_grad(stage, micro, hidden)

    def backward_input(self, stage: int, micro: int) -> None:
        """Compute the gradient of a stage's input; if it needs none, `backward_weight` runs the whole backward."""
        if stage <= self.first:
            return
        if self.has_other_inputs(stage):
            self.backward(stage, micro)
            return
        hidden, output = self.graphs.pop((stage, micro))
        assert hidden is not None
        grad = self.output_grad(stage, micro)
        weights = iter(self.pipeline.trained_parameters(stage))
        _, groups = stage_backward_input([output], None if grad is None else [grad], [hidden], weights)
        self.weight_groups[stage, micro] = groups
        self._pass_grad(stage, micro, hidden)

    def backward_weight(self, stage: int, micro: int) -> None:
        """Compute the gradients of a stage's parameters."""
        if stage <= self.first:
            self.backward(stage, micro)
        elif not self.has_other_inputs(stage):
            weights = iter(self.pipeline.trained_parameters(stage))
            stage_backward_weight(weights, self.weight_groups.pop((stage, micro)))

    def has_other_inputs(self, stage: int) -> bool:
        """Whether a stage embeds later tokens, which `stage_backward_weight` does not support."""
        return self.pipeline.predicts and stage == self.pipeline.stages - 1

    def output_grad(self, stage: int, micro: int) -> Tensor | None:
        """The gradient of a stage's output; None for the loss."""
        return None if stage == self.pipeline.stages - 1 else self.wait_received(RECEIVE_GRAD, stage, micro)

    def _pass_grad(self, stage: int, micro: int, hidden: Tensor) -> None:
        grad = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
        if stage - 1 not in self.pipeline.local_stages:
            self.input_grads[stage, micro] = grad
        self.pass_locally(RECEIVE_GRAD, stage - 1, micro, grad)

    def send(self, stage: int, micro: int) -> None:
        """Start to send a stage's output."""
        _, output = self.graphs[stage, micro]
        self.pipeline.send(output, stage + 1, self.tag(RECEIVE, stage + 1, micro))

    def receive(self, stage: int, micro: int) -> None:
        """Start to receive the output of the stage before."""
        tag = self.tag(RECEIVE, stage, micro)
        self.received[Task(RECEIVE, stage, micro)] = self.pipeline.receive(self.shapes[micro], stage - 1, tag)

    def send_grad(self, stage: int, micro: int) -> None:
        """Start to send the gradient of a stage's input."""
        if stage > self.first:
            grad = self.input_grads.pop((stage, micro))
            self.pipeline.send(grad, stage - 1, self.tag(RECEIVE_GRAD, stage - 1, micro))

    def receive_grad(self, stage: int, micro: int) -> None:
        """Start to receive the gradient of a stage's output."""
        if stage >= self.first:
            tag = self.tag(RECEIVE_GRAD, stage, micro)
            transfer = self.pipeline.receive(self.shapes[micro], stage + 1, tag)
            self.received[Task(RECEIVE_GRAD, stage, micro)] = transfer
