"""Adapters on disk: folders that go to PEFT and come from there, or under our own names where PEFT has no form."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import read_json, staged_folder, write_json
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping, is_stacked
from litgpt.recipe.tuner import TUNERS, LoRA, Tuner
from litgpt.store.adapters import litgpt_lora, peft_tuners
from litgpt.store.adapters.lora_pairs import LoRAPart, share_pair, split, tuner_parameter_name
from litgpt.store.adapters.peft_experts import held_stacked, is_router, parameters_in
from litgpt.store.adapters.peft_lora import (
    COPY,
    START,
    Sorted,
    Taken,
    Tensors,
    add_rest,
    layer_of,
    sort,
    steps_of,
    to_peft,
    weight_step,
)
from litgpt.store.checkpoint_load import PROGRESS, iter_checkpoint_weights
from litgpt.store.published_tensor import list_parameters
from litgpt.store.safetensors_files import SafetensorsFiles, write_tensors
from litgpt.store.tokenizer_files import copy_tokenizer
from litgpt.store.weight_files import BIN, BIN_INDEX, LIT_MODEL, SAFETENSORS, SAFETENSORS_INDEX

OWN = "litgpt"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_FILES = (SAFETENSORS, SAFETENSORS_INDEX, LIT_MODEL, BIN, BIN_INDEX)


@dataclass(frozen=True)
class BasePrecision:
    """How the base was kept while an adapter was trained beside it.

    Attributes:
        dtype: the type of its numbers, as torch names it (float32); None if that is not known.
        quantize: how its matrices were packed (bnb.nf4); None for not.
    """

    dtype: str | None = None
    quantize: str | None = None


@dataclass(frozen=True)
class SavedAdapter:
    """What a folder says of an adapter: its settings, its tensors under our names, the base and how that was kept."""

    settings: Tuner
    tensors: dict[str, Tensor]
    base: str
    run: BasePrecision = BasePrecision()

    @property
    def dtype(self) -> torch.dtype:
        """The type of numbers that it was trained in."""
        if self.run.dtype:
            return getattr(torch, self.run.dtype)
        return Counter(tensor.dtype for tensor in self.tensors.values()).most_common(1)[0][0]


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, or a training checkpoint of one, in a form that is read here."""
    return (folder / ADAPTER_CONFIG).is_file() or (folder / litgpt_lora.WEIGHTS).is_file()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model beside it."""
    return has_adapter(folder) and not any((folder / name).is_file() for name in MODEL_FILES)


def read_base_name(folder: Path) -> str:
    """The name or path of the model that an adapter says it was made for; empty if it does not say."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return str(litgpt_lora.settings_in(folder).get("checkpoint_dir") or "")
    values = read_json(folder / ADAPTER_CONFIG)
    return str((values.get("base_model_name_or_path") if isinstance(values, dict) else None) or "")


def build_own_config(settings: Tuner, base: str, run: BasePrecision) -> dict[str, Any]:
    """What `adapter_config.json` says in our own form."""
    choice = {"class_path": type(settings).__name__, "init_args": asdict(settings)}
    return {OWN: {**choice, "run": asdict(run)}, "base_model_name_or_path": base}


def save_adapter_folder(
    folder: Path | str,
    tensors: Tensors,
    *,
    config: Config,
    settings: Tuner,
    base: str = "",
    run: BasePrecision = BasePrecision(),
    tokenizer_dir: Path | str | None = None,
    replace: bool = False,
) -> None:
    """Write an adapter as a folder, whole or not at all: in PEFT's form where it has one, else under our own names.

    Args:
        tensors: what the tuner added or trains, whole, on the CPU, under our names.
        base: the name or path of the model that it was made for.
        run: how that was kept while it was trained.
        tokenizer_dir: a folder whose tokenizer files are copied.
        replace: take the place of a folder that exists.

    Raises:
        UserError: if the folder holds something already, or PEFT has no form for a tensor.
    """
    told = {"settings": asdict(settings), "run": asdict(run)}
    if isinstance(settings, LoRA):
        published, parts, left = to_peft(tensors, config)
        if left:
            raise UserError(f"{min(left)}: PEFT's folders have no form for it; merge the adapter into its base instead")
        listed = {layer: [part.to_dict() for part in some] for layer, some in parts.items()}
        metadata = {"format": "pt", OWN: json.dumps({**told, "parts": listed})}
        values = peft_config(published, parts, settings, config, base)
    elif not settings.adds:
        raise UserError(f"tuner: {type(settings).__name__} adds no adapter; save the model itself")
    elif formed := peft_tuners.to_peft(tensors, settings, config):
        published, metadata = formed[0], {"format": "pt", OWN: json.dumps(told)}
        values = {**formed[1], "base_model_name_or_path": base}
    else:
        published, metadata = dict(tensors), {"format": "pt"}
        values = build_own_config(settings, base, run)
    with staged_folder(Path(folder), replace=replace) as staged:
        whole = {name: tensor.detach().contiguous() for name, tensor in published.items()}
        write_tensors(staged / ADAPTER_WEIGHTS, whole, metadata)
        write_json(staged / ADAPTER_CONFIG, values)
        if tokenizer_dir:
            copy_tokenizer(Path(tokenizer_dir), staged)


def peft_config(
    published: Tensors, layers: Mapping[str, list[LoRAPart]], settings: LoRA, config: Config, base: str
) -> dict[str, Any]:
    """What `adapter_config.json` says: PEFT's keys, with ranks and scales of those layers that differ."""
    known = steps_of(config)
    steps = {layer: weight_step(layer, known) for layer in layers}
    among = parameters_in(known)
    parameters = {layer: step.hf_name for layer, step in steps.items() if step.hf_name in among}
    ranks = {parameters.get(layer, layer): sum(part.rank for part in parts) for layer, parts in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else settings.r
    others = {layer: other for layer, other in ranks.items() if other != rank}
    copied = sorted(name.removeprefix(START) for name in published if ".lora_" not in name)
    experts = any(is_stacked(step.names[0]) or is_router(step) for step in steps.values())
    rslora = settings.rslora and not experts  # fusing pairs of experts, PEFT would scale them as without
    saved = {layer_of(name) for name in copied if settings.bias == "none" or not name.endswith("bias")}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha_for(rank, settings, rslora=rslora),
        "lora_dropout": 0.0 if experts else settings.dropout,  # PEFT has none on parameters
        "target_modules": sorted(layers.keys() - parameters.keys()),
        "target_parameters": sorted(parameters.values()) or None,
        "modules_to_save": sorted(saved) or None,
        "bias": settings.bias,
        "use_rslora": rslora,
        "use_dora": settings.dora,
        "rank_pattern": others,
        "alpha_pattern": {layer: alpha_for(other, settings, rslora=rslora) for layer, other in others.items()},
        "fan_in_fan_out": any(step.transposed for layer, step in steps.items() if layer not in parameters),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def alpha_for(rank: int, settings: LoRA, *, rslora: bool) -> float:
    """The alpha by which a pair of this rank has the scale of the settings."""
    return settings.scale * (math.sqrt(rank) if rslora else rank)


def load_adapter_folder(folder: Path | str, config: Config) -> SavedAdapter:
    """Read an adapter for a model of this shape: PEFT's folder, ours or LitGPT's, or a training checkpoint of ours.

    Raises:
        UserError: in one line, if a file is missing or damaged, or the adapter is of another kind or for another base.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file() and (folder / litgpt_lora.WEIGHTS).is_file():
        return of_litgpt(folder, config)
    values = read_json(folder / ADAPTER_CONFIG)
    values = values if isinstance(values, dict) else {}
    kinds = ["LORA", *(form.kind for form in peft_tuners.FORMS)]
    if OWN not in values and values.get("peft_type") not in kinds:
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: peft_type: {values.get('peft_type')!r} will not do; {', '.join(kinds)} would"
        )
    base = str(values.get("base_model_name_or_path") or "")
    if OWN in values:
        settings, run = own_settings(folder, values[OWN])
        return SavedAdapter(settings, own_tensors(folder), base, run)
    files = SafetensorsFiles([folder / ADAPTER_WEIGHTS])
    published = {name.removeprefix(START): files.read(name) for name in files.tensors}
    try:
        notes = json.loads(files.metadata.get(OWN, "null"))
        settings, tensors = read(published, values, notes, config)
        run = BasePrecision(**(notes or {}).get("run", {}))
    except UserError as error:
        made_for = f" (it was made for {base})" if base else ""
        raise UserError(f"{folder / ADAPTER_WEIGHTS}{made_for}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: not an adapter that can be read ({type(error).__name__}: {error})") from None
    return SavedAdapter(settings, tensors, base, run)


def of_litgpt(folder: Path, config: Config) -> SavedAdapter:
    """The adapter of a run of LitGPT."""
    settings, tensors = litgpt_lora.load(folder, config)
    check_shapes(tensors, config)
    dtype = next(iter(tensors.values())).dtype
    return SavedAdapter(settings, tensors, read_base_name(folder), BasePrecision(str(dtype).removeprefix("torch.")))


def read(published: Tensors, values: Mapping[str, Any], notes: Any, config: Config) -> tuple[Tuner, dict[str, Tensor]]:
    """Settings and tensors of an adapter in PEFT's form, with the notes that we leave in such a file."""
    if formed := peft_tuners.from_peft(published, values, config):
        settings, tensors = formed
        return type(settings)(**notes["settings"]) if notes else settings, tensors
    published_steps = steps_of(config)
    steps = {**published_steps, **held_stacked(published_steps)}
    found = sort(published, steps, values.get("target_parameters") or [], config)
    settings, tensors = from_ours(found, notes, steps, config) if notes else from_others(found, values, steps, config)
    check_shapes(tensors, config)
    return settings, tensors


def own_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter under our own names, out of its file or its training checkpoint."""
    if (folder / PROGRESS).is_file():
        return dict(iter_checkpoint_weights(folder))
    files = SafetensorsFiles([folder / ADAPTER_WEIGHTS])
    return {name: files.read(name) for name in files.tensors}


def own_settings(folder: Path, choice: Any) -> tuple[Tuner, BasePrecision]:
    """The settings of a tuner that PEFT does not know in this form, and how its base was kept."""
    try:
        return TUNERS[choice["class_path"]](**choice["init_args"]), BasePrecision(**choice.get("run", {}))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG}: {OWN}: not the settings of a tuner ({error})") from None


def from_ours(
    found: Sorted, notes: Any, steps: Mapping[str, TensorMapping], config: Config
) -> tuple[LoRA, dict[str, Tensor]]:
    """Settings and tensors of an adapter that we wrote."""
    taken = Taken(config)
    for layer, pair in found.pairs.items():
        step = weight_step(layer, steps)
        parts = [LoRAPart.from_dict(part) for part in notes["parts"][layer]]
        taken.add(step, split(step, parts, pair["a"], pair["b"], config))
    add_rest(taken, found, steps, config)
    return LoRA(**notes["settings"]), taken.whole()


def from_others(
    found: Sorted, values: Mapping[str, Any], steps: Mapping[str, TensorMapping], config: Config
) -> tuple[LoRA, dict[str, Tensor]]:
    """Settings and tensors of an adapter by PEFT; pairs of other ranks and scales are made those of the settings."""
    rslora = bool(values.get("use_rslora"))
    rank = max((pair["a"].shape[-2] for pair in found.pairs.values()), default=int(values["r"]))
    scales = {layer: scale_of(layer, values) for layer in found.pairs}
    scale = Counter(scales.values()).most_common(1)[0][0] if scales else 1.0
    taken = Taken(config)
    for layer, pair in found.pairs.items():
        step, more = weight_step(layer, steps), rank - pair["a"].shape[-2]
        b = pair["b"] if scales[layer] == scale else pair["b"] * (scales[layer] / scale)
        a, b = (torch.nn.functional.pad(pair["a"], (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more)))
        taken.add(step, share_pair(step, a, b, config))
    add_rest(taken, found, steps, config)
    tensors = taken.whole()
    return LoRA(
        r=rank,
        alpha=scale * (math.sqrt(rank) if rslora else rank),
        dropout=float(values.get("lora_dropout") or 0.0),
        target_modules=owners(tensors, "lora_a"),
        modules_to_save=sorted(
            {name.removesuffix(COPY).rpartition(".")[0] for name in tensors if is_saved(name, values)}
        ),
        bias="none" if values.get("bias", "none") == "none" else "all",
        rslora=rslora,
        dora=bool(values.get("use_dora")),
    ), tensors


def owners(tensors: Tensors, key: str) -> list[str]:
    """The layers, or stacks of experts, that have a parameter of this kind."""
    return sorted({re.sub(rf"[._]{key}$", "", name) for name in tensors if name.endswith(key)})


def is_saved(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a copy is one of modules_to_save, not of a bias alone."""
    return name.endswith(COPY) and (values.get("bias", "none") == "none" or not name.endswith(f"bias{COPY}"))


def scale_of(layer: str, values: Mapping[str, Any]) -> float:
    """The factor on B A of a layer, by PEFT's config."""

    def setting(pattern: str, default: str) -> float:
        patterns = values.get(pattern) or {}
        found = [patterns[key] for key in patterns if any(re.fullmatch(rf"(.*\.)?({key})", name) for name in names)]
        return float(found[0] if found else values[default])

    names = (layer, f"{layer}.weight")  # a router's pattern may be that of its parameter
    rank = setting("rank_pattern", "r")
    return setting("alpha_pattern", "lora_alpha") / (math.sqrt(rank) if values.get("use_rslora") else rank)


def check_shapes(tensors: Tensors, config: Config) -> None:
    """Hold every tensor's shape against that of the parameter it belongs to.

    Raises:
        UserError: naming the first that does not fit.
    """
    for ours, parameter in list_parameters(config).items():
        shape = tuple(parameter.shape)
        *stack, rows, columns = shape if len(shape) > 1 else (*shape, 0)
        sizes = {"lora_a": (-1, columns), "lora_b": (rows, -1), "lora_magnitude": (rows,)}
        expected = {
            tuner_parameter_name(ours, key + first): (*stack, *size)
            for key, size in sizes.items()
            for first in ("", "_first")
        }
        for name, wanted in {**expected, ours + COPY: shape}.items():
            have = tuple(tensors[name].shape) if name in tensors else wanted
            if len(have) != len(wanted) or any(a != b for a, b in zip(have, wanted, strict=True) if b != -1):
                raise UserError(f"{name} is {list(have)}, but the model's {ours} is {list(shape)}; load its own base")
