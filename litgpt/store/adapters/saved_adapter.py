"""An adapter as it is loaded, and the base model with the changes that the training of the adapter made to it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.recipe.tuner import Tuner
from litgpt.store.adapters.lora_pairs import COPY_SUFFIX
from litgpt.store.published_tensor import list_parameters
from litgpt.store.tensor_audit import list_published

VOCABULARY_TENSORS = ("embedding.weight", "head.weight", "head.bias")
"""The parameters with a row for each token."""
CHANGED_FIELDS = ("tie_embeddings", "vocab_size", "padded_vocab_size", "output")
"""The fields of a base model's config that the training of an adapter may change."""


@dataclass(frozen=True)
class BaseSettings:
    """The precision, and changes of the configuration, of the base model during the training of an adapter.

    Attributes:
        dtype: the name of the torch type of its weights (float32); None if unknown.
        quantize: the quantization of its matrices (bnb.nf4); None without one.
        model_config: the fields of its configuration that the run changed.
    """

    dtype: str | None = None
    quantize: str | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, without changes of the configuration if there are none."""
        return {key: value for key, value in asdict(self).items() if key != "model_config" or value}


UNKNOWN_SETTINGS = BaseSettings()


class TokenRows(NamedTuple):
    """Trained rows (N, D) of the embedding or the head, and the ids (N,) of their tokens."""

    ids: Tensor
    rows: Tensor


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a folder.

    Attributes:
        tensors: under our names.
        config: the shape of the model with the adapter: the base's, unless training untied or resized its embedding.
        base: the name or path of the base model.
        base_weights: parameters of the base that come with the adapter, under our names.
        token_rows: trained rows of tokens, by the name of our parameter.
        training_error: why the adapter cannot be trained further; empty if it can.
    """

    settings: Tuner
    tensors: dict[str, Tensor]
    config: Config
    base: str = ""
    base_settings: BaseSettings = UNKNOWN_SETTINGS
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    training_error: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """The type in which it was trained."""
        if self.base_settings.dtype:
            return getattr(torch, self.base_settings.dtype)
        return Counter(tensor.dtype for tensor in self.tensors.values()).most_common(1)[0][0]

    def changes_base(self, base: Config) -> bool:
        """Whether the model that the adapter is for has other weights or another shape than its base."""
        return bool(self.base_weights or self.token_rows or list_changes(base, self.config))


def list_changes(base: Config, config: Config) -> dict[str, Any]:
    """The fields that the training of an adapter changed in the config of its base."""
    values = {name: getattr(config, name) for name in CHANGED_FIELDS}
    return {name: value for name, value in values.items() if value != getattr(base, name)}


def iter_changed_base(
    tensors: Iterable[tuple[str, Tensor]],
    base: Config,
    config: Config,
    base_weights: Mapping[str, Tensor] = MappingProxyType({}),
    token_rows: Mapping[str, TokenRows] = MappingProxyType({}),
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the base model as they were in the training of an adapter.

    A resized vocabulary has fewer rows, or more, which are zero unless the adapter has their values; a head that is
    no longer tied to the embedding starts as its copy. A reward model has zeros for the scores in place of a head.

    Args:
        tensors: every parameter of the base, under our names.
        base: the config of the base.
        config: that of the model with the adapter.
        base_weights, token_rows: as in `SavedAdapter`.
    """
    is_scored = config.output == "score" and base.output != "score"
    for name, tensor in tensors:
        if is_scored and name.startswith("head."):
            continue
        value = resize_rows(tensor, config) if name in VOCABULARY_TENSORS else tensor
        value = base_weights.get(name, value)
        yield name, replace_rows(value, token_rows.get(name))
        if is_scored and name == "embedding.weight":
            yield "score.weight", tensor.new_zeros(1, config.n_embd)
        elif name == "embedding.weight" and base.tie_embeddings and not config.tie_embeddings:
            yield "head.weight", replace_rows(base_weights.get("head.weight", value), token_rows.get("head.weight"))


def replace_rows(tensor: Tensor, trained: TokenRows | None) -> Tensor:
    """The tensor with the trained rows of tokens."""
    return tensor if trained is None else tensor.index_copy(0, trained.ids, trained.rows.to(tensor.dtype))


def resize_rows(tensor: Tensor, config: Config) -> Tensor:
    """The rows of the tokens of a vocabulary; those that the tensor lacks are zero."""
    rows = config.padded_vocab_size or 0
    missing = rows - tensor.shape[0]
    return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing > 0 else tensor[:rows]


def check_new_rows(adapter: SavedAdapter, base: Config) -> None:
    """Check that an adapter has the values of the tokens that were added to its base.

    Raises:
        UserError: if it has not.
    """
    rows, base_rows = adapter.config.padded_vocab_size or 0, base.padded_vocab_size or 0
    if rows <= base_rows:
        return
    complete = {name.removesuffix(COPY_SUFFIX) for name in adapter.tensors if name.endswith(COPY_SUFFIX)}
    complete |= adapter.base_weights.keys()
    if base.tie_embeddings and "embedding.weight" in adapter.base_weights:
        complete.add("head.weight")  # its copy
    names = [name for name in VOCABULARY_TENSORS if name in list_parameters(adapter.config)]
    if missing := [name for name in names if name not in complete]:
        raise UserError(
            f"the vocabulary was resized from {base_rows} to {rows} rows, and {missing[0]} with the new rows is not in "
            "the file; save the adapter with save_embedding_layers=True"
        )


FINETUNE_MERGED = "merge it (litgpt merge_lora) and finetune the merged model"


def check_further_training(adapter: SavedAdapter, folder: Path, base: Config, *, cure: str = FINETUNE_MERGED) -> None:
    """Check that an adapter can be trained further on the base in a folder.

    Raises:
        UserError: if an option of it is not supported, or it comes with weights of another base.
    """
    if adapter.training_error:
        raise UserError(f"{adapter.training_error}, which is not supported in training; {cure}")
    wanted = {name if name in list_parameters(base) else "embedding.weight": name for name in adapter.base_weights}
    for published in list_published(folder, base, warn=lambda _line: None) if wanted else []:
        for name in wanted.keys() & set(published.mapping.names):
            weight, tensor = adapter.base_weights[wanted[name]], published.read()[name]
            if not torch.equal(weight, tensor.to(weight.dtype)):
                shapes = f"{list(weight.shape)} in the adapter, {list(tensor.shape)} in the base"
                raise UserError(f"{wanted[name]} is not trained, but differs from the base's ({shapes}); {cure}")
