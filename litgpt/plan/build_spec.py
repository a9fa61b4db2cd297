"""The spec of a run whose weights and data are not needed."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.recipe.finetune import Finetune
from litgpt.recipe.plan import USUAL_MEDIA, RowMedia
from litgpt.recipe.pretrain import Pretrain
from litgpt.recipe.training import Training
from litgpt.store import hub
from litgpt.train.run_spec import RunSpec, add_preference, build_finetune_spec, build_pretrain_spec


def build_spec(command: str, recipe: Training, row_media: RowMedia = USUAL_MEDIA) -> RunSpec:
    """Build the spec of a run without its weights.

    Args:
        command: that would start the run.
        row_media: the media of each row.

    Raises:
        UserError: if the shape of the model is not known.
    """
    if command == "pretrain":
        spec = build_pretrain_spec(replace(cast(Pretrain, recipe), initial_checkpoint_dir=None))
        return replace(spec, row_media=row_media)
    finetune = cast(Finetune, recipe)
    if finetune.initial_adapter is not None:
        raise UserError(
            f"initial_adapter_dir: {finetune.initial_adapter} is not planned yet; leave it out, and set the tuner that "
            "it was trained with"
        )
    given = hub.extend_checkpoint_dir(finetune.checkpoint_dir)
    folder = given if given.exists() else None
    config = find_shape(finetune.checkpoint_dir) if folder is None else None
    spec = build_finetune_spec(finetune, folder or finetune.checkpoint_dir, str(finetune.checkpoint_dir), config=config)
    if finetune.preference_settings is not None:
        dropout = finetune.list_dropout(spec.tuner) if spec.tuner else {}
        reference = finetune.preference_settings.reference
        spec = add_preference(
            spec, finetune.preference_settings, reference and hub.extend_checkpoint_dir(reference), dropout
        )
    return replace(spec, weights=None, row_media=row_media)


def find_shape(name: Path) -> Config:
    """The shape of a model by its name or org/name on the hub, or by the folder of that name that it is downloaded to.

    Raises:
        UserError: if the name is not known.
    """
    known = name.relative_to(hub.CHECKPOINTS.name) if name.parts[0] == hub.CHECKPOINTS.name else name
    for candidate in (known.as_posix(), known.name):
        with suppress(UserError):
            return Config.from_name(candidate)
    raise UserError(
        f"checkpoint_dir: {name} is neither a folder here nor the name of a known shape; give a folder with its "
        "config.json"
    )
