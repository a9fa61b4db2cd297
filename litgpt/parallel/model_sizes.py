"""Checks that parallel degrees divide the layers, heads and widths of a model, before any process is started."""

from math import gcd

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.tower_config import TowerShape
from litgpt.model.weight_counts import count_tower_layers
from litgpt.parallel.schedules import split_layers
from litgpt.recipe.parallel import ParallelArgs, ParallelDims


def check_model_sizes(settings: ParallelArgs, dims: ParallelDims, config: Config, layers: int) -> None:
    """Check that a layout fits a model.

    Raises:
        UserError: naming the degree, the size of the model, and a degree that fits.
    """
    if dims.pipeline > 1:
        assign_layers(settings, config, layers)
    if dims.tensor > 1:
        check_tensor_sizes(config, dims.tensor, sequence=settings.sequence)
    if dims.expert * dims.expert_tensor > 1:
        check_expert_sizes(config, dims.expert, dims.expert_tensor)
    if dims.context > 1 and settings.context_method == "ulysses":
        check_context_heads(config.n_head // dims.tensor, dims.context)
    has_blocks = config.vision is not None and TowerShape.from_values(config.vision).has_blocks
    if dims.context > 1 and settings.context_method == "ring" and has_blocks:
        raise UserError(
            "parallel.context_method: ring is not supported for a model whose tokens of an image or a prompt attend to "
            "later ones; set all-gather"
        )


def assign_layers(settings: ParallelArgs, config: Config, layers: int) -> list[range]:
    """The layers of every stage of a pipeline; the first stage has the towers too.

    Raises:
        UserError: if the settings do not fit the number of layers, or the first stage does not have all layers after
            which features of the tower are added.
    """
    stages = split_layers(settings, layers, tower=count_tower_layers(config))
    added = 0 if config.vision is None else len(config.vision["deep_layers"] or [])
    if len(stages[0]) < added:
        raise UserError(
            f"parallel.pipeline_layers: the first stage has {len(stages[0])} layers, but features of images are added "
            f"after the first {added}; give it {added} or more"
        )
    return stages


def check_tensor_sizes(config: Config, ranks: int, *, sequence: bool, key: str = "parallel.tensor") -> None:
    """Check that the ranks divide heads, widths and vocabulary, and that experts have sequence parallelism.

    Args:
        key: the setting of the number of ranks.

    Raises:
        UserError: naming a number of ranks that does.
    """
    sizes = {
        "n_head": config.n_head,
        "padded_vocab_size": config.padded_vocab_size,
        "intermediate_size": config.intermediate_size,
        "shared expert width": config.shared_size or 0,
    }
    for name, size in sizes.items():
        if size is not None and size % ranks:
            divisor = max(number for number in range(1, ranks + 1) if size % number == 0)
            raise UserError(f"{key}: {ranks} does not divide the model's {name}: {size}; set {divisor}")
    groups = config.n_query_groups or config.n_head
    if not config.latent_attention and groups % ranks and ranks % groups:
        raise UserError(
            f"{key}: {ranks} and the model's n_query_groups: {groups} do not divide each other; set {key}: {groups}"
        )
    if not sequence and config.n_expert:
        raise UserError("parallel.sequence: false would send every token to its experts several times; set true")


def check_expert_sizes(config: Config, expert: int, expert_tensor: int) -> None:
    """Check that the ranks divide the number of experts and their inner width.

    Raises:
        UserError: naming a number of ranks that does.
    """
    sizes = {"expert": (expert, "n_expert", config.n_expert)}
    if config.n_expert:
        sizes["expert_tensor"] = (expert_tensor, "width of experts", config.expert_size)
    for axis, (ranks, name, size) in sizes.items():
        if ranks > 1 and (not size or size % ranks):
            divisor = gcd(size, ranks) if size else 1
            raise UserError(f"parallel.{axis}: {ranks} does not divide the model's {name}: {size}; set {divisor}")


def check_context_heads(heads: int, ranks: int) -> None:
    """Check that Ulysses can give each rank some of the heads of a device.

    Raises:
        UserError: naming a method that has no such limit.
    """
    if heads % ranks:
        raise UserError(
            f"parallel.context: {ranks} does not divide the {heads} heads of a device, as context_method: "
            "ulysses requires; set parallel.context_method: all-gather"
        )
