"""The data module `Preferences`: rows of two answers that are compared, or of one that is rated."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from litgpt.data.modules.conversations import Conversations
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.documents import Source
from litgpt.data.read.placeholders import fill_placeholders
from litgpt.data.read.preference import (
    COLUMNS_READ,
    Preference,
    PreferenceKind,
    has_pair,
    mismatch_answers,
    to_preferences,
)
from litgpt.data.read.row_sets import RowSet
from litgpt.data.read.row_sources import DataSource, LocatedRow, list_files, read_rows
from litgpt.data.render.example import Renderer
from litgpt.data.render.preference_renderer import PreferenceRenderer
from litgpt.errors import UserError
from litgpt.recipe.effect import check_effects, describe_no_effect


@dataclass
class Preferences(Conversations):
    """Preferences between two answers to a prompt, or ratings of answers, rendered by the model's chat template.

    On disk: files of rows as for Conversations. Rows of pairs have `chosen` and `rejected` (texts, messages or lists of
    messages) after a `prompt`, a question or `messages`, or whole conversations in both; or `messages` and
    `rejected_response` or `rejected_messages`. Rated rows are conversations with a `label` of true or false.
    """

    answers_per_sample: ClassVar[int] = 2

    cache_dir: Path = Path("data/preferences")
    """Folder of samples and downloads."""

    objective: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_on != "answers":
            raise UserError(
                f"data.train_on: {self.train_on} is not supported by Preferences; set data.train_on: answers"
            )
        if self.null_prompt:
            raise UserError(f"data.null_prompt: {self.null_prompt} is not supported by Preferences; leave it out")
        if self.on_overlong == "split":
            raise UserError("data.on_overlong: split is not supported by Preferences; set data.on_overlong: drop")
        for source in (*self._sources, *self._val_sources):
            if source.format != "auto":
                raise UserError(
                    f"data.sources: format: {source.format} is not supported by Preferences, whose rows are "
                    "recognized by their columns; leave it out, or rename columns"
                )
            if source.channel is not None:
                raise UserError(
                    describe_no_effect(
                        "data.sources: channel",
                        source.channel,
                        "Preferences, which has no losses by channel",
                        "leave it out",
                    )
                )

    def set_objective(self, objective: str) -> None:
        """Set the objective of the run, which compares answers or rates them.

        Raises:
            UserError: if it does neither, or does not use a setting.
        """
        if objective == "next_token":
            raise UserError(
                "data: Preferences has two answers in a sample; use litgpt align, or train on the chosen ones with "
                "data: Conversations"
            )
        if objective == "reward":
            other, cure = "preference.loss_type: reward", "leave it out"
            check_effects(self, "data.", "weights", "end_of_turn", have_effect=False, other=other, cure=cure)
        self.objective = objective

    @cached_property
    def kind(self) -> PreferenceKind:
        """What the samples are: as the objective needs them; without one, rated if the first row has a label alone."""
        if self.objective is not None:
            return "rated" if self.objective == "kto" else "pairs"
        source = self._sources[0]
        located = (
            self._streamed[0].read_rows()
            if self.streaming
            else chain.from_iterable(map(read_rows, list_files(source, self.cache_dir)))
        )
        first = next((row for _, row in located if isinstance(row, Mapping)), {})
        names = {str(name).lower() for name in first}
        renamed = [new for old, new in (source.columns or {}).items() if old.lower() in names]
        is_pair = has_pair({**first, **dict.fromkeys(renamed)})
        return "rated" if not is_pair and "label" in names.union(renamed) else "pairs"

    @property
    def value_name(self) -> str:
        """Name of the number that belongs to the answers of a sample."""
        return "margin" if self.kind == "pairs" else "desirable"

    def columns_read(self) -> Collection[str]:
        """Columns and fields that the objective reads, and not all objectives; without an objective, all of these."""
        return set().union(*COLUMNS_READ.values()) if self.objective is None else COLUMNS_READ[self.objective]

    def build_renderer(self) -> Renderer:
        """Build the renderer of both answers."""
        return PreferenceRenderer(super().build_renderer())

    def _build_row_set(
        self, source: DataSource, files: list[Source], read: Callable[[], Iterable[LocatedRow]]
    ) -> RowSet:
        resolve = self._build_resolver(source)

        def complete(preference: Preference) -> Preference:
            other = None if preference.other is None else self.complete(resolve(preference.other))
            return Preference(**vars(self.complete(resolve(preference))) | {"other": other})

        def convert(row: Any) -> list[Conversation]:
            filled = fill_placeholders(row, self._names)
            return [complete(preference) for preference in to_preferences(filled, source.columns, self.kind)]

        rows = super()._build_row_set(source, files, read)
        relate = mismatch_answers if self.kind == "rated" else rows.relate
        return replace(rows, convert=convert, settings=[self.kind, *rows.settings], relate=relate)
