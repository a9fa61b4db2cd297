"""The paths in a recipe: short names of model folders, and outputs, which are checked before any work."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from litgpt.errors import UserError
from litgpt.files import check_writable, extend_checkpoint_dir
from litgpt.recipe.choices import build_default_data
from litgpt.recipe.object_url import find_url


class PathKeys(NamedTuple):
    """The keys of a command that are paths.

    Attributes:
        models: folders that may be given by their names in `checkpoints`.
        folders: folders that the command makes.
        files: files that it writes.
    """

    models: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


FINETUNE = PathKeys(folders=("out_dir",))  # its model is found by finetune_spec, on the hub too
EXPORT = PathKeys(models=("checkpoint_dir",), folders=("output_dir",))
DATA = PathKeys(models=("tokenizer_dir",))
TEXTS = PathKeys(files=("output",))
PATH_KEYS = {
    "pretrain": PathKeys(models=("initial_checkpoint_dir", "tokenizer_dir"), folders=("out_dir",)),
    "finetune": FINETUNE,
    "finetune_lora": FINETUNE,
    "finetune_full": FINETUNE,
    "finetune_adapter": FINETUNE,
    "finetune_adapter_v2": FINETUNE,
    "align": FINETUNE,
    "dpo": FINETUNE,
    "kto": FINETUNE,
    "rm": FINETUNE,
    "download": PathKeys(folders=("checkpoint_dir",)),
    "convert_to_litgpt": PathKeys(models=("checkpoint_dir",)),
    "convert_from_litgpt": EXPORT,
    "convert_pretrained_checkpoint": EXPORT,
    "merge_lora": EXPORT,
    "validate": PathKeys(models=("checkpoint_dir",)),
    "verify": PathKeys(models=("checkpoint_dir",), files=("report",)),
    "data prepare": DATA,
    "data inspect": DATA._replace(files=("page_file",)),
    "tokenizer train": PathKeys(folders=("output_dir",)),
    "tokenizer extend": EXPORT,
    "report": PathKeys(files=("output",)),
    "init": PathKeys(files=("output",)),
    "generate": PathKeys(files=("output", "image_out")),
    "generate_full": TEXTS,
    "generate_adapter": TEXTS,
    "generate_adapter_v2": TEXTS,
    "generate_speculatively": TEXTS,
    "generate_tp": TEXTS,
    "generate_sequentially": TEXTS,
    "evaluate": PathKeys(folders=("out_dir",), files=("save_filepath", "use_cache")),
}


def resolve_paths(name: str, recipe: Any) -> Any:
    """Return the recipe of a command with the full paths of short names, after a check that its outputs can be written.

    A relative out_dir of `pretrain` is moved into LIGHTNING_ARTIFACTS_DIR, if that is set.

    Raises:
        UserError: naming the key of an output that cannot be written, or of a path that is not on this machine.
    """
    if "list" in (getattr(recipe, "model_name", ""), getattr(recipe, "repo_id", "")):
        return recipe  # prints names and writes nothing
    keys = PATH_KEYS.get(name, PathKeys())
    for key in (*keys.models, *keys.folders, *keys.files):
        if (url := find_url(getattr(recipe, key) or "")) is not None:
            cure = f"a local one, and checkpoint.upload_to: {url}" if key == "out_dir" else "one on this machine"
            raise UserError(f"{key}: {url} is in an object store; set {cure}")
    changes = {key: extend_checkpoint_dir(path) for key in keys.models if (path := getattr(recipe, key)) is not None}
    root = os.environ.get("LIGHTNING_ARTIFACTS_DIR")
    if name == "pretrain" and root and not recipe.out_dir.is_absolute():
        changes["out_dir"] = Path(root) / recipe.out_dir
    changes = {key: path for key, path in changes.items() if path != getattr(recipe, key)}
    recipe = replace(recipe, **changes) if changes else recipe
    for key in (*keys.folders, *keys.files):
        if (path := getattr(recipe, key)) is not None:
            check_writable(path, key, is_file=key in keys.files)
    check_logger(getattr(recipe, "logger_name", ""))
    if not hasattr(recipe, "data"):
        return recipe
    for key, folder in (recipe.data or build_default_data(recipe)).list_outputs().items():
        check_writable(folder, key)
    return recipe


def check_logger(logger_name: str) -> None:
    """Check that a logger can write outside of out_dir, where it does.

    Raises:
        UserError: naming the environment variable that sets the path.
    """
    if logger_name == "wandb":
        check_writable(Path(os.environ.get("WANDB_DIR", ".")), "WANDB_DIR")
    if logger_name == "swanlab":
        check_writable(Path(os.environ.get("SWANLAB_LOG_DIR", "swanlog")), "SWANLAB_LOG_DIR")
    if logger_name == "trackio" and "TRACKIO_DIR" in os.environ:
        check_writable(Path(os.environ["TRACKIO_DIR"]), "TRACKIO_DIR")
    if logger_name == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
        check_writable(Path("mlflow.db"), "MLFLOW_TRACKING_URI", is_file=True)
