"""The model, its layout and its optimizers, as a run trains them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.profiler import record_function

from litgpt.adapt.schedule import TunerSchedule
from litgpt.data.stream.batch import Batch
from litgpt.model.delayed_scaling import HISTORY_FILE, AmaxHistory
from litgpt.model.gpt import GPT
from litgpt.parallel import apply
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.pipeline import Pipeline
from litgpt.parallel.precision import Precision
from litgpt.parallel.token_sharding import LocalTokens
from litgpt.train.guard import LossScale
from litgpt.train.local_batch import LocalBatch, build_local_batch
from litgpt.train.reference import Reference
from litgpt.train.router_training import LOAD_FILE, RouterTrainer
from litgpt.train.step_timers import StepTimers
from litgpt.train.stored_scores import StoredScores


@dataclass
class TrainState:
    """A model, its layout and its optimizers.

    Attributes:
        mesh: None in a single process.
        reference: the weights that the objective compares the model with; None for none.
        reference_scores: what the reference has computed before training, in its place; None for none.
        tuner_schedule: what the tuner does in each step; None for nothing.
        timers: of the phases of steps; None to measure none.
        routers: trains the routers of a mixture of experts; None without experts.
    """

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    precision: Precision
    mesh: Mesh | None = None
    scale: LossScale = field(default_factory=lambda: LossScale(active=False))
    tuner_schedule: TunerSchedule | None = None
    reference: Reference | None = None
    reference_scores: StoredScores | None = None
    routers: RouterTrainer | None = None
    timers: StepTimers | None = None

    @property
    def counts_batch(self) -> bool:
        """Whether this rank counts its batch, which other ranks may share."""
        return self.mesh is None or self.mesh.is_batch_leader

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss is part of the sum over all ranks."""
        has_loss = self.pipeline is None or self.pipeline.has_last
        return has_loss and (self.mesh is None or self.mesh.is_loss_leader)

    @property
    def pipeline(self) -> Pipeline | None:
        """The pipeline over which the layers of the model are split; None without pipeline parallelism."""
        return getattr(self.core, "pipeline", None)

    @property
    def core(self) -> GPT:
        """The model without the DDP wrapper."""
        return cast(GPT, apply.unwrap_model(self.model))

    @property
    def local_tokens(self) -> LocalTokens | None:
        """The sharding of tokens over ranks, None if this rank computes all tokens of its batches."""
        return getattr(self.core, "local_tokens", None)

    @property
    def amax_history(self) -> AmaxHistory | None:
        """The values that delayed scales of FP8 are computed from; None without delayed scaling."""
        return getattr(self.core, "amax_history", None)

    def checkpoint_files(self) -> dict[str, str]:
        """What a checkpoint holds beside tensors and progress: the text of files by name; equal on all ranks."""
        return {HISTORY_FILE: self.amax_history.to_text()} if self.amax_history is not None else {}

    def load_files(self, folder: Path) -> None:
        """Load the files of a checkpoint, if it has them: others are of runs with another recipe of FP8."""
        if self.amax_history is not None and (folder / HISTORY_FILE).is_file():
            self.amax_history.load_text((folder / HISTORY_FILE).read_text(encoding="utf-8"))

    def to_device(self, batch: Batch) -> Batch:
        """Copy a micro-batch to this rank's device.

        In a pipeline, which has all micro-batches of a step there, the tower of the first stage copies their media.
        """
        if self.pipeline is None:
            return batch.to(self.device)
        return replace(replace(batch, media=None).to(self.device), media=batch.media)

    def local_batch(self, batch: Batch, *, cached: int = 0) -> LocalBatch:
        """This rank's tokens of a micro-batch, which is on the rank's device; as in `build_local_batch`."""
        return build_local_batch(batch, self.core.config, self.local_tokens, cached=cached)

    def autocast(self) -> AbstractContextManager[object]:
        """The autocast context of the forward pass."""
        return self.precision.autocast(self.device, sharded=apply.is_sharded(self.mesh))

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Name a phase of a step in profiles, and measure its time, if these are logged."""
        with record_function(phase), nullcontext() if self.timers is None else self.timers.measure(phase):
            yield

    def reports(self) -> dict[str, Any]:
        """What this state reports of the last step, as JSON values by the name of a file; equal on all ranks."""
        load = self.routers.report() if self.routers is not None else None
        return {LOAD_FILE: load} if load else {}

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.core.parameters() if parameter.requires_grad]

    def list_tower_parameters(self, *parts: str) -> list[nn.Parameter]:
        """The trained parameters of the towers `vision` and `audio`, or of one, with projectors; none without a tower.

        Args:
            parts: the names of the towers.
        """
        modules = [module for part in parts if (module := getattr(self.core, part)) is not None]
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]

    def begin_step(self, step: int) -> None:
        """Move the reference if that is due before a step, and train the parameters that the tuner schedules for it.

        The moments of those that become frozen are dropped.
        """
        if self.timers is not None:
            self.timers.steps += 1
        if self.reference is not None:
            self.reference.move(self.core, step)
        frozen = self.tuner_schedule.begin_step(step) if self.tuner_schedule else []
        for parameter in frozen:
            for optimizer in self.optimizers:
                optimizer.state.pop(parameter, None)
        if frozen:
            self.model = apply.apply_ddp(self.core, self.mesh, self.precision.reduce)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters():
            parameter.grad = None
