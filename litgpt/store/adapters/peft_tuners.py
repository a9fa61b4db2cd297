"""PEFT's folders of tuners other than LoRA: names and shapes of their tensors, and keys of their config, both ways."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.recipe.tuner import BOFT, IA3, Tuner, VeRA
from litgpt.store.adapters.peft_lora import START, layer_of, steps_of

Reshape = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """How PEFT has a tuner.

    Attributes:
        keys: our parameter of a layer to PEFT's, and what PEFT's tensor looks like.
        shared: the same for parameters that all layers share.
        settings: our setting to PEFT's.
        constants: what else PEFT's config says.
    """

    kind: str
    tuner: type[Tuner]
    keys: Mapping[str, tuple[str, Reshape]]
    settings: Mapping[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)


def as_row(tensor: Tensor) -> Tensor:
    """(in,) as (1, in)."""
    return tensor[None]


def as_column(tensor: Tensor) -> Tensor:
    """(out,) as (out, 1)."""
    return tensor[:, None]


def as_is(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


FORMS = (
    Form("IA3", IA3, {"scale_in": ("ia3_l", as_row), "scale_out": ("ia3_l", as_column)}, {}),
    Form(
        "VERA",
        VeRA,
        {"vera_scale_d": ("vera_lambda_d", as_is), "vera_scale_b": ("vera_lambda_b", as_is)},
        {"r": "r", "dropout": "vera_dropout", "d_initial": "d_initial", "projection_seed": "projection_prng_key"},
        {"projections.a": "base_model.vera_A", "projections.b": "base_model.vera_B"},
        {"save_projection": True, "bias": "none"},
    ),
    Form(
        "BOFT",
        BOFT,
        {"boft_r": ("boft_R", as_is), "boft_scale": ("boft_s", as_column)},
        {"block_size": "boft_block_size", "butterfly_factors": "boft_n_butterfly_factor"},
        constants={"boft_block_num": 0, "boft_dropout": 0.0, "bias": "none"},
    ),
)


def layers_of(config: Config) -> dict[str, str]:
    """Our linear layers that have a published one to themselves, stored as (out, in), and its name."""
    steps = [step for step in steps_of(config).values() if len(step.names) == 1 and step.kind == "rename"]
    plain = [step for step in steps if step.expert is None and not step.transposed]
    return {layer_of(step.names[0]): layer_of(step.hf_name) for step in plain if step.hf_name.endswith(".weight")}


def to_peft(
    tensors: Mapping[str, Tensor], settings: Tuner, config: Config
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """PEFT's tensors and config; None if it has no form for the tuner, or for it in a layer that holds several."""
    form = next((form for form in FORMS if form.tuner is type(settings)), None)
    layers = layers_of(config)
    if form is None or any(name.rpartition(".")[0] not in {*layers, "projections"} for name in tensors):
        return None
    published: dict[str, Tensor] = {}
    inward = set()
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        if name in form.shared:
            published[form.shared[name]] = tensor
            continue
        theirs, reshape = form.keys[key]
        published[f"{START}{layers[owner]}.{theirs}"] = reshape(tensor)
        inward |= {layers[owner]} if key == "scale_in" else set()
    values = {
        "peft_type": form.kind,
        "task_type": "CAUSAL_LM",
        "target_modules": sorted({layers[name.rpartition(".")[0]] for name in tensors if name not in form.shared}),
        "inference_mode": True,
        **({"feedforward_modules": sorted(inward)} if form.tuner is IA3 else {}),
        **{theirs: getattr(settings, ours) for ours, theirs in form.settings.items()},
        **form.constants,
    }
    return published, values


def from_peft(
    published: Mapping[str, Tensor], values: Mapping[str, Any], config: Config
) -> tuple[Tuner, dict[str, Tensor]] | None:
    """Settings and tensors of one of these adapters; None if it is of another kind.

    Raises:
        UserError: naming a tensor that nothing in this model has a place for.
    """
    form = next((form for form in FORMS if form.kind == values.get("peft_type")), None)
    if form is None:
        return None
    layers = {theirs: ours for ours, theirs in layers_of(config).items()}
    shared = {theirs: ours for ours, theirs in form.shared.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in published.items():
        layer, _, theirs = name.removeprefix(START).rpartition(".")
        keys = [key for key, (known, reshape) in form.keys.items() if known == theirs and fits(reshape, tensor)]
        if name in shared:
            tensors[shared[name]] = tensor
        elif layer in layers and keys:
            tensors[f"{layers[layer]}.{keys[0]}"] = tensor if form.keys[keys[0]][1] is as_is else tensor.flatten()
        else:
            raise UserError(f"{name}: nothing in this model is called so; load the adapter's own base")
    if missing := sorted(form.shared.keys() - tensors.keys()):
        raise UserError(f"{form.shared[missing[0]]} is missing; save the adapter with save_projection: true")
    owners = {name: sorted({one.rpartition(".")[0] for one in tensors if one.endswith(name)}) for name in form.keys}
    settings = {ours: values[theirs] for ours, theirs in form.settings.items()}
    settings["target_modules"] = sorted({owner for found in owners.values() for owner in found})
    if form.tuner is IA3:
        settings["feedforward_modules"] = owners["scale_in"]
    return form.tuner(**settings), tensors


def fits(reshape: Reshape, tensor: Tensor) -> bool:
    """Whether a tensor is of the shape that a reshape gives."""
    return reshape is as_is or (tensor.dim() == 2 and tensor.shape[reshape is as_column] == 1)
