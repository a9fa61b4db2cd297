"""Load a model for inference from a model folder, a training checkpoint, or an adapter and its base model."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from litgpt import adapt
from litgpt.adapt import loftq, quantization
from litgpt.code_pages import return_code_pages
from litgpt.errors import UserError
from litgpt.files import CHECKPOINTS
from litgpt.messages import print_message
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.recipe.object_url import find_url
from litgpt.recipe.tuner import LoRA
from litgpt.store import hub
from litgpt.store.adapters.folder import (
    ADAPTER_CONFIG,
    is_adapter,
    list_subfolder_adapters,
    load_adapter_folder,
    read_base_name,
    read_base_revision,
)
from litgpt.store.adapters.saved_adapter import SavedAdapter, iter_changed_base
from litgpt.store.checkpoint_load import resolve_checkpoint
from litgpt.store.config_overrides import override_config
from litgpt.store.load_model import iter_tensors, load_config, load_model
from litgpt.store.object_store import download_model
from litgpt.store.tensor_audit import list_published
from litgpt.store.tokenizer_files import has_prompt_format, has_tokenizer

WEIGHT_DTYPES = {
    "64-true": torch.float64,
    "32-true": torch.float32,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
}
"""The type of the weights, by `precision`."""
AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The type of matrix products where it differs from that of the weights, by `precision`."""


def find_folder(name: Path | str, *, access_token: str | None = None) -> Path:
    """The folder of a model; one that does not exist locally is downloaded into `checkpoints/`.

    Args:
        name: a folder, a file in one, a folder under `checkpoints/`, a URL of an object store, the hub's org/name, or a
            known model's name.

    Raises:
        UserError: if it is none of these, or the download fails.
    """
    if (path := hub.find_local_folder("checkpoint_dir", Path(name))) is not None:
        return path.parent if path.is_file() and path.suffix != ".gguf" else path
    if url := find_url(name):
        return download_model("checkpoint_dir", url, print_message)
    repository = hub.find_repository("checkpoint_dir", Path(name))
    try:
        return hub.download(repository, CHECKPOINTS, access_token=access_token)
    except UserError as error:
        raise UserError(f"checkpoint_dir: {name} is not a folder, and {error.detail}") from None


def resolve_model_folder(folder: Path) -> Path:
    """The folder with the weights: of a run, its latest checkpoint or else its final model; otherwise the folder.

    Raises:
        UserError: naming a damaged file of a checkpoint, or the adapters in subfolders if the folder holds no model.
    """
    step = resolve_checkpoint(folder) if folder.is_dir() else None
    if step is None and not (folder / "config.json").is_file() and (folder / "final").is_dir():
        return folder / "final"
    if step is None and (names := list_subfolder_adapters(folder)):
        raise UserError(f"checkpoint_dir: {folder} has adapters in subfolders; give one of them: {', '.join(names)}")
    return step or folder


def find_main_dtype(folder: Path, config: Config) -> torch.dtype:
    """The type of most weights in a model folder."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in list_published(folder, config, warn=lambda _line: None):
        counts[tensor.meta.dtype] += tensor.meta.numel()
    return counts.most_common(1)[0][0]


def build_empty_model(config: Config, dtype: torch.dtype, device: torch.device) -> GPT:
    """A model with uninitialized weights of this type, except those that the shape keeps in float32."""
    return GPT.on_meta(config, dtype).to_empty(device=device).eval()


def find_base_folder(adapter: Path, base: Path | None = None) -> Path:
    """The folder of the base model of an adapter: `base`, or the one that the adapter names.

    Raises:
        UserError: if it is not found, or is an adapter itself.
    """
    name, revision = str(base or read_base_name(adapter)), None if base else read_base_revision(adapter)
    key = "pretrained_checkpoint_dir" if base else f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path"
    if not name:
        raise UserError(f"{key}: empty; set the folder of the base model")
    if revision and not Path(name).is_dir():
        raise UserError(
            f"{adapter / ADAPTER_CONFIG}: revision: {revision} of {name} is not downloaded; download it, and set "
            "base_model_name_or_path to its folder"
        )
    try:
        folder = resolve_model_folder(find_folder(name))
    except UserError as error:
        raise UserError(f"{key}: {error.detail}") from None
    if is_adapter(folder):
        raise UserError(f"{key}: {name} is an adapter too; merge it into its base first (litgpt merge_lora)")
    return folder


def find_tokenizer_folder(folder: Path, base: Path | None = None) -> Path:
    """The folder with the tokenizer of a model's folder or file; that of an adapter may be its base's.

    Args:
        base: the folder of the model that was finetuned; None for the base that an adapter names.
    """
    if not folder.is_dir():
        return folder.parent
    if has_tokenizer(folder):
        return folder
    return base or (find_base_folder(folder) if is_adapter(folder) else folder)


def find_format_folder(folder: Path, base: Path | None = None) -> Path:
    """The folder with the prompt format of a model's folder or file, which may have one without a tokenizer."""
    is_own = folder.is_dir() and has_prompt_format(folder)
    return folder if is_own else find_tokenizer_folder(folder, base)


def open_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    model_config: Mapping[str, Any] | None = None,
    base: Path | None = None,
) -> GPT:
    """The model in a folder that `resolve_model_folder` returned; of an adapter, its base with the adapter.

    Args:
        dtype: of the weights; None for that of the files.
        model_config: fields of the configuration to change, of a model that is not an adapter.
        base: the folder of the base of an adapter; None for the one that it names.

    Raises:
        UserError: if the folder has no model, or a damaged one.
    """
    if is_adapter(folder):
        base = base or find_base_folder(folder)
        return open_with_adapter(load_adapter_folder(folder, load_config(base)), base, device=device, dtype=dtype)
    config = override_config(load_config(folder), model_config or {})
    model = build_empty_model(config, dtype or find_main_dtype(folder, config), device)
    if device.type == "cpu":
        return_code_pages()
    load_model(model, folder, mmap=True)
    return model


def open_with_adapter(
    adapter: SavedAdapter,
    base: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quantize: str | Literal["as_trained"] | None = "as_trained",
    exact: bool = False,
) -> GPT:
    """The model in a folder with an adapter.

    Args:
        dtype: of the weights; None for the type that the adapter was trained in.
        exact: keep the parameters of the adapter in float32 or wider; only for a model that computes in that dtype.
        quantize: format of the blocks' frozen matrices; None for no quantization.

    Raises:
        UserError: if adapter or base is missing or damaged, or the adapter belongs to another base model.
    """
    kind = adapter.base_settings.quantize if quantize == "as_trained" else quantize
    dtype, overrides = dtype or adapter.dtype, adapter.base_settings.model_config
    base_config = load_config(base)
    config = override_config(adapter.config, overrides)
    changes = (base_config, config, adapter.base_weights, adapter.token_rows)
    if kind:
        tensors = iter_changed_base(iter_tensors(base, base_config), *changes)
        model = build_quantized(config, tensors, kind, device=device, dtype=dtype)
    elif adapter.changes_base(base_config):
        tensors = iter_changed_base(open_model(base, device=device, dtype=dtype).named_parameters(), *changes)
        model = build_empty_model(config, dtype, device)
        model.load_state_dict(dict(tensors))
    else:
        model = open_model(base, device=device, dtype=dtype, model_config=overrides)
    try:
        adapt.attach(model, adapter.settings)
        for parameter in adapt.get_adapter_parameters(model).values():
            if exact:
                parameter.data = parameter.data.to(torch.promote_types(adapter.dtype, torch.float32))
        adapt.check_adapter(model, adapter.tensors)
    except UserError as error:
        reason = str(error).removeprefix("tuner.")  # which is no key of the command
        raise UserError(f"{base} is not the base of this adapter: {reason}") from None
    adapt.load_adapter(model, adapter.tensors)
    if kind and isinstance(adapter.settings, LoRA) and adapter.settings.loftq_iterations > 1:
        loftq.quantize_for_adapter(model, iter_changed_base(iter_tensors(base, base_config), *changes), device=device)
    return model.eval()


def build_quantized(
    config: Config, tensors: Iterable[tuple[str, torch.Tensor]], kind: str, *, device: torch.device, dtype: torch.dtype
) -> GPT:
    """A model with these weights, the blocks' matrices quantized as in training."""
    model = GPT.on_meta(config, dtype).eval()
    quantization.quantize(model, kind)
    model.to_empty(device=device)
    quantization.load_quantized(model, tensors, device=device)
    return model


@torch.no_grad()
def convert_model(model: GPT, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move a model and, if `dtype` is not None, cast the weights that the shape does not keep in float32."""
    template = {} if dtype is None else dict(GPT.on_meta(model.config, dtype).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # not a quantized one
            target = template[name].dtype if name in template else dtype or parameter.dtype
            parameter.data = parameter.data.to(device, target)
        elif parameter.device != device:
            parameter.data = parameter.data.to(device)


def build_random_model(name: str, *, device: torch.device, dtype: torch.dtype | None) -> GPT:
    """A model with a known shape, or that of a folder, and weights initialized from torch's default generator."""
    config = load_config(Path(name)) if Path(name).is_dir() else Config.from_name(name)
    model = build_empty_model(config, dtype or torch.float32, device)
    initialize(model, int(torch.randint(2**31, ())))
    return model


def find_device(accelerator: str) -> torch.device:
    """The device for an `accelerator` of Lightning.

    Raises:
        UserError: if this machine has none of that kind.
    """
    if accelerator == "auto":
        return select_device()
    kind = "cuda" if accelerator == "gpu" else accelerator
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind):
        kinds = ", ".join(name for name, is_available in available.items() if is_available)
        raise UserError(f"accelerator: {accelerator!r} is not available; set auto or {kinds}")
    return torch.device(kind)


def select_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def parse_batch_size(value: Any) -> int | None:
    """The number of texts of a forward pass; None for `auto` and `auto:N`.

    Raises:
        UserError: if it is neither a number of 1 or more nor `auto`.
    """
    text = str(value)
    if text == "auto" or (text.startswith("auto:") and text[5:].isdigit()):
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"batch_size: {value} is not a number of texts; set 1 or more, or auto")
    return int(text)


def parse_device(name: str | None) -> torch.device:
    """The device of a name such as `cuda:1`; the accelerator or else the CPU for None.

    Raises:
        UserError: if this machine has no such device.
    """
    try:
        device = torch.device(name) if name else select_device()
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # an assertion in torch without CUDA
        raise UserError(f"device: {name} is not available on this machine; set cpu, or null") from None
    return device


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a name; None for None.

    Raises:
        UserError: for another name.
    """
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES.values()}
    if name is not None and name not in dtypes:
        raise UserError(f"dtype: {name} is not known; set one of {', '.join(dtypes)}")
    return None if name is None else dtypes[name]


def select_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 on an accelerator, or float16 where that is not supported; None on a CPU, for the type of the files."""
    if device.type == "cpu":
        return None
    return torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16
