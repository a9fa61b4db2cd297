"""Read published image codecs from folders of their own, or of the models that have them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litgpt.errors import UserError
from litgpt.files import read_json_object
from litgpt.model.colors import check_color, check_scale
from litgpt.model.vq_codec import VQCodec
from litgpt.model.vq_shape import VQ_FAMILIES, read_vq_shape

PREFIXES = ("", "vqmodel.", "model.vqmodel.")
"""What the names of a codec's tensors begin with, alone and in the folder of a model."""
COLOR_KEYS = ("image_mean", "image_std")
USUAL_SCALE = 1 / 255  # of the values of pixels, before colors are normalized
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
"""The file of the settings of images, and that which newer versions of transformers write instead."""


def find_vq_values(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config of a published codec in that of a folder; None if there is none."""
    nested = values.get("vq_config")
    if not isinstance(nested, Mapping):
        return dict(values) if str(values.get("model_type")) in VQ_FAMILIES else None
    kind = str(nested.get("model_type") or f"{values.get('model_type')}_vqgan")
    return {**nested, "model_type": kind} if kind in VQ_FAMILIES else None


def load_vq_codec(folder: Path, values: Mapping[str, Any], size: int | None) -> VQCodec:
    """Load the published codec in a folder, on the CPU, for inference.

    Args:
        values: of its config.
        size: as in `read_vq_shape`.

    Raises:
        UserError: if the config is not supported, or the weights do not match it.
    """
    values = {**values, **read_colors(folder)}
    shape, tensors = read_vq_shape(values, folder / "config.json", size), read_vq_tensors(folder)
    has_decoder = shape.family.needs_decoder or any(name.startswith("decoder.") for name in tensors)
    with torch.device("meta"):
        codec = VQCodec(shape, has_decoder=has_decoder)
    wanted = {shape.publish(name, tensor)[0]: (name, tensor.shape) for name, tensor in codec.state_dict().items()}
    if faults := sorted(wanted.keys() ^ tensors.keys()):
        kind = "missing" if faults[0] in wanted else "unknown"
        raise UserError(f"{folder}: not the weights of config.json ({faults[0]} is {kind})")
    state = {}
    for published, tensor in tensors.items():
        name, expected = wanted[published]
        if tensor.numel() != expected.numel():
            raise UserError(
                f"{folder}: not the weights of config.json ({published} has {list(tensor.shape)}, not {list(expected)})"
            )
        state[name] = tensor.reshape(expected).to(torch.float32 if tensor.is_floating_point() else tensor.dtype)
    codec.load_state_dict(state, assign=True)
    return codec.eval().requires_grad_(False)


def read_colors(folder: Path) -> dict[str, list[float]]:
    """How the processor in a folder normalizes colors, of pixels from 0 to 1; empty without one.

    Raises:
        UserError: if it does not, or its file is damaged.
    """
    path, settings = folder / PREPROCESSOR, read_json_object(folder / PREPROCESSOR)
    if not path.is_file():
        path = folder / PROCESSOR
        settings = read_json_object(path).get("image_processor") or {}
    if not isinstance(settings, Mapping):
        raise UserError(f"{path}: image_processor: {settings} is not supported; download the file again")
    for step in ("do_rescale", "do_normalize"):
        if settings.get(step) is False:
            raise UserError(f"{path}: {step}: false is not supported; use true")
    scale = settings.get("rescale_factor")
    share = 1.0 if scale is None else check_scale(path, scale) / USUAL_SCALE
    given = {key: settings[key] for key in COLOR_KEYS if settings.get(key) is not None}
    return {key: [number / share for number in check_color(path, key, value)] for key, value in given.items()}


def read_vq_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the codec in the files of a folder, by their published names.

    Raises:
        UserError: if there are none, or a file is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    try:
        names = dict[Path, set[str]]()
        for path in files:
            with safe_open(path, "pt") as file:
                names[path] = set(file.keys())
        known = set().union(*names.values())
        prefix = next((each for each in PREFIXES if f"{each}quantize.embedding.weight" in known), None)
        if prefix is None:
            raise UserError(f"{folder}: not the weights of config.json (no codebook in *.safetensors)")
        tensors = dict[str, Tensor]()
        for path, keys in names.items():
            with safe_open(path, "pt") as file:
                tensors |= {key[len(prefix) :]: file.get_tensor(key) for key in keys if key.startswith(prefix)}
        return tensors
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: a file of weights is damaged ({str(error)[:160]}); download it again") from None
