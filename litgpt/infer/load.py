"""Open a model to write with: find its folder, take it as it is published or as a run saved it, onto one device."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from litgpt import adapt
from litgpt.adapt import quantization
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.model.registry import list_model_names
from litgpt.store import hub
from litgpt.store.adapters.folder import ADAPTER_CONFIG, SavedAdapter, is_adapter, load_adapter_folder, read_base_name
from litgpt.store.checkpoint_load import PROGRESS, iter_checkpoint_weights, resolve_checkpoint
from litgpt.store.load_model import iter_tensors, load_config, load_model
from litgpt.store.tensor_audit import list_published
from litgpt.store.tokenizer_files import find_tokenizer_files

CHECKPOINTS = Path("checkpoints")
TYPES = {
    "64-true": torch.float64,
    "32-true": torch.float32,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
}
"""What weights are kept in, by `precision`."""
COMPUTE = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""What matrix products are computed in where that is another type."""


def find_folder(name: Path | str, *, access_token: str | None = None) -> Path:
    """The folder that a path or name means; a model that is not here yet is downloaded into `checkpoints/`.

    Args:
        name: a folder, a file in one, a folder under `checkpoints/`, the hub's org/name, or a known model's name.

    Raises:
        UserError: if it is none of these, or the hub cannot be reached.
    """
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_file():
        return path.parent
    if path.is_dir():
        return path
    if not path.is_absolute() and (CHECKPOINTS / path).is_dir():
        return CHECKPOINTS / path
    repository = str(name) if hub.REPOSITORY.fullmatch(str(name)) else published_as(str(name))
    if repository is None or path.is_absolute() or path.parts[0] == CHECKPOINTS.name:
        raise UserError(f"checkpoint_dir: {name} is no folder; give a model's folder or its org/name on the hub")
    if (CHECKPOINTS / repository).is_dir():
        return CHECKPOINTS / repository
    try:
        return hub.download(repository, CHECKPOINTS, access_token=access_token)
    except UserError as error:
        raise UserError(f"checkpoint_dir: {name} is not a folder, and {error.detail}") from None


def published_as(name: str) -> str | None:
    """The org/name of a known model; None for other names."""
    if name not in list_model_names():
        return None
    hub_name = Config.from_name(name).hf_config
    return f"{hub_name['org']}/{hub_name['name']}" if "org" in hub_name else None


def inside_run(folder: Path) -> Path:
    """The folder with the weights: the newest checkpoint if `folder` is of a run, else its finished model, or itself.

    Raises:
        UserError: naming a file of a checkpoint that is damaged.
    """
    step = resolve_checkpoint(folder) if folder.is_dir() else None
    if step is None and not (folder / "config.json").is_file() and (folder / "final").is_dir():
        return folder / "final"
    return step or folder


def kept_in(folder: Path, config: Config) -> torch.dtype:
    """The type that most of the weights in a model folder have."""
    numbers: Counter[torch.dtype] = Counter()
    for tensor in list_published(folder, config, warn=lambda line: None):
        numbers[tensor.meta.dtype] += tensor.meta.numel()
    return numbers.most_common(1)[0][0]


def empty_model(config: Config, dtype: torch.dtype, device: torch.device) -> GPT:
    """A model whose weights hold nothing yet; what a shape needs in float32 is in float32 whatever `dtype` says."""
    return GPT.on_meta(config, dtype).to_empty(device=device).eval()


def base_of(folder: Path, given: Path | None = None) -> Path:
    """The folder of the model that an adapter is for: the one given, or else the one that the adapter names.

    Raises:
        UserError: if it is not found, or is an adapter itself.
    """
    named = str(given or read_base_name(folder))
    where = "pretrained_checkpoint_dir" if given else f"{folder / ADAPTER_CONFIG}: base_model_name_or_path"
    if not named:
        raise UserError(f"{where}: empty; name the folder of the model there that the adapter is for")
    try:
        base = inside_run(find_folder(named))
    except UserError as error:
        raise UserError(f"{where}: {error.detail}") from None
    if is_adapter(base):
        raise UserError(f"{where}: {named} is an adapter too; merge it into its base first (litgpt merge_lora)")
    return base


def texts_in(folder: Path) -> Path:
    """The folder with the tokenizer of the model in a folder, or in a file: an adapter's may be that of its base."""
    if not folder.is_dir():
        return folder.parent
    return base_of(folder) if is_adapter(folder) and not find_tokenizer_files(folder) else folder


def open_model(folder: Path, *, device: torch.device, dtype: torch.dtype | None = None) -> GPT:
    """The model in a folder, as `inside_run` names it; if that is an adapter, the base that it names and the adapter.

    Args:
        dtype: of the weights; None keeps that of the files.

    Raises:
        UserError: if the folder holds no model, or one that is damaged.
    """
    if is_adapter(folder):
        base = base_of(folder)
        return open_adapted(load_adapter_folder(folder, load_config(base)), base, device=device, dtype=dtype)
    config = load_config(folder)
    if not (folder / PROGRESS).is_file():
        model = empty_model(config, dtype or kept_in(folder, config), device)
        load_model(model, folder, mmap=True)
        return model
    model = empty_model(config, dtype or next(iter_checkpoint_weights(folder))[1].dtype, device)
    fill(model, iter_checkpoint_weights(folder))
    return model


def open_adapted(
    adapter: SavedAdapter,
    base: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quantize: str | Literal["as_trained"] | None = "as_trained",
    exact: bool = False,
) -> GPT:
    """The model in a folder with an adapter attached.

    Args:
        dtype: of the weights; None for what the adapter was trained in.
        exact: keep the adapter's own numbers in float32 at least, which not every layer computes with in other types.
        quantize: how the frozen matrices of the blocks are packed; None for not.

    Raises:
        UserError: if one of them is missing or damaged, or they do not fit together.
    """
    packing = adapter.run.quantize if quantize == "as_trained" else quantize
    dtype = dtype or adapter.dtype
    model = (
        open_quantized(base, packing, device=device, dtype=dtype)
        if packing
        else open_model(base, device=device, dtype=dtype)
    )
    try:
        adapt.attach(model, adapter.settings)
        for parameter in adapt.get_adapter_parameters(model).values():
            if exact:
                parameter.data = parameter.data.to(torch.promote_types(adapter.dtype, torch.float32))
        adapt.check_adapter(model, adapter.tensors)
    except UserError as error:
        raise UserError(f"{base} is not the base of this adapter: {error}") from None
    adapt.load_adapter(model, adapter.tensors)
    return model.eval()


def open_quantized(base: Path, kind: str, *, device: torch.device, dtype: torch.dtype) -> GPT:
    """The model in a folder with the matrices of its blocks packed, as training packs them."""
    config = load_config(base)
    model = GPT.on_meta(config, dtype).eval()
    quantization.quantize(model, kind)
    model.to_empty(device=device)
    quantization.load_quantized(model, iter_tensors(base, config), device=device)
    return model


@torch.no_grad()
def fill(model: nn.Module, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Copy every tensor into the parameter of its name."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        parameters[name].copy_(tensor)


@torch.no_grad()
def retype(model: GPT, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move a model's weights, and where `dtype` is not None cast those that need not stay in float32."""
    asked = {} if dtype is None else dict(GPT.on_meta(model.config, dtype).named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # not one that was quantized
            kept = asked[name].dtype if name in asked else dtype or parameter.dtype
            parameter.data = parameter.data.to(device, kept)
        elif parameter.device != device:
            parameter.data = parameter.data.to(device)


def random_model(name: str, *, device: torch.device, dtype: torch.dtype | None) -> GPT:
    """A model of a known shape, or that of a folder, with first weights drawn from torch's generator."""
    config = load_config(Path(name)) if Path(name).is_dir() else Config.from_name(name)
    model = empty_model(config, dtype or torch.float32, device)
    initialize(model, int(torch.randint(2**31, ())))
    return model


def device_named(accelerator: str) -> torch.device:
    """The device that an `accelerator` of Lightning's names.

    Raises:
        UserError: if this machine has none of that kind.
    """
    if accelerator == "auto":
        return best_device()
    kind = "cuda" if accelerator == "gpu" else accelerator
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(kind):
        able = ", ".join(name for name, there in here.items() if there)
        raise UserError(f"accelerator: {accelerator!r} is not here; give auto or {able}")
    return torch.device(kind)


def best_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def best_type(device: torch.device) -> torch.dtype | None:
    """bfloat16 on an accelerator, float16 where it has none of that; on a CPU None, which is the type of the files."""
    if device.type == "cpu":
        return None
    return torch.float16 if device.type == "cuda" and not torch.cuda.is_bf16_supported() else torch.bfloat16
