"""The learning rates of the parts of a model that sees or hears."""

from dataclasses import dataclass, fields

from litgpt.errors import UserError
from litgpt.recipe.bounds import Rate, check_numbers


@dataclass(frozen=True)
class PartRates:
    """Learning rates of the parts of a model that sees or hears; `optimizer.lr` is that of the decoder."""

    vision: Rate | None = None
    """Peak learning rate of the vision tower, with the schedule of optimizer.lr; null for optimizer.lr."""
    audio: Rate | None = None
    """Peak learning rate of the audio tower, with the schedule of optimizer.lr; null for optimizer.lr."""
    aligner: Rate | None = None
    """Peak learning rate of the projectors, with the schedule of optimizer.lr; null for optimizer.lr."""

    def __post_init__(self) -> None:
        check_numbers(self, "rates.")

    @property
    def given(self) -> dict[str, float]:
        """The rates that are set, by part; 0 is one."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {part: value for part, value in values.items() if value is not None}

    def check_schedule(self, lr: float) -> None:
        """Check that there is a schedule to follow.

        Raises:
            UserError: if `optimizer.lr` is 0, so that every share of it is 0 too.
        """
        for part, rate in self.given.items():
            if rate and not lr:
                raise UserError(
                    f"rates.{part}: {rate:g} follows the schedule of optimizer.lr: 0, which has no shape; set "
                    "optimizer.lr: 1e-5, with freeze.llm: true to leave the decoder as it is"
                )
