"""The spec of a finetuning run, whose models and adapters may be on the hub."""

from pathlib import Path

from litgpt.errors import UserError
from litgpt.infer.load import find_folder, resolve_model_folder
from litgpt.recipe.finetune import Finetune
from litgpt.recipe.object_url import format_path
from litgpt.train.run_spec import RunSpec, add_preference, build_finetune_spec


def find_spec(recipe: Finetune) -> RunSpec:
    """Find the model, the adapter and the reference of a run, downloaded if necessary, and build its spec.

    Raises:
        UserError: naming the setting of the first one that is not found or does not match the others.
    """
    given = find_folder(recipe.checkpoint_dir, access_token=recipe.access_token)
    folder = resolve_model_folder(given)
    base = format_path(recipe.checkpoint_dir if folder == given else folder)
    adapter = find_other_folder("initial_adapter_dir", recipe.initial_adapter, recipe)
    spec = build_finetune_spec(recipe, folder, base, adapter=adapter)
    if recipe.preference_settings is None:
        return spec
    reference = find_other_folder("preference.reference", recipe.preference_settings.reference, recipe)
    dropout = recipe.list_dropout(spec.tuner) if spec.tuner else {}
    return add_preference(spec, recipe.preference_settings, reference, dropout)


def find_other_folder(key: str, name: Path | None, recipe: Finetune) -> Path | None:
    """The folder of another model or adapter, which a setting names; for that of a run, its newest one.

    Raises:
        UserError: naming the key of the setting, if there is none.
    """
    if name is None:
        return None
    try:
        return resolve_model_folder(find_folder(name, access_token=recipe.access_token))
    except UserError as error:
        raise UserError(f"{key}: {error.detail}") from None
