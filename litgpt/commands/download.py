"""`litgpt download`: download a model from the Hugging Face hub, check it, and write its `model_config.yaml`."""

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.registry import list_model_names
from litgpt.recipe.store_commands import Download
from litgpt.store.convert import convert_folder
from litgpt.store.hub import download


def run(recipe: Download) -> None:
    """Download the model and print its path; for `list`, print the names of all known models."""
    if recipe.repo_id == "list":
        print("\n".join(list_model_names()))
        return
    folder = download(
        resolve_repository(recipe.repo_id),
        recipe.checkpoint_dir,
        access_token=recipe.access_token,
        tokenizer_only=recipe.tokenizer_only,
        revision=recipe.revision,
    )
    if recipe.convert_checkpoint and not recipe.tokenizer_only:
        convert_folder(folder, recipe.model_name, recipe.dtype)
    print(f"{folder}: ready")


def resolve_repository(name: str) -> str:
    """Resolve a name to a repository: org/name stays as it is, a known model's name becomes its repository.

    Raises:
        UserError: if the known model has no repository.
    """
    if "/" in name:
        return name
    repository = Config.from_name(name).hf_config
    if "org" not in repository:
        raise UserError(f"repo_id: {name} has no repository of its own; give one as org/name")
    return f"{repository['org']}/{repository['name']}"
