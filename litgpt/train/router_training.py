"""Train the routers of a mixture of experts: hand them their settings, update their corrections, report the load."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from litgpt.data.stream.batch import Batch
from litgpt.model.gpt import GPT
from litgpt.model.moe import Router
from litgpt.model.routing import STATISTICS, Routing, detach
from litgpt.model.uncompiled import uncompiled
from litgpt.parallel.apply import copy_full_tensor, full_tensor
from litgpt.parallel.collectives import all_reduce_no_grad, slice_local
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.recipe.moe import MoEArgs
from litgpt.train.local_batch import LocalBatch

LOAD_FILE = "expert_load.json"


class RouterTrainer:
    """The routing of the micro-batches of one optimizer step after the other.

    Attributes:
        load: the tokens of each expert in the last step, by layer; empty before the first.
    """

    def __init__(self, settings: MoEArgs, model: GPT, mesh: Mesh | None) -> None:
        self.settings, self.model, self.mesh = settings, model, mesh
        self.passes: list[Routing] = []
        self.tokens, self.scale = 1.0, 1.0
        self.load: dict[int, list[float]] = {}

    def begin(self, tokens: float, loss_scale: float) -> None:
        """Begin a step whose global batch has this number of tokens without padding."""
        self.passes, self.tokens = [], max(tokens, 1.0)
        self.scale = loss_scale / self.tokens

    def attach(self, batch: Batch, local: LocalBatch) -> LocalBatch:
        """The rank's shard of the next micro-batch, with its routing; all of its model passes are one."""
        routing = Routing(
            self.settings,
            rows=len(batch.ids),
            scale=self.scale,
            is_token_BP=mark_tokens(batch, local, self.mesh),
            earlier=self.passes[-1] if self.passes else None,
            sum_over_batch=build_sum(self.mesh, ("context", "tensor")),
            sum_over_ranks=build_sum(self.mesh, ("data", "context", "tensor")),
        )
        self.passes.append(routing)
        return replace(local, inputs=replace(local.inputs, routing=routing))

    def finish(self, device: torch.device, *, skipped: bool) -> dict[str, float]:
        """Update the corrections, unless the step is skipped; returns the metrics of the step, equal on all ranks.

        Args:
            device: of the run; parameters may be in host memory.
        """
        config = self.model.config
        totals_LS = torch.zeros(config.n_blocks, config.n_expert + len(STATISTICS), dtype=torch.float64)
        for layer in self.passes[0].records if self.passes else ():
            records = torch.stack([routing.records[layer] for routing in self.passes])
            totals_LS[layer] = records.to("cpu", torch.float64).sum(0)
        totals_LS = torch.tensor(all_reduce_sum(totals_LS.flatten().tolist(), device)).view_as(totals_LS)
        self.passes = []
        if self.settings.router_bias_update_rate and not skipped:
            self.update_corrections(totals_LS[:, : config.n_expert])
        ran = [layer for layer in range(config.n_blocks) if layer < config.n_layer or totals_LS[layer].any()]
        layers = [layer for layer in ran if config.has_experts(layer)]
        self.load = {layer: totals_LS[layer, : config.n_expert].tolist() for layer in layers}
        metrics = compute_metrics(totals_LS[layers], config.n_expert, self.tokens)
        if self.settings.expert_capacity_factor is None:
            del metrics["experts/dropped"]
        return metrics

    def update_corrections(self, load_LE: Tensor) -> None:
        """Raise the correction of experts below the mean load, and lower that of those above (Wang et al. 2024)."""
        for router in (module for module in self.model.modules() if isinstance(module, Router)):
            load_E = load_LE[router.layer]
            assert router.correction is not None
            correction = full_tensor(router.correction.detach())
            change = self.settings.router_bias_update_rate * (load_E.mean() - load_E).sign()
            copy_full_tensor(router.correction, correction + change.to(correction))

    def report(self) -> dict[str, list[float]]:
        """The load of each expert in the last step, relative to the mean of its layer, by layer."""
        return {
            str(layer): [round(value / (sum(load) / len(load) or 1.0), 4) for value in load]
            for layer, load in self.load.items()
        }


def compute_metrics(totals_LS: Tensor, experts: int, tokens: float) -> dict[str, float]:
    """The metrics of a step: loads relative to the mean of their layer, and means over tokens and layers.

    Args:
        totals_LS: sums over the tokens of the global batch, of the layers with experts; as in `Routing.records`.
    """
    load_LE = totals_LS[:, :experts]
    relative_LE = load_LE / load_LE.mean(1, keepdim=True).clamp(min=1e-12)
    sums = dict(zip(STATISTICS, totals_LS[:, experts:].sum(0).tolist(), strict=True))
    dropped = sums.pop("dropped") / max(load_LE.sum().item(), 1.0)
    means = {f"router/{name}": value / (tokens * len(totals_LS)) for name, value in sums.items() if value}
    loads = {"experts/max_load": relative_LE.max().item(), "experts/min_load": relative_LE.min().item()}
    return {**loads, "experts/dropped": dropped, **means}


def mark_tokens(batch: Batch, local: LocalBatch, mesh: Mesh | None) -> Tensor | None:
    """(B, P), False for padding, of the tokens that the routers of this rank get; None without padding."""
    if batch.documents is None and local.tokens is None:
        return None
    is_token = torch.ones_like(batch.ids) if batch.documents is None else batch.documents.ge(0).int()
    if local.tokens is not None:
        is_token = local.tokens.local_shard(is_token, 0)
    if mesh is not None and mesh.dims.tensor > 1:  # tokens are also sharded between the layers
        is_token = slice_local(is_token, mesh.group("tensor"), 1)
    return is_token.bool()


def build_sum(mesh: Mesh | None, axes: Sequence[str]) -> Callable[[Tensor], Tensor]:
    """The function that sums a tensor over some axes of the batch."""
    groups = [mesh.group(axis) for axis in axes if mesh.batch[axis].size() > 1] if mesh is not None else []

    @uncompiled
    def sum_over_axes(values: Tensor) -> Tensor:
        for group in groups:
            values = all_reduce_no_grad(values, group)
        return values

    return sum_over_axes if groups else detach
