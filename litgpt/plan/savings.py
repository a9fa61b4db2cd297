"""Single settings that save memory: the plan of a run with each of them changed."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from litgpt.errors import UserError
from litgpt.messages import print_message
from litgpt.plan.build_spec import build_spec
from litgpt.plan.ranks import RunPlan
from litgpt.plan.repeated_layers import extrapolate
from litgpt.plan.table import compute_largest
from litgpt.recipe.columns import format_columns
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.plan import USUAL_MEDIA, RowMedia
from litgpt.recipe.training import Training

TIME_LIMIT = 15.0  # seconds in which changes are planned
LEAST_SHARE = 0.01  # of what the run needs, below which a change is not listed


@dataclass(frozen=True)
class Saving:
    """A changed setting.

    Attributes:
        memory: GiB that the rank that needs the most then needs, with the allowance.
        saved: GiB by which that is less than without the change.
    """

    key: str
    value: Any
    memory: float
    saved: float


def list_savings(command: str, recipe: Training, plan: RunPlan, row_media: RowMedia = USUAL_MEDIA) -> list[Saving]:
    """Plan a run with one setting changed at a time; returns the changes that save memory, that which saves most first.

    Those that the recipe's checks refuse are left out; those for which there is no time are named in a message.

    Args:
        command: that would start the run.
        plan: of the run as it is.
        row_media: the media of each row.
    """
    before = compute_largest(plan)
    end = time.monotonic() + TIME_LIMIT
    savings, late = [], []
    for key, value in list_candidates(recipe, plan.dims):
        if time.monotonic() > end:
            late.append(f"{key}: {value}")
            continue
        try:
            changed = replace_setting(recipe, key, value)
            spec = build_spec(command, changed, row_media)
            (memory,) = extrapolate(changed, spec, lambda changed_plan: (compute_largest(changed_plan),))
        except UserError:  # not possible in this recipe
            continue
        if before - memory > LEAST_SHARE * before:
            savings.append(Saving(key, value, memory, before - memory))
    if late:
        print_message(f"no time was left to plan {', '.join(late)}")
    return sorted(savings, key=lambda saving: saving.memory)


def format_savings(savings: Sequence[Saving]) -> list[str]:
    """Format changes with what the run then needs, a line each."""
    rows = [(f"{saving.memory:9.2f} GiB", f"{saving.key}: {saving.value}") for saving in savings]
    return [
        "Memory with one setting changed",
        *(format_columns(rows, 20, indent=0) or ["none of those planned saves any"]),
    ]


def list_candidates(recipe: Training, dims: ParallelDims) -> Iterator[tuple[str, Any]]:
    """List changes that may save memory without the host's, those that usually save most first.

    None of them changes the global batch or the rows.
    """
    parallel = recipe.parallel
    if recipe.recompute.granularity != "full":
        yield "recompute.granularity", "full"
    if recipe.train.micro_batch_size > 1:
        yield "train.micro_batch_size", recipe.train.micro_batch_size // 2
    if dims.shard > 1 and parallel.level < 3:
        yield "parallel.zero", 3
    if dims.data_replicate > 1:
        yield "parallel.data_replicate", 1
    if recipe.loss.impl == "plain":
        yield "loss.impl", "chunked"
    if getattr(recipe, "quantize", "") is None:
        yield "quantize", "bnb.nf4"
    if recipe.precision != "bf16-true":
        yield "precision", "bf16-true"


def replace_setting(settings: Any, key: str, value: Any) -> Any:
    """Settings with the value of a key with dots changed; the modules of selective recomputation go with it.

    Raises:
        UserError: if the recipe does not allow it.
    """
    group, _, rest = key.partition(".")
    changes = {group: replace_setting(getattr(settings, group), rest, value) if rest else value}
    if group == "granularity":
        changes["modules"] = type(settings)().modules
    return replace(settings, **changes)
