"""litgpt download: fetch a model from the Hugging Face hub, check it, and write its shape beside it."""

from litgpt.commands.convert_to_litgpt import convert
from litgpt.errors import UserError
from litgpt.model import registry
from litgpt.recipe.store_commands import Download


def run(recipe: Download) -> None:
    """Download what the recipe names; print where it lies."""
    if recipe.repo_id == "list":
        print("\n".join(registry.names()))
        return
    from litgpt.store.hub import download

    folder = download(
        repository_of(recipe.repo_id),
        recipe.checkpoint_dir,
        access_token=recipe.access_token,
        tokenizer_only=recipe.tokenizer_only,
        revision=recipe.revision,
    )
    if recipe.convert_checkpoint and not recipe.tokenizer_only:
        convert(folder, recipe.model_name, recipe.dtype)
    print(f"{folder}: ready")


def repository_of(name: str) -> str:
    """The repository that a name means: itself if it is org/name, else that of the known model."""
    if "/" in name:
        return name
    found = registry.find(name).hf_config
    if "org" not in found:
        raise UserError(f"repo_id: {name} has no repository of its own; give one as org/name")
    return f"{found['org']}/{found['name']}"
