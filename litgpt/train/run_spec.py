"""What a run starts from: a shape, weights, data and a tokenizer, as each task finds them."""

import json
from dataclasses import dataclass
from pathlib import Path

from litgpt import adapt
from litgpt.adapt.llama_pro import expand_config
from litgpt.data.modules.instruction_sets import Alpaca
from litgpt.data.modules.litdata import TinyLlama
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.registry import list_model_names
from litgpt.parallel.precision import PRECISIONS, default_precision
from litgpt.recipe.data import DataModule
from litgpt.recipe.finetune import Finetune
from litgpt.recipe.pretrain import Pretrain, TokenizerArgs
from litgpt.recipe.tuner import Tuner
from litgpt.store.adapters.folder import (
    ADAPTER_CONFIG,
    BasePrecision,
    build_own_config,
    has_adapter,
    is_adapter,
    load_adapter_folder,
)
from litgpt.store.load_model import load_config


@dataclass(frozen=True)
class RunSpec:
    """What a run starts from.

    Attributes:
        task: what it is called where it is logged.
        weights: a model folder to take the first weights from; None draws them.
        tokenizer: made from the run's own text, instead of the one in `tokenizer_dir`.
        tuner: what is trained, and added to that end; None trains everything.
        quantize: how the frozen matrices of the blocks are packed; None for not.
        noise: alpha of the noise on embeddings while training; None for none.
        dtype: what the weights are kept in, as torch names it.
        base: the name or the path by which an adapter is to know the model.
        adapter: the folder of one whose training goes on; None to begin one.
    """

    task: str
    config: Config
    data: DataModule
    weights: Path | None
    tokenizer_dir: Path | None
    tokenizer: TokenizerArgs | None = None
    tuner: Tuner | None = None
    quantize: str | None = None
    noise: float | None = None
    dtype: str | None = None
    base: str = ""
    adapter: Path | None = None

    @property
    def adapted(self) -> bool:
        """Whether the run trains something beside the model's own weights."""
        return self.tuner is not None and self.tuner.adds

    @property
    def base_precision(self) -> BasePrecision:
        """How the model is kept while an adapter is trained."""
        return BasePrecision(self.dtype, self.quantize)

    def notes(self) -> dict[str, str]:
        """Files by which a training checkpoint of an adapter is known as one."""
        if self.tuner is None or not self.adapted:
            return {}
        return {ADAPTER_CONFIG: json.dumps(build_own_config(self.tuner, self.base, self.base_precision), indent=1)}

    def learning_rate_factor(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied by."""
        return self.tuner.get_lr_multiplier(name) if self.tuner else 1.0


def build_pretrain_spec(recipe: Pretrain) -> RunSpec:
    """A named shape, from scratch or with the weights of `initial_checkpoint_dir`.

    Raises:
        UserError: if the shape is not known or that is not a folder.
    """
    if recipe.initial_checkpoint_dir and not recipe.initial_checkpoint_dir.is_dir():
        raise UserError(f"initial_checkpoint_dir: {recipe.initial_checkpoint_dir} is not a folder")
    return RunSpec(
        task="pretrain",
        config=resolve_config(recipe),
        data=recipe.data or TinyLlama(),
        weights=recipe.initial_checkpoint_dir,
        tokenizer_dir=recipe.tokenizer_dir,
        tokenizer=recipe.tokenizer,
    )


def resolve_config(recipe: Pretrain) -> Config:
    """The model's shape: the named one, with the fields of `model_config` on top, or a whole `model_config`.

    Raises:
        UserError: if the name is unknown and there is no `model_config`, or a field is wrong.
    """
    overrides = {key: value for key, value in (recipe.model_config or {}).items() if value is not None}
    if recipe.train.tie_embeddings is not None:
        overrides["tie_embeddings"] = recipe.train.tie_embeddings
    if overrides.get("n_layer") and recipe.model_name not in list_model_names():
        return Config(**{"name": recipe.model_name} | overrides)
    return Config.from_name(recipe.model_name, **overrides)


def build_finetune_spec(recipe: Finetune, folder: Path, base: str, adapter: Path | None = None) -> RunSpec:
    """The model in a folder, with its own tokenizer.

    Args:
        base: the name or the path by which an adapter is to know it.
        adapter: the folder of one for this model whose training goes on.

    Raises:
        UserError: if the folder holds an adapter alone, or the adapter is not for this model.
    """
    if is_adapter(folder):
        raise UserError(
            f"checkpoint_dir: {folder} is an adapter; give its base here, and it as initial_adapter_dir to train it "
            "further, or fold it in first (litgpt merge_lora)"
        )
    config = load_config(folder)
    tuner = load_tuner_settings(adapter, config) if adapter else recipe.resolved_tuner
    return RunSpec(
        task="finetune",
        config=expand_config(config, tuner),
        data=recipe.data or Alpaca(),
        weights=folder,
        tokenizer_dir=folder,
        tuner=tuner,
        quantize=recipe.quantization,
        dtype=str(PRECISIONS[recipe.precision or default_precision()].storage).removeprefix("torch."),
        base=base,
        noise=recipe.neftune_alpha,
        adapter=adapter,
    )


def load_tuner_settings(adapter: Path, config: Config) -> Tuner:
    """The settings of the adapter in a folder, once it is known to be one for a model of this shape.

    Raises:
        UserError: if it is none.
    """
    if not has_adapter(adapter):
        raise UserError(f"initial_adapter_dir: {adapter} holds no adapter; give a folder with {ADAPTER_CONFIG}")
    model = GPT.on_meta(config)
    try:
        found = load_adapter_folder(adapter, config)
        adapt.attach(model, found.settings)
        adapt.check_adapter(model, found.tensors)
    except UserError as error:
        raise UserError(f"initial_adapter_dir: {error}") from None
    return found.settings
