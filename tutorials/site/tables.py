"""Further pages of the reference: models, losses, and the recipes of the package."""

from collections.abc import Callable
from typing import Any, get_args

from litgpt.model.registry import load_families, lookup_config
from litgpt.recipe.config_hub import list_hub_recipes
from litgpt.recipe.help_text import get_summary, read_descriptions
from litgpt.recipe.keys import list_settings
from litgpt.recipe.preference import WITH_REFERENCE, LossType
from litgpt.recipe.train import LossArgs
from litgpt.train.kto import rated_answers
from litgpt.train.preference_losses import PAIR_LOSSES
from litgpt.train.reward import pair_rewards
from tutorials.site.reference import escape_text

MODEL_HEADING = (
    "| name | on the hub | layers | width | heads | key-value heads | context |",
    "|---|---|--:|--:|--:|--:|--:|",
)
OTHER_LOSSES: dict[str, Callable[..., Any]] = {"kto": rated_answers, "reward": pair_rewards}
"""The functions of losses that are not of pairs of log-probabilities."""
TOKEN_LOSS = "The loss of the tokens of the chosen answers."  # sft, which loss.type computes


def write_model_page() -> str:
    """Write the page of all models that are known by name, one table per architecture."""
    families = load_families().values()
    architectures = {name for family in families for name in family.architectures}
    lines = [
        "# Models\n",
        f"{sum(len(family.shapes) for family in families)} models are known by name. "
        f"Any other model of these {len(architectures)} architectures is configured from its `config.json`: "
        "[adding models](../adding_models.md) describes how to add an architecture.\n",
    ]
    for family in families:
        lines += [f"## {family.name}\n", f"`model_type: {family.model_type}` in a `config.json`.\n"]
        if not family.shapes:
            continue
        lines += MODEL_HEADING
        for name in family.shapes:
            config = lookup_config(name)
            sizes = (config.n_layer, config.n_embd, config.n_head, config.n_query_groups, config.block_size)
            hub = family.hub_names[name]
            shown = f"`{hub}`" if "/" in hub else ""
            lines.append(f"| `{name}` | {shown} | {' | '.join(f'{size:,}' for size in sizes)} |")
        lines.append("")
    return "\n".join(lines)


def describe_loss(name: str) -> str:
    """Describe a loss of preferences by the sentence of its function."""
    function = {**PAIR_LOSSES, **OTHER_LOSSES}.get(name)
    return get_summary(function) if function else TOKEN_LOSS  # type: ignore[arg-type]


def write_loss_page() -> str:
    """Write the page of all losses."""
    text = read_descriptions(LossArgs)["type"]
    kinds = get_args(list_settings(LossArgs)["type"][0])
    lines = [
        "# Losses\n",
        "## Of tokens\n",
        f"`loss.type` is {' or '.join(f'`{kind}`' for kind in kinds)}. {escape_text(text)}\n",
        "## Of preferences\n",
        "`preference.loss_type` of `litgpt align`; [losses of preferences](../preference_losses.md) compares them with "
        "those of other projects.\n",
        "| loss | description | reference model |",
        "|---|---|---|",
    ]
    for name in sorted({name for member in get_args(LossType) for name in (get_args(member) or (member,))}):
        reference = "yes" if name in WITH_REFERENCE else "no"
        lines.append(f"| `{name}` | {escape_text(describe_loss(name))} | {reference} |")
    return "\n".join([*lines, ""])


def write_recipe_page() -> str:
    """Write the page of all recipes of the package."""
    lines = ["# Recipes\n", "The recipes that come with the package: `litgpt COMMAND --config NAME` runs one.\n"]
    for recipe in list_hub_recipes():
        anchor, text = recipe.name.replace("/", "-"), recipe.path.read_text(encoding="utf-8").rstrip()
        lines += [f"## {recipe.name} {{ #{anchor} }}\n", f"```yaml\n{text}\n```\n"]
    return "\n".join(lines)


def build_table_pages() -> dict[str, str]:
    """Build the pages of models, losses and recipes: their Markdown by path."""
    return {
        "reference/models.md": write_model_page(),
        "reference/losses.md": write_loss_page(),
        "reference/recipes.md": write_recipe_page(),
    }
