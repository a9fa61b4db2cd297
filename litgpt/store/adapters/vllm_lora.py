"""LoRA in the shape that vLLM applies, and a refusal of what it would leave out.

vLLM finds the pair of a layer by the layer's published name. Most of its releases scale all pairs by the
`lora_alpha / r` of `adapter_config.json`, and read no patterns of ranks and scales (`vllm/lora/peft_helper.py`). It
serves the weights of the base model, also where a file has others (`vllm/lora/lora_model.py`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.names import TensorMapping
from litgpt.recipe.tuner import LoRA
from litgpt.store.adapters.lora_pairs import COPY_SUFFIX, find_parts, strip_ending
from litgpt.store.adapters.peft_experts import is_fused, is_router
from litgpt.store.adapters.peft_lora import PAIR, convert_lora_to_peft, list_published_mappings
from litgpt.store.adapters.saved_adapter import SavedAdapter, list_changes

MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of `--max-lora-rank` that all releases of vLLM have."""
VOCABULARY_LAYERS = ("model.embed_tokens", "lm_head")
"""The only names of an embedding and a head that vLLM adapts."""


def convert_lora_to_vllm(adapter: SavedAdapter, base: Config, cure: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the content of `adapter_config.json`: pairs are padded to one rank, and have one scale.

    Args:
        base: the config of the base model.
        cure: what to do with an adapter that is refused.

    Raises:
        UserError: naming what vLLM would leave out of the adapter, or apply otherwise.
    """
    settings = adapter.settings
    if not isinstance(settings, LoRA):
        raise UserError(f"tuner: {type(settings).__name__} is not a tuner that vLLM applies; {cure}")
    for key, value in [*list_base_changes(adapter, base), *list_ignored(adapter, settings)]:
        raise UserError(f"{key}: {value}; {cure}")
    published, _, values = convert_lora_to_peft(adapter.tensors, settings, adapter.config, adapter.base)
    rank = max(tensor.shape[-2] for name, tensor in published.items() if is_a(name))
    if rank > MAX_LORA_RANKS[-1]:
        raise UserError(f"tuner.r: {rank} is more than vLLM's largest rank, {MAX_LORA_RANKS[-1]}; {cure}")
    tensors = {name: pad_rank(tensor, rank, is_a=is_a(name)) for name, tensor in published.items()}
    values |= {"r": rank, "lora_alpha": settings.scale * rank, "use_rslora": False, "bias": "none"}
    return tensors, values | {"rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0}


def is_a(name: str) -> bool:
    """Whether a tensor of PEFT's is the A of a pair, not the B."""
    match = PAIR.fullmatch(name)
    assert match, f"{name} is not of a pair"
    return match["half"].endswith("A")


def pad_rank(tensor: Tensor, rank: int, *, is_a: bool) -> Tensor:
    """A (rank, in) or B (out, rank) with zeros for the ranks that it lacks."""
    return pad(tensor, (0, 0, 0, rank - tensor.shape[0]) if is_a else (0, rank - tensor.shape[1]))


def list_base_changes(adapter: SavedAdapter, base: Config) -> Iterator[tuple[str, str]]:
    """The keys, and reasons, for which the adapter is not one of the base model as it is published."""
    for name, value in list_changes(base, adapter.config).items():
        yield f"model_config.{name}", f"{value} differs from the base's {getattr(base, name)}, which vLLM serves"
    for name, value in adapter.base_settings.model_config.items():
        yield f"model_config.{name}", f"{value} was set in training, and vLLM serves the base without it"
    for name in (*adapter.base_weights, *adapter.token_rows):
        yield name, "comes with the adapter, and vLLM serves that of the base"
    settings, quantize = adapter.settings, adapter.base_settings.quantize
    if isinstance(settings, LoRA) and settings.init == "loftq" and quantize:
        yield "tuner.init", f"loftq corrects the error of the base in {quantize}, and vLLM serves it in full precision"


def list_ignored(adapter: SavedAdapter, settings: LoRA) -> Iterator[tuple[str, str]]:
    """The keys, and reasons, of what vLLM would ignore in the adapter itself."""
    config = adapter.config
    if settings.dora:
        yield "tuner.dora", "true is not applied by vLLM"
    for name in (name.removesuffix(COPY_SUFFIX) for name in adapter.tensors if name.endswith(COPY_SUFFIX)):
        if settings.bias != "none" and name.endswith("bias"):
            yield "tuner.bias", f"{settings.bias} is not applied by vLLM ({name} is trained)"
        yield "tuner.modules_to_save", f"{name.rpartition('.')[0]} is not applied by vLLM"
    for mapping in dict.fromkeys(list_published_mappings(config).values()):
        if parts := find_parts(mapping, adapter.tensors):
            for reason in explain_layer(mapping, config):
                yield "tuner.target_modules", f"{parts[0].name.removesuffix('.weight')} {reason}"


def explain_layer(mapping: TensorMapping, config: Config) -> Iterator[str]:
    """Why vLLM would not apply the update of a published matrix."""
    layer = strip_ending(mapping.hf_name)
    if is_fused(mapping):
        yield f"is published as one tensor of all experts, {layer}, whose update not every release of vLLM applies"
    if is_router(mapping):
        yield "is a router, whose update not every release of vLLM applies"
    if mapping.names[0].endswith(".kv_up.weight"):
        yield "is absorbed into other products by vLLM's latent attention, without its update"
    if mapping.names[0] in ("embedding.weight", "head.weight"):
        if config.tie_embeddings:
            yield "is both embedding and head, of which vLLM adapts the embedding alone"
        elif layer not in VOCABULARY_LAYERS:
            yield f"is published as {layer}, and vLLM adapts {' and '.join(VOCABULARY_LAYERS)} alone"


def choose_max_rank(values: Mapping[str, Any]) -> int:
    """The value of `--max-lora-rank` with which vLLM loads an adapter, given its `adapter_config.json`."""
    return next(rank for rank in MAX_LORA_RANKS if rank >= values["r"])
