"""Checks that need neither torch nor other processes: names, paths, layout, routers, and the tokenizer's size."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from litgpt.data import media
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.model.config import Config, override_fields
from litgpt.model.registry import has_config, list_model_names
from litgpt.parallel.model_sizes import check_model_sizes
from litgpt.recipe.chat import Chat
from litgpt.recipe.data_commands import DataInspect, DataPrepare
from litgpt.recipe.effect import check_effects, describe_no_effect
from litgpt.recipe.evaluate import Evaluate
from litgpt.recipe.finetune import Finetune
from litgpt.recipe.fp8 import FP8Args
from litgpt.recipe.generate import Generate, GenerateFinetuned, GenerateSpeculatively
from litgpt.recipe.merge_lora import MergeLora
from litgpt.recipe.moe import MoEArgs
from litgpt.recipe.object_url import check_client
from litgpt.recipe.pretrain import Pretrain
from litgpt.recipe.serve import Serve
from litgpt.recipe.store_commands import (
    ConvertFromLitgpt,
    ConvertPretrainedCheckpoint,
    ConvertToLitgpt,
    Validate,
    Verify,
)
from litgpt.recipe.train import MODALITIES, CheckpointArgs
from litgpt.recipe.training import Training
from litgpt.store import hub
from litgpt.store.step_folders import list_checkpoints, no_checkpoint_error
from litgpt.train.schedule import list_step_limits

StoredModel = Validate | Verify | ConvertToLitgpt | ConvertFromLitgpt | ConvertPretrainedCheckpoint | MergeLora
OWN_TOKENIZER = (
    "use the model's own tokenizer, or resize its embedding before (resize_token_embeddings in transformers)"
)


def check_pretraining(recipe: Pretrain) -> None:
    """Check the settings of a pretraining run before torch is imported.

    Raises:
        UserError: naming the first key that does not fit.
    """
    check_uploads(recipe.checkpoint)
    config, weights = resolve_config(recipe), recipe.initial_checkpoint_dir
    check_initial_weights(config, weights)
    check_run(recipe, config, layers=config.n_layer)
    if recipe.data is not None:
        recipe.data.check_files(has_tokenizer=bool(recipe.tokenizer_dir or recipe.tokenizer))
    check_modalities(recipe.loss.modalities, recipe.tokenizer_dir)
    if recipe.tokenizer_dir:
        check_vocabulary(Tokenizer(recipe.tokenizer_dir), config, has_weights=weights is not None)


def check_finetuning(recipe: Finetune) -> None:
    """Check the settings of a finetuning run before torch is imported, as far as its model is on this machine.

    Raises:
        UserError: naming the first key that does not fit.
    """
    check_uploads(recipe.checkpoint)
    folder = find_model_folder("checkpoint_dir", recipe.checkpoint_dir)
    if recipe.initial_adapter is not None:
        find_model_folder("initial_adapter_dir", recipe.initial_adapter)
    if recipe.preference_settings is not None and recipe.preference_settings.reference is not None:
        find_model_folder("preference.reference", recipe.preference_settings.reference)
    check_resumption(recipe)
    if recipe.data is not None:
        recipe.data.check_files(has_tokenizer=True)
    if folder is not None and is_base_model(folder) and recipe.initial_adapter is None:  # which may change the config
        values = Config.from_checkpoint(folder).to_dict()
        config = Config(**{**values, **override_fields(values, recipe.model_config or {})})
        order = recipe.resolved_tuner.get_block_order(config.n_layer)
        adapted = recipe.resolved_tuner.adds
        check_run(recipe, config, layers=len(order) if order else config.n_layer, adapted=adapted)
        check_vocabulary(Tokenizer(folder), config, has_weights=True)
        check_modalities(recipe.loss.modalities, folder)


def check_modalities(modalities: Sequence[str], tokenizer_dir: Path | None) -> None:
    """Check that a model has tokens of images, if only these or only the others are trained.

    Raises:
        UserError: if it has none.
    """
    if set(modalities) == set(MODALITIES):
        return
    if tokenizer_dir is None or media.codes.find_codec_folder(Tokenizer(tokenizer_dir)) is None:
        raise UserError(
            f"loss.modalities: {list(modalities)} needs a model that writes images; leave it out, or write the model's "
            "folder with `litgpt tokenizer extend`"
        )


def check_generation(recipe: Chat | Generate | Evaluate | Serve) -> None:
    """Check that the model of a command may exist.

    Raises:
        UserError: if it is neither a folder nor a name on the hub, or is a reward model.
    """
    check_language_model("checkpoint_dir", recipe.checkpoint_dir)


def check_finetuned_generation(recipe: GenerateFinetuned) -> None:
    """Check that a finetuned model and the one before may exist.

    Raises:
        UserError: as `check_generation`.
    """
    check_language_model("checkpoint_dir", recipe.checkpoint_dir)
    check_language_model(recipe.weights_key, recipe.weights_folder)


def check_speculation(recipe: GenerateSpeculatively) -> None:
    """Check that both models may exist.

    Raises:
        UserError: as `check_generation`.
    """
    check_language_model("draft_model_checkpoint_dir", recipe.draft_model_checkpoint_dir)
    check_language_model("target_model_checkpoint_dir", recipe.target_model_checkpoint_dir)


def check_language_model(key: str, name: Path) -> None:
    """Check that a model may exist, and is no reward model."""
    folder = find_model_folder(key, name)
    for path in (folder, folder / "final") if folder else ():
        if is_base_model(path) and Config.from_checkpoint(path).output == "score":
            raise UserError(f"{key}: {path} is a reward model, which computes scores, not text; give a language model")


def check_model(recipe: StoredModel) -> None:
    """Check that the folder or file that a command reads exists.

    Raises:
        UserError: if not.
    """
    if not recipe.checkpoint_dir.exists():
        raise UserError(
            f"checkpoint_dir: {recipe.checkpoint_dir} does not exist; set the folder of a model or of a run"
        )


def check_data(recipe: DataPrepare | DataInspect) -> None:
    """Check that the files of data exist, and its tokenizer.

    Raises:
        UserError: if not.
    """
    recipe.data.check_files(has_tokenizer=recipe.tokenizer_dir is not None)


def check_run(recipe: Training, config: Config, *, layers: int, adapted: bool = False) -> None:
    """Check the length of samples and of the run, its output folder, and the layout if `devices` is a number."""
    length = check_trained_model(recipe, config, adapted=adapted)
    answers = recipe.data.answers_per_sample if recipe.data else 1
    list_step_limits(replace(recipe.train, epochs=None), length, None, answers=answers)
    check_resumption(recipe)
    if (path := recipe.eval.task_path) is not None and not path.is_dir():
        raise UserError(f"eval.task_path: {path} is not a folder; set one with YAML files of tasks")
    if isinstance(recipe.devices, int) and recipe.devices > 0:
        check_model_sizes(
            recipe.parallel, recipe.parallel.resolve_dims(recipe.devices * recipe.num_nodes), config, layers
        )


def check_trained_model(recipe: Training, config: Config, *, adapted: bool) -> int:
    """Check that the settings of a run fit its model; returns the tokens per sample.

    Args:
        adapted: whether the run trains an adapter, not the model's own weights.

    Raises:
        UserError: naming the first one that does not.
    """
    check_towers(recipe, config)
    check_routing(recipe.moe, config, adapted=adapted)
    check_predictions(recipe, config, adapted=adapted)
    check_fp8(recipe.fp8, adapted=adapted)
    return resolve_sequence_length(recipe, config)


TOWER_NAMES = {"vision": "a vision", "audio": "an audio"}
TOWER_OBJECTIVES = ("next_token", "pairs", "kto")
"""The objectives that models with a tower are trained by."""
TOWER_COMMANDS = "finetune, finetune_full, align, dpo and kto"
"""The commands that have them."""


def check_towers(recipe: Training, config: Config) -> None:
    """Check that the settings of a run are supported for a model with a tower, or have an effect without one.

    Raises:
        UserError: naming the first one that is not.
    """
    groups = {key: getattr(recipe, key) for key in ("freeze", "rates") if hasattr(recipe, key)}
    towers = [part for part in TOWER_NAMES if getattr(config, part) is not None]
    for key, group in groups.items():
        names = [entry.name for entry in fields(group)]
        for name in names if not towers else TOWER_NAMES.keys() - towers:
            other = f"a model without {TOWER_NAMES.get(name, 'a')} tower"
            check_effects(group, f"{key}.", name, have_effect=False, other=other, cure="remove the line")
    if towers and (not groups or recipe.objective not in TOWER_OBJECTIVES):
        name, tower = config.name or "the model", TOWER_NAMES[towers[0]]
        raise UserError(f"{name}: it has {tower} tower, which only litgpt {TOWER_COMMANDS} train; use one of them")


def check_routing(settings: MoEArgs, config: Config, *, adapted: bool) -> None:
    """Check that the settings of routers have an effect on a model.

    Args:
        adapted: whether the run trains an adapter, not the model's own weights.

    Raises:
        UserError: naming the first one that has none.
    """
    names, has_experts = [entry.name for entry in fields(settings)], config.n_expert > 0
    check_effects(
        settings, "moe.", *names, have_effect=has_experts, other="a model without experts", cure="remove the line"
    )
    rate, kind = settings.router_bias_update_rate, settings.router_load_balancing_type
    if rate and not config.router_correction:
        other, cure = "the model's router_correction: false", "set model_config.router_correction: true"
        raise UserError(describe_no_effect("moe.router_bias_update_rate", rate, other, cure))
    if rate and adapted:
        raise UserError(
            f"moe.router_bias_update_rate: {rate} changes the base model, which an adapter leaves as it is; set 0"
        )
    if kind == "sinkhorn" and (config.router_correction or (config.n_expert_groups or 1) > 1):
        name = "router_correction" if config.router_correction else "n_expert_groups"
        raise UserError(
            f"moe.router_load_balancing_type: sinkhorn is not supported with the model's {name}; set seq_aux_loss"
        )


def check_predictions(recipe: Training, config: Config, *, adapted: bool) -> None:
    """Check that the weight of the loss of prediction layers fits the model, and what the run trains of it.

    Args:
        adapted: whether the run trains an adapter, not the model's own weights.

    Raises:
        UserError: if it has no effect, or new layers would not be trained.
    """
    others = {
        "a model without prediction layers": not config.n_prediction_layers,
        "an adapter, which leaves prediction layers as they are": adapted,
    }
    for other, is_given in others.items():
        check_effects(
            recipe.loss, "loss.", "prediction_weight", have_effect=not is_given, other=other, cure="remove the line"
        )
    if config.n_prediction_layers and not recipe.loss.prediction_weight and recipe.initial_weights is None:
        raise UserError(
            "loss.prediction_weight: 0 leaves the model's prediction layers at their random initial values; set "
            "model_config.n_prediction_layers: 0"
        )


def check_fp8(settings: FP8Args, *, adapted: bool) -> None:
    """Check that a run with FP8 trains the model's own weights, whose gradients it computes.

    Raises:
        UserError: if it trains an adapter.
    """
    if settings.recipe is not None and adapted:
        raise UserError(
            f"fp8.recipe: {settings.recipe} is not supported with adapters such as LoRA, quantized or not; set "
            "fp8.recipe: null, or train all weights (litgpt finetune_full)"
        )


def find_model_folder(key: str, name: Path) -> Path | None:
    """Find the folder of a model on this machine; None for a model on the hub.

    Raises:
        UserError: if it can be neither, or the hub cannot be reached.
    """
    if (folder := hub.find_local_folder(key, name)) is None:
        hub.check_access(key, name)
    return folder


def is_base_model(folder: Path) -> bool:
    """Return whether a folder has the configuration of a model, which those of runs and adapters do not have."""
    return has_config(folder) and not has_adapter_config(folder)


def has_adapter_config(folder: Path) -> bool:
    """Return whether a folder has the configuration of an adapter."""
    return (folder / "adapter_config.json").exists()


def resolve_config(recipe: Pretrain) -> Config:
    """The model's shape: the named one with the fields of `model_config` overridden, or a complete `model_config`.

    Raises:
        UserError: if the name is unknown and there is no `model_config`, or a field is wrong.
    """
    overrides = {key: value for key, value in (recipe.model_config or {}).items() if value is not None}
    if recipe.train.tie_embeddings is not None:
        overrides["tie_embeddings"] = recipe.train.tie_embeddings
    if overrides.get("output", "logits") != "logits":
        raise UserError(f"model_config.output: {overrides['output']} is not pretrained; use litgpt rm, or leave it out")
    if overrides.get("n_layer") and recipe.model_name not in list_model_names():
        return Config(**{"name": recipe.model_name} | overrides)
    named = Config.from_name(recipe.model_name)
    changes = override_fields(named.to_dict(), overrides)
    label = changes.pop("name", named.name)
    return replace(Config.from_name(recipe.model_name, **changes), name=label)


def resolve_sequence_length(recipe: Training, config: Config) -> int:
    """Tokens per sample.

    Raises:
        UserError: if it is more than the context length of the model.
    """
    length = recipe.train.max_seq_length or config.block_size
    if length > config.block_size:
        raise UserError(
            f"train.max_seq_length: {length} is more than the model's block_size; give at most {config.block_size}"
        )
    return length


def check_resumption(recipe: Training) -> None:
    """Check that a new run does not mix its checkpoints with those of another, and that there is one to resume.

    Raises:
        UserError: if `out_dir` holds checkpoints and the recipe does not resume, or holds none and `resume` is true.
    """
    if recipe.add_version:
        return
    steps = [folder for _, folder in list_checkpoints(recipe.out_dir)]
    if recipe.resume is False and steps:
        raise UserError(
            f"out_dir: {recipe.out_dir} holds a run already ({steps[0].name}); set resume: auto to continue it, or "
            "another out_dir"
        )
    if recipe.resume is True and not steps and recipe.checkpoint.upload_to is None:
        raise no_checkpoint_error(recipe.out_dir)


def check_uploads(settings: CheckpointArgs) -> None:
    """Check that the destinations of checkpoints can be spoken to.

    Raises:
        UserError: naming the first one that cannot.
    """
    if settings.upload_to is not None:
        check_client("checkpoint.upload_to", settings.upload_to)
    if settings.push_to_hub is not None:
        hub.check_repository("checkpoint.push_to_hub", settings.push_to_hub)


def check_initial_weights(config: Config, weights: Path | None) -> None:
    """Check that the folder of the initial weights exists, and has as many rows in its embedding as the model.

    Raises:
        UserError: if not.
    """
    if weights is None:
        return
    if not weights.is_dir():
        raise UserError(f"initial_checkpoint_dir: {weights} is not a folder; set that of a model")
    rows = (Config.from_checkpoint(weights) if is_base_model(weights) else config).padded_vocab_size
    if rows != config.padded_vocab_size:
        raise UserError(
            f"model_config.padded_vocab_size: {config.padded_vocab_size}, but initial_checkpoint_dir: {weights} "
            f"has {rows} rows; set model_config.padded_vocab_size: {rows}"
        )


def get_vocabulary_cure(tokens: int, *, has_weights: bool) -> str:
    """Return what to change for a model with rows for this number of tokens."""
    return OWN_TOKENIZER if has_weights else f"set model_config.padded_vocab_size: {-(-tokens // 64) * 64}"


def check_vocabulary(tokenizer: Tokenizer, config: Config, *, has_weights: bool) -> None:
    """Check that the embedding has a row for every token of a tokenizer.

    Raises:
        UserError: if it has not.
    """
    tokens, rows = tokenizer.id_limit, config.padded_vocab_size or 0
    if tokens > rows:
        cure = get_vocabulary_cure(tokens, has_weights=has_weights)
        raise UserError(f"{tokenizer.folder}: the tokenizer has {tokens} tokens, but the model has {rows} rows; {cure}")
