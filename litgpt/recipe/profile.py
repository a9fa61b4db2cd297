"""The group of settings `profile` of a training run."""

from dataclasses import dataclass

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, check_numbers


@dataclass(frozen=True)
class ProfileArgs:
    """Which steps the first process profiles with torch.profiler."""

    steps: list[Count] | None = None
    """The first and the last optimizer step of the profile, such as [10, 13]; null for none."""

    def __post_init__(self) -> None:
        check_numbers(self, "profile.")
        if self.steps is not None and (len(self.steps) != 2 or self.steps[0] > self.steps[1]):
            raise UserError(
                f"profile.steps: {list(self.steps)} is not valid; use the first and the last step, such as [10, 13]"
            )
