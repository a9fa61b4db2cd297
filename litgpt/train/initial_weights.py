"""The weights that a run starts from, and those of its reference."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from litgpt import adapt
from litgpt.adapt import llama_pro, loftq, quantization
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.model.moe import Router
from litgpt.model.registry import LABELS
from litgpt.parallel.apply import copy_full_tensor
from litgpt.parallel.exchange import get_local_tensor
from litgpt.parallel.reduce import all_gather_objects
from litgpt.phases import phase
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.tuner import LoRA
from litgpt.store.adapters.folder import is_adapter, load_adapter_folder
from litgpt.store.adapters.saved_adapter import SavedAdapter, check_further_training, iter_changed_base, list_changes
from litgpt.store.checkpoint_load import load_reference
from litgpt.store.load_model import iter_tensors, load_config, load_model
from litgpt.train.reference import Reference, allocate_copy, copy_tensor, copy_values
from litgpt.train.run_spec import RunSpec

USE_MERGED = "merge it (litgpt merge_lora), and set preference.reference to the merged model"


def fill_model(model: GPT, spec: RunSpec, seed: int, device: torch.device, *, resumed: bool) -> None:
    """Give a model its initial weights. All ranks call this together.

    Args:
        seed: of weights that are drawn at random.
        device: where to quantize.
        resumed: whether a checkpoint will be loaded; tensors that it holds are not initialized.
    """
    if spec.weights and (spec.adapted or not resumed):
        with phase(f"loading {spec.weights}"):
            load_weights(model, spec, device)
        if "output" in spec.base_changes:
            initialize(model, seed, write=copy_full_tensor, names=["score.weight"])
    elif not resumed:
        with phase("initializing the weights"):
            initialize(model, seed, write=copy_full_tensor)
    if spec.adapter and spec.weights and not resumed:
        saved = load_adapter_folder(spec.adapter, load_config(spec.weights))
        adapt.load_adapter(model, saved.tensors, write=copy_full_tensor)
        restore_quantized_base(model, spec, device)
    elif spec.tuner and not resumed:
        initialize_tuner(model, spec, seed, device)


def initialize_tuner(model: GPT, spec: RunSpec, seed: int, device: torch.device) -> None:
    """Initialize what the tuner added to a model with the weights of the spec."""
    assert spec.tuner is not None
    adapt.initialize_adapter(model, spec.tuner, seed, write=copy_full_tensor)
    if isinstance(spec.tuner, LoRA) and spec.tuner.init == "loftq":
        with phase("decomposing the errors of quantization"):
            tensors = iter_base_tensors(spec)
            loftq.initialize_loftq(model, spec.tuner, tensors, device=device, write=copy_full_tensor)


def restore_quantized_base(model: GPT, spec: RunSpec, device: torch.device) -> None:
    """Quantize the base of a loaded adapter as it was trained, if that depends on the adapter."""
    if isinstance(spec.tuner, LoRA) and spec.tuner.loftq_iterations > 1 and spec.quantize:
        loftq.quantize_for_adapter(model, iter_base_tensors(spec), device=device, write=copy_full_tensor)


def iter_base_tensors(spec: RunSpec) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the model that a run starts from, with the changes of an adapter."""
    assert spec.weights is not None
    base = load_config(spec.weights)
    return iter_changed_base(iter_tensors(spec.weights, base), base, spec.config)


def load_weights(model: GPT, spec: RunSpec, device: torch.device) -> None:
    """Load the weights of a folder into a model, which may be quantized or expanded."""
    assert spec.weights is not None
    base = load_config(spec.weights)
    if spec.quantize or spec.base_changes:
        quantization.load_quantized(model, iter_base_tensors(spec), device=device, write=copy_full_tensor)
        return
    order = spec.tuner.get_block_order(base.n_layer) if spec.tuner else None
    if order:
        llama_pro.load_expanded(model, iter_tensors(spec.weights, base), order, write=copy_full_tensor)
    else:
        load_model(model, spec.weights)


@torch.no_grad()
def build_reference(model: GPT, spec: RunSpec, seed: int, device: torch.device, *, resumed: bool) -> Reference | None:
    """Build the reference of a run, None for a run without one. All ranks call this together.

    Args:
        model: with its initial weights, which it has again when this returns.
        seed, device: as for `fill_model`.
        resumed: whether a checkpoint will be loaded.

    Raises:
        UserError: naming the folder of the reference, if it cannot be loaded or does not match the model.
    """
    settings = spec.preference
    if settings is None or not spec.needs_reference:
        return None
    trained = find_trained_names(model)
    offload = settings.reference_offload or spec.scores_ahead
    if settings.reference is None and spec.scores_ahead and not resumed:
        values = {}  # the model is its own reference until the first step
    elif settings.reference is None:
        values = copy_values(model, trained, in_host_memory=offload)
    else:
        values = load_other_weights(model, spec, settings.reference, seed, device, trained=trained, offload=offload)
    return hold_reference(values, settings)


def find_trained_names(model: GPT) -> set[str]:
    """The names of the parameters that training changes: by their gradients or, of routers, by the load of experts."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    routers = (name for name, module in model.named_modules() if isinstance(module, Router))
    return names | {f"{name}.correction" for name in routers if model.config.router_correction}


def resume_reference(model: GPT, spec: RunSpec, checkpoint: Path) -> Reference | None:
    """Load the reference of a run from its checkpoint, None for a run without one. All ranks call this together."""
    settings = spec.preference
    if settings is None or not spec.needs_reference:
        return None
    allocate = partial(allocate_copy, in_host_memory=settings.reference_offload)
    return hold_reference(load_reference(checkpoint, model, allocate), settings)


def hold_reference(values: dict[str, Tensor], settings: PreferenceArgs) -> Reference:
    """A reference with some values, which moves if the settings say so.

    Raises:
        UserError: if it moves, and some of its weights are quantized.
    """
    steps = settings.ref_model_sync_steps if settings.sync_ref_model else None
    if steps is not None and not all(value.is_floating_point() for value in values.values()):
        raise UserError(
            f"preference.sync_ref_model: true is not supported with preference.reference: {settings.reference} and a "
            "quantized base, because quantized weights cannot be mixed; set quantize: null"
        )
    return Reference(values, steps, settings.ref_model_mixup_alpha)


def load_other_weights(
    model: GPT, spec: RunSpec, folder: Path, seed: int, device: torch.device, *, trained: set[str], offload: bool
) -> dict[str, Tensor]:
    """Load the weights of a model or an adapter: this rank's local tensors of those that differ from a model's.

    Args:
        model: has its weights again when this returns.
        trained: names of parameters whose values are returned even if they do not differ.
        offload: return tensors in host memory.
    """
    parameters = dict(model.named_parameters())
    saved = load_reference_adapter(folder, spec) if is_adapter(folder) else None
    changed = adapt.get_adapter_parameters(model) if saved else parameters
    first = copy_values(model, changed, in_host_memory=True)
    with phase(f"loading the reference {folder}"):
        if saved:
            adapt.load_adapter(model, saved.tensors, write=copy_full_tensor)
        else:
            check_reference_model(folder, spec)
            other = replace(spec, weights=folder, base_changes={})
            load_weights(model, other, device)
            if spec.tuner and spec.adapted:
                initialize_tuner(model, other, seed, device)
    local = {name: get_local_tensor(parameters[name]) for name in first}
    differing = {name for name, value in first.items() if not torch.equal(value, local[name].cpu())}
    names = trained.union(*all_gather_objects(differing))  # each rank compares its shards
    values = {name: copy_tensor(local[name], in_host_memory=offload) for name in first if name in names}
    for name, value in first.items():
        local[name].copy_(value)
    return values


def load_reference_adapter(folder: Path, spec: RunSpec) -> SavedAdapter:
    """Load an adapter whose parameters are those of the adapter that the run trains.

    Raises:
        UserError: if it is damaged, has other parameters, or comes with weights of another base.
    """
    assert spec.weights is not None and spec.tuner is not None
    if not spec.adapted:
        trained = type(spec.tuner).__name__
        raise UserError(f"preference.reference: {folder} is an adapter, but tuner: {trained} trains none; {USE_MERGED}")
    try:
        saved = load_adapter_folder(folder, load_config(spec.weights))
        check_reference_adapter(saved, spec)
    except UserError as error:
        raise name_setting_and_folder(error, folder) from None
    return saved


def name_setting_and_folder(error: UserError, folder: Path) -> UserError:
    """The error of a reference in a folder, with the name of the setting."""
    detail = str(error).removeprefix("tuner.")  # which is no key of the command
    return UserError(f"preference.reference: {detail if str(folder) in detail else f'{folder}: {detail}'}")


def check_reference_adapter(saved: SavedAdapter, spec: RunSpec) -> None:
    """Check that an adapter computes as the adapter that the run trains, with other values of its parameters."""
    assert spec.weights is not None and spec.tuner is not None
    base = load_config(spec.weights)
    described = [
        f"{type(tuner).__name__}" + (f" with a scale of {tuner.scale:g}" if isinstance(tuner, LoRA) else "")
        for tuner in (saved.settings, spec.tuner)
    ]
    if described[0] != described[1]:
        raise UserError(f"it is {described[0]}, but the run trains {described[1]}; {USE_MERGED}")
    if list_changes(base, saved.config) != dict(spec.base_changes):
        raise UserError(f"it changes the vocabulary of its base, which the run does not; {USE_MERGED}")
    try:
        adapt.check_adapter(spec.build_whole_model(), saved.tensors)
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"{reason}; train with the rank and the layers of this adapter, or {USE_MERGED}") from None
    check_further_training(saved, spec.weights, base, cure=USE_MERGED)


def check_reference_model(folder: Path, spec: RunSpec) -> None:
    """Check that the model in a folder computes as the base of the run does, with other weights.

    Raises:
        UserError: naming the first field of their configurations that differs.
    """
    assert spec.weights is not None
    base = replace(load_config(spec.weights), **spec.base_changes)
    try:
        reference = load_config(folder)
    except UserError as error:
        raise name_setting_and_folder(error, folder) from None
    for name in Config.__dataclass_fields__:
        values = [getattr(config, name) for config in (reference, base)]
        is_label = name in LABELS or (name == "block_size" and base.position_embedding != "learned")
        if values[0] != values[1] and not is_label:
            raise UserError(
                f"preference.reference: {folder} has {name}: {values[0]}, but the model {values[1]}; use one of the "
                "same shape"
            )
