"""LoRA-GA: the first values of LoRA from the gradient of the matrices that it adapts (Wang et al. 2024)."""

import itertools
import math

import torch
from torch import nn

from litgpt.adapt.layers import disable_adapters, gather_full, iter_adapted_layers, own_parameter, upcast
from litgpt.adapt.lora import LoRALayer, init_lora_ga, lora_name
from litgpt.data.stream.batch import Batch
from litgpt.errors import UserError
from litgpt.parallel.apply import apply_ddp, copy_full_tensor, init_mixed_precision
from litgpt.parallel.reduce import all_reduce_sum
from litgpt.phases import phase
from litgpt.recipe.tuner import LoRA
from litgpt.store.collectives_io import raise_on_all_ranks
from litgpt.train.objective import Objective
from litgpt.train.setup import Run
from litgpt.train.step import compute_gradients
from litgpt.train.train_state import TrainState

Target = tuple[LoRALayer, str, nn.Parameter]


def initialize_by_gradient(run: Run, objective: Objective) -> None:
    """Initialize an adapter of LoRA-GA at the start of a run; all others stay. All ranks call this together.

    The gradient is that of the first global batches, which are also trained on.

    Raises:
        UserError: if the gradient is not finite.
    """
    settings = run.spec.tuner
    if not isinstance(settings, LoRA) or settings.init != "lora_ga" or run.spec.adapter or run.progress:
        return
    with phase("decomposing gradients"), torch.random.fork_rng():
        initialize_from_batches(run.train_state, objective, read_first_batches(run, settings.ga_batches), settings)


def initialize_from_batches(
    train_state: TrainState, objective: Objective, batches: list[Batch], settings: LoRA
) -> None:
    """Initialize an adapter by the gradient of some global batches, of which this rank has these micro-batches."""
    for layer, name, weight in compute_weight_gradients(train_state, objective, batches):
        assert weight.grad is not None
        values = init_lora_ga(upcast(gather_full(weight.grad)), settings)
        weight.grad = None
        for key, value in zip(("lora_a", "lora_b"), values, strict=True):
            for suffix in ("", "_first"):
                copy_full_tensor(own_parameter(layer, lora_name(name, key + suffix)), value)


def read_first_batches(run: Run, count: int) -> list[Batch]:
    """This rank's micro-batches of the first global batches; the stream is then at its beginning again."""
    stream = run.data.train
    beginning = stream.state_dict()
    with raise_on_all_ranks():
        batches = list(itertools.islice(iter(stream), count * run.data.micro_batches))
    stream.close()
    stream.load_state_dict(beginning)
    return batches


def compute_weight_gradients(train_state: TrainState, objective: Objective, batches: list[Batch]) -> list[Target]:
    """Compute the gradients of the matrices that LoRA adapts, over some global batches and without the adapter.

    Returns:
        Each layer, the name of its matrix, and the parameter of the matrix, whose `grad` may be sharded.
    """
    model, trained = train_state.core, train_state.parameters()
    targets = list_targets(model)
    for _, _, weight in targets:
        weight.requires_grad_()
    init_mixed_precision(model)
    for parameter in trained:
        parameter.requires_grad_(False)
    train_state.model = apply_ddp(model, train_state.mesh, train_state.precision.reduce)
    counted = batches if train_state.counts_batch else []
    totals = [sum(batch.tokens for batch in counted), *objective.count_batches(counted)]
    tokens, *counts = all_reduce_sum(totals, train_state.device)
    if train_state.routers is not None:
        train_state.routers.begin(tokens, train_state.scale.factor)
    with disable_adapters(model):
        _, norm = compute_gradients(train_state, batches, objective, counts=counts)
    if train_state.routers is not None:
        train_state.routers.finish(train_state.device, skipped=True)
    if not math.isfinite(norm):
        raise UserError("tuner.init: lora_ga, but the gradient of the weights is not finite; set precision: 32-true")
    for parameter in trained:
        parameter.requires_grad_()
    for _, _, weight in targets:
        weight.requires_grad_(False)
    train_state.model = apply_ddp(model, train_state.mesh, train_state.precision.reduce)
    return targets


def list_targets(model: nn.Module) -> list[Target]:
    """The matrices with an update: their layer, their name in it, and their parameter."""
    layers = [layer for _, layer in iter_adapted_layers(model) if isinstance(layer, LoRALayer)]
    return [
        (layer, name, own_parameter(layer, name))
        for layer in layers
        for name in layer._parameters
        if layer.get_factors(name)
    ]
