"""The data module `Conversations`: rows of any usual format, written by the model's own chat template."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litgpt.data.modules.finetuning import DatasetEntry, FinetuningData, OnOverlong, iter_conversations
from litgpt.data.read.conversation import Conversation, iter_texts, to_conversation
from litgpt.data.read.documents import Source, fingerprint_files
from litgpt.data.read.row_sources import DataSource, LocatedRow, list_files, parse_source, read_rows
from litgpt.data.render.chat_template import ChatTemplate, read_template
from litgpt.data.render.loss_weights import WeightRule
from litgpt.data.render.prompt_styles import parse_style, save_prompt_style
from litgpt.data.render.tools import RESULT_MASKS, write_tools_as_text
from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Fraction, Position
from litgpt.recipe.data import BatchShape, Stream

if TYPE_CHECKING:
    from litgpt.data.cache.examples import CachedExamples, Renderer, RowSet
    from litgpt.data.modules.streamed_sources import StreamedSource


@dataclass
class Conversations(FinetuningData):
    """Conversations of any usual format, written by the model's own chat template.

    On disk: files of rows (.jsonl, .json, .csv, .parquet, .txt; also .gz and .zst), folders of them, or data sets of
    the hub. RowSet are messages, ShareGPT, Alpaca, question and answer, or plain text; samples are kept in `cache_dir`.
    """

    sources: str | list[Any]
    """Paths (`rows.jsonl`, or `rows.jsonl#500` for 500 of them), or mappings of path, split, format, columns, sample,
    weight, channel and val_fraction."""
    val_sources: str | list[Any] = field(default_factory=list)
    """The same for validation; empty splits `val_fraction` off `sources`."""
    val_fraction: Fraction | None = None
    """Share of each source that is kept for validation; null for 0.05, or for none where rows are streamed."""
    streaming: bool = False
    """Read rows as they are needed, for data larger than memory or on the hub: each rank a share of its own, pass after
    pass. The length of an epoch is not known, so set train.max_steps. Sources take turns with mix: interleave; with
    concat, file follows file."""
    shuffle_buffer: Count | None = None
    """With streaming: rows that are shuffled, and packed, together, null for 2000; files change their order too."""
    val_rows: Position = 0
    """With streaming: the first so many rows of each source are kept for validation."""
    mix: Literal["concat", "interleave"] = "concat"
    """concat takes all rows of all sources; interleave takes them in the proportion of their weights."""
    stopping: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """An interleaved epoch ends when the rows of the first source are used up, or when those of all are."""
    train_on: Literal["answers", "last_answer", "everything"] = "answers"
    """What is trained, where messages do not say `loss` themselves."""
    end_of_turn: Literal["turn", "last", "none"] = "turn"
    """After which answers the token that ends them is trained."""
    weights: list[WeightRule] = field(default_factory=list)
    """Factors of the loss for parts of answers that match a pattern or follow a keyword."""
    tool_format: Literal["template", "hermes", "json", "qwen", "react"] = "template"
    """How tools and calls are written: as the chat template does, or as text in one of four protocols."""
    system: str | None = None
    """What the assistant is told of itself in conversations that do not say."""
    prompt_style: str | None = None
    """A prompt style in place of the chat template, such as alpaca."""
    chat_template: Path | None = None
    """A file in place of the model's own template."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """More that the template is told, such as enable_thinking: false."""
    date: str = "2026-01-01"
    """The day that templates are told which ask for it; fixed, so that a run can be repeated."""
    cache_dir: Path = Path("data/conversations")
    """Where samples and downloads are kept."""
    on_overlong: OnOverlong = field(default="drop", kw_only=True)
    """At a sample longer than train.max_seq_length: drop, truncate_left, truncate_right, split or raise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UserError("data.sources: empty; give at least one path")
        if not self.streaming and self.val_rows:
            raise UserError(f"data.val_rows: {self.val_rows} is for data.streaming: true; set data.val_fraction: 0.05")
        if not self.streaming and self.shuffle_buffer:
            raise UserError(
                f"data.shuffle_buffer: {self.shuffle_buffer} is for data.streaming: true; without it all rows "
                "are shuffled, so leave it out"
            )
        self._sources, self._val_sources = (
            [parse_source(one) for one in ([group] if isinstance(group, str) else group)]
            for group in (self.sources, self.val_sources)
        )
        self._open: list[StreamedSource] | None = None
        if self.streaming:
            from litgpt.data.modules.streamed_sources import check_streaming

            check_streaming(self, self._sources, self._val_sources)
        if self.prompt_style is not None:
            parse_style(self.prompt_style)
        try:
            self._date = datetime.fromisoformat(self.date)
        except ValueError:
            raise UserError(f"data.date: {self.date!r} is no day; give one such as 2026-01-01") from None

    def save_prompt_format(self, folder: Path) -> None:
        """Name the prompt style, if there is one in place of the chat template."""
        if self.prompt_style is not None:
            save_prompt_style(parse_style(self.prompt_style), folder)

    def cache(self) -> Path:
        """The folder that the samples go to."""
        return self.cache_dir

    def default_fraction(self) -> float:
        """The share of the rows for validation, where their source does not say."""
        return 0.0 if self.val_sources else 0.05 if self.val_fraction is None else self.val_fraction

    def sets(self) -> list[DatasetEntry]:
        """The rows of all sources; where they are streamed, only those for validation."""
        if self.streaming:
            held = [self._held_rows(one) for one in self._streamed()] if self.val_rows else []
            return held + [DatasetEntry(self._rows(source), source, "val") for source in self._val_sources]
        part: Literal["both", "train"] = "train" if self.val_sources else "both"
        return [DatasetEntry(self._rows(source), source, part) for source in self._sources] + [
            DatasetEntry(self._rows(source), source, "val") for source in self._val_sources
        ]

    def _rows(self, source: DataSource) -> "RowSet":
        files = list_files(source, self.cache_dir)
        self.cache_dir.mkdir(parents=True, exist_ok=True)

        def read() -> Iterator[LocatedRow]:
            for file in files:
                yield from read_rows(file)

        return self._rows_of(source, fingerprint_files(files, self.cache_dir / "hashes.json"), read)

    def _rows_of(self, source: DataSource, known: list[Source], read: Callable[[], Iterable[LocatedRow]]) -> "RowSet":
        from litgpt.data.cache.examples import RowSet

        def convert(row: Any) -> list[Conversation]:
            said = to_conversation(row, source.columns, source.format)
            if said.system is None and self.system is not None and not said.is_text:
                said = replace(said, system=self.system)
            return [said if self.tool_format == "template" else write_tools_as_text(said, self.tool_format)]

        settings = [source.format, source.columns, self.system, self.tool_format]
        return RowSet(source.path, known, read, convert, settings, source.channel)

    def renders(self) -> "Renderer":
        """The chat template, or the prompt style in its place."""
        from litgpt.data.render.instruction_renderer import InstructionRenderer
        from litgpt.data.render.labels import ChatRenderer, LossMask

        if self.prompt_style is not None:
            given = [self.train_on == "last_answer", self.weights, self.template_args, self.chat_template]
            if any(given) or self.end_of_turn != "turn":
                raise UserError(
                    "data.prompt_style: goes without chat_template, template_args, weights, end_of_turn and "
                    "train_on: last_answer; leave it out to use the chat template"
                )
            if self.tool_format in RESULT_MASKS:
                raise UserError(
                    f"data.tool_format: {self.tool_format} writes results into answers, which data.prompt_style would "
                    "train; set tool_format: hermes"
                )
            mask = self.train_on == "answers"
            return InstructionRenderer(self.tokenizer, parse_style(self.prompt_style), mask_prompt=mask)
        weights = (*self.weights, *RESULT_MASKS.get(self.tool_format, ()))
        trained = LossMask(self.train_on, self.end_of_turn, weights)
        return ChatRenderer(self.tokenizer, self._template(), trained, self.template_args)

    def _template(self) -> ChatTemplate:
        if self.chat_template is not None:
            try:
                source = self.chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"data.chat_template: {self.chat_template} cannot be read ({error})") from None
            return ChatTemplate(source, self.chat_template, date=self._date)
        found = read_template(self.tokenizer.folder, self._date)
        if found is None:
            raise UserError(
                f"data: {self.tokenizer.folder} holds no chat template; set data.prompt_style: alpaca, or "
                "data.chat_template: a file"
            )
        return found

    def sizes_of(self, files: "list[tuple[DatasetEntry, CachedExamples]]", counts: list[int]) -> list[int]:
        """How many samples an epoch has of each source."""
        sizes = super().sizes_of(files, counts)
        if self.mix == "concat":
            return sizes
        weights = [entry.source.weight for entry, _ in files]
        if not sum(weights):
            raise UserError("data.sources: weight: all are 0; give one that is more")
        shares = [weight / sum(weights) for weight in weights]
        epochs = [size / share for size, share in zip(sizes, shares, strict=True) if share]
        total = min(epochs) if self.stopping == "first_exhausted" else max(epochs)
        return [math.floor(total * share + 1e-9) for share in shares]

    def _streamed(self) -> "list[StreamedSource]":
        """The sources, opened to be streamed."""
        from litgpt.data.modules.streamed_sources import open_source

        if self._open is None:
            self._open = [open_source(source, self.cache_dir, self.val_rows) for source in self._sources]
        return self._open

    def _held_rows(self, streamed: "StreamedSource") -> DatasetEntry:
        """The rows of a source that are kept for validation."""
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        rows = self._rows_of(streamed.source, streamed.known, streamed.held_rows)
        settings = [*rows.settings, self.val_rows]
        return DatasetEntry(replace(rows, name=f"{rows.name} (val_rows)", settings=settings), streamed.source, "val")

    def conversations(self) -> Iterator[Conversation]:
        """All that can be read, from the start."""
        if not self.streaming:
            yield from super().conversations()
        for one in self._streamed() if self.streaming else ():
            yield from iter_conversations(self._rows_of(one.source, one.known, one.rows))

    def place_of(self, which: Literal["first", "random"] | int, seed: int) -> int:
        """The number of one of the conversations."""
        if not self.streaming:
            return super().place_of(which, seed)
        if which == "random":
            raise UserError("eval.evaluate_example: random needs the number of rows; with data.streaming set first")
        return 0 if which == "first" else int(which)

    def training_documents(self) -> Iterable[str]:
        """What is said in the training rows, message by message."""
        return iter_texts(self.conversations()) if self.streaming else super().training_documents()

    def train_stream(self, shape: BatchShape) -> Stream:
        """Endless micro batches of the training samples."""
        if not self.streaming:
            return super().train_stream(shape)
        from litgpt.data.modules.streamed_sources import batches

        return batches(self, self._streamed(), self._rows_of, shape)
