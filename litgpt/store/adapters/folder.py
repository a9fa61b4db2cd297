"""Save and load adapter folders, in PEFT's format or, if PEFT has none for a tuner, under our own names."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from litgpt.errors import UserError, name_file
from litgpt.files import read_json, read_json_object, staged_folder, write_json
from litgpt.model.config import Config
from litgpt.recipe.tuner import TUNERS, LoRA, Tuner
from litgpt.store.adapters.litgpt_lora import LITGPT_WEIGHTS, load_litgpt_lora, read_litgpt_settings
from litgpt.store.adapters.lora_pairs import COPY_SUFFIX, get_added_name
from litgpt.store.adapters.peft_lora import PREFIX, convert_lora_from_peft, convert_lora_to_peft
from litgpt.store.adapters.peft_options import MERGE, check_options
from litgpt.store.adapters.peft_tuners import PEFT_TUNERS, convert_tuner_from_peft, convert_tuner_to_peft
from litgpt.store.adapters.saved_adapter import UNKNOWN_SETTINGS, BaseSettings, SavedAdapter, check_new_rows
from litgpt.store.checkpoint_load import PROGRESS, iter_checkpoint_weights
from litgpt.store.collectives_io import warn_once
from litgpt.store.legacy import load_state_dict
from litgpt.store.published_tensor import list_parameters
from litgpt.store.safetensors_files import SafetensorsFiles, write_tensors
from litgpt.store.tokenizer_files import copy_tokenizer
from litgpt.store.weight_files import ADAPTER_WEIGHTS, BIN, BIN_INDEX, LIT_MODEL, SAFETENSORS, SAFETENSORS_INDEX

OWN_KEY = "litgpt"  # of adapter_config.json in our format, and of our notes in PEFT's tensor file
ADAPTER_CONFIG, PEFT_BIN = "adapter_config.json", "adapter_model.bin"
MODEL_FILES = (SAFETENSORS, SAFETENSORS_INDEX, LIT_MODEL, BIN, BIN_INDEX)


def has_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, or a training checkpoint of one, in a format that can be loaded."""
    return (folder / ADAPTER_CONFIG).is_file() or (folder / LITGPT_WEIGHTS).is_file()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no full model."""
    return has_adapter(folder) and not any((folder / name).is_file() for name in MODEL_FILES)


def check_whole_model(folder: Path) -> None:
    """Check that a folder whose weights are read does not hold an adapter alone.

    Raises:
        UserError: if it does.
    """
    if is_adapter(folder):
        raise UserError(f"checkpoint_dir: {folder} holds an adapter; merge it: litgpt merge_lora {folder}")


def list_subfolder_adapters(folder: Path) -> list[str]:
    """The subfolders with an adapter of a folder without a model or an adapter, as PEFT saves several of them."""
    if not folder.is_dir() or has_adapter(folder) or any((folder / name).is_file() for name in MODEL_FILES):
        return []
    return sorted(path.name for path in folder.iterdir() if (path / ADAPTER_CONFIG).is_file())


def read_base_revision(folder: Path) -> str | None:
    """The revision of the base model that an adapter of PEFT names; None for the newest one."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    revision = read_json_object(folder / ADAPTER_CONFIG).get("revision")
    return None if revision in (None, "", "main") else str(revision)


def read_base_name(folder: Path) -> str:
    """The name or path of the model that an adapter was trained on; empty if the adapter does not name it."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return str(read_litgpt_settings(folder).get("checkpoint_dir") or "")
    return str(read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")


def build_own_config(
    settings: Tuner, base: str, base_settings: BaseSettings, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `adapter_config.json` in our own format.

    Args:
        changes: the fields that differ from the config of the base.
    """
    choice = {"class_path": type(settings).__name__, "init_args": asdict(settings), "run": base_settings.to_dict()}
    return {OWN_KEY: {**choice, "model": dict(changes)}, "base_model_name_or_path": base}


def save_adapter_folder(
    folder: Path | str,
    tensors: Mapping[str, Tensor],
    *,
    config: Config,
    settings: Tuner,
    base: str = "",
    base_settings: BaseSettings = UNKNOWN_SETTINGS,
    changes: Mapping[str, Any] = MappingProxyType({}),
    tokenizer_dir: Path | str | None = None,
    prompt_files: Mapping[str, str] | None = None,
    replace: bool = False,
) -> None:
    """Write an adapter folder atomically: in PEFT's format if it has one for the tuner, else under our own names.

    Args:
        tensors: full tensors that the tuner added or trains, on the CPU, under our names.
        base: the name or path of the model that the adapter was trained on.
        base_settings: the precision and changed configuration of that model during training.
        changes: the fields of `config` that differ from the config of that model.
        tokenizer_dir, prompt_files: as in `save_model_folder`.
        replace: replace a folder that exists.

    Raises:
        UserError: if the folder exists and is not empty, or PEFT has no format for a tensor.
    """
    notes: dict[str, Any] = {"settings": asdict(settings), "run": base_settings.to_dict(), "model": dict(changes)}
    if isinstance(settings, LoRA):
        published, notes["parts"], values = convert_lora_to_peft(tensors, settings, config, base)
    elif not settings.adds:
        raise UserError(f"tuner: {type(settings).__name__} adds no adapter; save the model itself")
    elif converted := convert_tuner_to_peft(tensors, settings, config):
        published, values = converted[0], {**converted[1], "base_model_name_or_path": base}
    else:
        published, values, notes = dict(tensors), build_own_config(settings, base, base_settings, changes), {}
    with staged_folder(Path(folder), replace=replace) as staged:
        write_peft_folder(staged, published, values, notes)
        if tokenizer_dir:
            copy_tokenizer(Path(tokenizer_dir), staged, prompt_files)


def write_peft_folder(
    folder: Path,
    published: Mapping[str, Tensor],
    values: Mapping[str, Any],
    notes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the two files of an adapter folder.

    Args:
        published: by their names in the file.
        values: the content of `adapter_config.json`.
        notes: our entry of the file's metadata.
    """
    metadata = {"format": "pt", **({OWN_KEY: json.dumps(notes)} if notes else {})}
    contiguous = {name: tensor.detach().contiguous() for name, tensor in published.items()}
    write_tensors(folder / ADAPTER_WEIGHTS, contiguous, metadata)
    write_json(folder / ADAPTER_CONFIG, values)


def load_adapter_folder(folder: Path | str, config: Config) -> SavedAdapter:
    """Load an adapter of a model from a folder of PEFT, ours or LitGPT, or from a training checkpoint of ours.

    Raises:
        UserError: in one line, if a file is missing or damaged, or the adapter is of another kind or for another base.
    """
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).is_file() and (folder / LITGPT_WEIGHTS).is_file():
        settings, tensors = load_litgpt_lora(folder, config)
        check_shapes(tensors, config)
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        return SavedAdapter(settings, tensors, config, read_base_name(folder), BaseSettings(dtype))
    values = read_json(folder / ADAPTER_CONFIG)
    values = values if isinstance(values, dict) else {}
    base = str(values.get("base_model_name_or_path") or "")
    if OWN_KEY in values:
        return load_own_format(folder, values[OWN_KEY], base, config)
    peft_types = ["LORA", *(tuner.peft_type for tuner in PEFT_TUNERS)]
    if values.get("peft_type") not in peft_types:
        kind = f"peft_type: {values.get('peft_type')!r}"
        raise UserError(f"{folder / ADAPTER_CONFIG}: {kind} is not one of {', '.join(peft_types)}; {MERGE}")
    path, tensors, metadata = read_peft_tensors(folder)
    published = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    try:
        notes = json.loads(metadata.get(OWN_KEY, "null"))
        with name_file(folder / ADAPTER_CONFIG, "tuner"):
            adapter = convert_from_peft(published, values, notes, config)
        return replace(adapter, base=base, base_settings=BaseSettings(**(notes or {}).get("run", {})))
    except UserError as error:
        trained_on = f" (trained on {base})" if base else ""
        raise UserError(f"{path}{trained_on}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: not a readable adapter ({type(error).__name__}: {error})") from None


def read_peft_tensors(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """Read the tensors in a folder of PEFT: the path of their file, the tensors by name, and the file's metadata."""
    path = folder / PEFT_BIN
    if path.is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
        return path, load_state_dict(path), {}
    if path.is_file():
        warn_once(f"{folder}: reads {ADAPTER_WEIGHTS}, not {PEFT_BIN} beside it, which may hold other weights")
    files = SafetensorsFiles([folder / ADAPTER_WEIGHTS])
    return folder / ADAPTER_WEIGHTS, {name: files.read(name) for name in files.tensors}, files.metadata


def convert_from_peft(
    published: Mapping[str, Tensor], values: Mapping[str, Any], notes: Any, config: Config
) -> SavedAdapter:
    """An adapter in PEFT's format.

    Args:
        published: by their names without the prefix.
        values: the content of `adapter_config.json`.
        notes: our entry of the file's metadata; None for an adapter that was written by other software.
        config: of the base model.

    Raises:
        UserError: if an option is not supported, or the adapter belongs to another base.
    """
    if notes is None:
        check_options(values)
    if (converted := convert_tuner_from_peft(published, values, config)) is not None:
        settings, tensors = converted
        return SavedAdapter(type(settings)(**notes["settings"]) if notes else settings, tensors, config)
    adapter = convert_lora_from_peft(published, values, notes, config)
    check_shapes(adapter.tensors, adapter.config)
    check_new_rows(adapter, config)
    return adapter


def load_own_format(folder: Path, choice: Any, base: str, config: Config) -> SavedAdapter:
    """Load an adapter under our own names from its file or its training checkpoint."""
    try:
        with name_file(folder / ADAPTER_CONFIG, "tuner"):
            settings = TUNERS[choice["class_path"]](**choice["init_args"])
        base_settings = BaseSettings(**choice.get("run", {}))
        config = replace(config, **choice.get("model", {}))
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG}: {OWN_KEY}: not the settings of a tuner ({error})") from None
    if (folder / PROGRESS).is_file():
        return SavedAdapter(settings, dict(iter_checkpoint_weights(folder)), config, base, base_settings)
    files = SafetensorsFiles([folder / ADAPTER_WEIGHTS])
    return SavedAdapter(settings, {name: files.read(name) for name in files.tensors}, config, base, base_settings)


def check_shapes(tensors: Mapping[str, Tensor], config: Config) -> None:
    """Compare every tensor's shape with that of the parameter it belongs to.

    Raises:
        UserError: naming the first that does not fit.
    """
    for name, parameter in list_parameters(config).items():
        shape = tuple(parameter.shape)
        *stack, rows, columns = shape if len(shape) > 1 else (*shape, 0)
        sizes = {"lora_a": (-1, columns), "lora_b": (rows, -1), "lora_magnitude": (rows,)}
        expected = {
            get_added_name(name, key + suffix): (*stack, *size)
            for key, size in sizes.items()
            for suffix in ("", "_first")
        }
        for added, wanted in {**expected, name + COPY_SUFFIX: shape}.items():
            actual = tuple(tensors[added].shape) if added in tensors else wanted
            if len(actual) != len(wanted) or any(a != b for a, b in zip(actual, wanted, strict=True) if b != -1):
                raise UserError(
                    f"{added} is {list(actual)}, but the model's {name} is {list(shape)}; load its own base"
                )
