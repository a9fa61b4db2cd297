"""The data module `Conversations`: rows of any usual format, rendered by the model's chat template."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litgpt.data import media, render, stream
from litgpt.data.modules import streamed_sources
from litgpt.data.modules.finetuning import DatasetEntry, FinetuningData, Split, iter_conversations
from litgpt.data.read.conversation import Conversation, iter_texts, to_conversation
from litgpt.data.read.documents import Source
from litgpt.data.read.media_urls import MediaUrls, build_resolver
from litgpt.data.read.placeholders import PLACEHOLDERS, check_names, fill_placeholders
from litgpt.data.read.row_sets import RowSet
from litgpt.data.read.row_sources import (
    DataSource,
    LocatedRow,
    check_dataset,
    count_interleaved,
    find_media_folder,
    list_files,
    parse_source,
)
from litgpt.data.render.chat_renderer import ChatRenderer, LossMask
from litgpt.data.render.chat_template import ChatTemplate, check_variables, read_template
from litgpt.data.render.example import Renderer
from litgpt.data.render.instruction_renderer import InstructionRenderer
from litgpt.data.render.loss_weights import WeightRule
from litgpt.data.render.prompt_format import build_style_files, build_template_files
from litgpt.data.render.prompt_styles import parse_style
from litgpt.data.render.tools import RESULT_MASKS, write_tools_as_text
from litgpt.data.stream.packing import OnOverlong
from litgpt.errors import UserError
from litgpt.files import read_utf8
from litgpt.recipe.bounds import Count, Fraction, Position
from litgpt.recipe.data import BatchShape, Stream
from litgpt.recipe.effect import check_effects

if TYPE_CHECKING:
    from litgpt.data.media.reader import AnyReader
    from litgpt.data.stream.batch_media import MediaLoader


@dataclass
class Conversations(FinetuningData):
    """Conversations of any usual format, rendered by the model's chat template.

    On disk: files of rows (.jsonl, .json, .csv, .parquet, .txt; also .gz and .zst), folders of them, or data sets on
    the hub. Rows are messages, ShareGPT, Alpaca, question and answer, or plain text; samples are cached in `cache_dir`.
    """

    sources: str | list[Any]
    """Paths (`rows.jsonl`, or `rows.jsonl#500` for 500 of them), or mappings of path, split, format, columns, sample,
    weight, channel and val_fraction."""
    val_sources: str | list[Any] = field(default_factory=list)
    """The same for validation; if empty, `val_fraction` of `sources` is held out."""
    val_fraction: Fraction | None = None
    """Fraction of each source that is held out for validation; null for 0.05, or for none with streaming."""
    streaming: bool = False
    """Read rows on demand, for data larger than memory or on the hub: each rank reads its own shard, pass after pass.
    The length of an epoch is unknown, so set train.max_steps. Sources alternate with mix: interleave; with concat,
    files are read one after the other."""
    shuffle_buffer: Count | None = None
    """With streaming: rows that are shuffled, and packed, together; null for 2000. Files are shuffled too."""
    val_rows: Position = 0
    """With streaming: number of rows at the start of each source that are held out for validation."""
    mix: Literal["concat", "interleave"] = "concat"
    """concat takes all rows of all sources; interleave takes them in the proportion of their weights."""
    stopping: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """An interleaved epoch ends when the first source is exhausted, or when all are."""
    train_on: Literal["answers", "last_answer", "everything"] = "answers"
    """Which messages are trained, unless they set `loss`."""
    end_of_turn: Literal["turn", "last", "none"] = "turn"
    """After which answers the end-of-turn token is trained."""
    weights: list[WeightRule] = field(default_factory=list)
    """Loss weights for parts of answers that match a pattern or follow a keyword."""
    tool_format: Literal["template", "hermes", "json", "qwen", "react"] = "template"
    """How tools and calls are written: by the chat template, or as text in one of four formats."""
    system: str | None = None
    """System message of conversations without one."""
    model_name: str | list[str] | None = None
    """Text that replaces {{NAME}} in rows; or two, of which rows whose column `tag` is zh have the first."""
    model_author: str | list[str] | None = None
    """Likewise for {{AUTHOR}}."""
    prompt_style: str | None = None
    """A prompt style that replaces the chat template, such as alpaca."""
    chat_template: Path | None = None
    """A file that replaces the model's chat template."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Extra template variables, such as enable_thinking: false."""
    date: str = "2026-01-01"
    """The current date for templates; fixed, so that runs are reproducible."""
    cache_dir: Path = Path("data/conversations")
    """Folder of samples and downloads."""
    media_dir: Path | None = None
    """Folder of the media that rows name, which their paths may not leave; null for that of each source."""
    media_urls: MediaUrls = field(default_factory=MediaUrls)
    """Fetch the media of rows that are at URLs."""
    split_sounds: bool = False
    """Split a sound that is longer than the model hears into equal pieces, each a sound of its own; else it is an
    error, which on_error treats."""
    video_sounds: bool = False
    """Read the sound tracks of videos with their frames, by a model that hears videos; a video without one is read as
    its frames alone."""
    null_prompt: Fraction = 0.0
    """Fraction of the samples, of those whose answer has an image, that are trained without the text of their question,
    which guidance at sampling needs; 0.1 is usual."""
    on_overlong: OnOverlong = field(default="drop", kw_only=True)
    """For samples longer than train.max_seq_length: drop, truncate_left, truncate_right, split or raise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UserError("data.sources: empty; add at least one path")
        if not self.streaming and self.val_rows:
            raise UserError(f"data.val_rows: {self.val_rows} needs data.streaming: true; set data.val_fraction: 0.05")
        if not self.streaming and self.shuffle_buffer:
            raise UserError(
                f"data.shuffle_buffer: {self.shuffle_buffer} needs data.streaming: true; without it all rows "
                "are shuffled, so leave it out"
            )
        self._sources, self._val_sources = (
            [parse_source(source) for source in ([sources] if isinstance(sources, str) else sources)]
            for sources in (self.sources, self.val_sources)
        )
        self._names = {key: check_names(key, getattr(self, key)) for key in PLACEHOLDERS.values()}
        self._check_effects()
        if self.streaming:
            self._check_streaming()
        if self.prompt_style is not None:
            parse_style(self.prompt_style, "data.prompt_style")
        try:
            self._date = datetime.fromisoformat(self.date)
        except ValueError:
            raise UserError(f"data.date: {self.date!r} is not a date; use one such as 2026-01-01") from None

    def _check_effects(self) -> None:
        """Reject settings of the mix and of the validation split that have no effect.

        Raises:
            UserError: naming the setting and a cure.
        """
        is_mixed, other, cure = self.mix == "interleave", "data.mix: concat", "set data.mix: interleave"
        check_effects(self, "data.", "stopping", have_effect=is_mixed, other=other, cure=cure)
        for source in self._sources:
            check_effects(source, "data.sources: ", "weight", have_effect=is_mixed, other=other, cure=cure)
        is_split, other, cure = not self._val_sources, "data.val_sources", "set one of them"
        check_effects(self, "data.", "val_fraction", have_effect=is_split, other=other, cure=cure)
        for source in self._sources:
            check_effects(source, "data.sources: ", "val_fraction", have_effect=is_split, other=other, cure=cure)
        has_date = self.prompt_style is None
        check_effects(self, "data.", "date", have_effect=has_date, other="data.prompt_style", cure="leave it out")
        if self.prompt_style is not None and self.system is not None:
            raise UserError(
                f"data.system: {self.system[:40]!r} is not supported with data.prompt_style, which is saved "
                "without it; leave data.prompt_style out, or set the system message in the rows"
            )
        for source in self._val_sources:
            names, cure = ("weight", "val_fraction"), "set it in data.sources"
            check_effects(source, "data.val_sources: ", *names, have_effect=False, other="validation", cure=cure)

    def _check_streaming(self) -> None:
        """Reject settings that need the number of rows.

        Raises:
            UserError: naming the setting and a supported value.
        """
        unsupported = {"tokenize": ("lazy", "ahead"), "stopping": ("all_exhausted", "first_exhausted")}
        for name, (value, supported) in unsupported.items():
            if getattr(self, name) == value:
                raise UserError(
                    f"data.{name}: {value} is not supported with data.streaming: true; set data.{name}: {supported}"
                )
        if not self.shuffle:
            raise UserError("data.shuffle: false is not supported with data.streaming: true; set data.streaming: false")
        if self.group_by_length:
            raise UserError(
                f"data.group_by_length: {self.group_by_length} needs all lengths; set data.streaming: false"
            )
        of_media = {name: getattr(self, name) for name in ("null_prompt", "split_sounds", "video_sounds")}
        for name, setting in {**of_media, "media_urls.enabled": self.media_urls.enabled}.items():
            if setting:
                shown, cure = str(setting).lower(), "set data.streaming: false"
                raise UserError(f"data.{name}: {shown} is not supported with data.streaming: true; {cure}")
        sources = [*self._sources, *self._val_sources]
        for fraction in [self.val_fraction, *(source.val_fraction for source in sources)]:
            if fraction:
                raise UserError(
                    f"data.val_fraction: {fraction} needs the number of rows; with streaming set data.val_rows: 500, "
                    "or val_sources"
                )
        if self.val_rows and self._val_sources:
            raise UserError(f"data.val_rows: {self.val_rows}, but val_sources is set; set data.val_rows: 0")
        for source in self._sources:
            if source.sample is not None:
                raise UserError(
                    f"data.sources: sample: {source.sample} of {source.path} needs the number of rows; leave it out, "
                    "or set weight, and data.mix: interleave"
                )

    def check_files(self, *, has_tokenizer: bool) -> None:
        """Check that each source is a file or a folder, or may be on the hub, and that there is a tokenizer."""
        super().check_files(has_tokenizer=has_tokenizer)
        if self.media_dir is not None and not self.media_dir.expanduser().is_dir():
            raise UserError(f"data.media_dir: {self.media_dir} is not a folder; set that of the images")
        for source in (*self._sources, *self._val_sources):
            if not Path(source.path).expanduser().exists():
                check_dataset(source.path, self.cache_dir)

    def prompt_files(self) -> dict[str, str] | None:
        """Build the files of the chat template with its settings, or of the prompt style that replaces it."""
        if self.tokenizer is None:
            return None
        if self.prompt_style is not None:
            return build_style_files(parse_style(self.prompt_style), self.tokenizer)
        template = self._read_template()
        return build_template_files(template, self.tokenizer, variables=self.template_args, system=self.system)

    def cache_folder(self) -> Path:
        """The folder of the samples."""
        return self.cache_dir

    def default_val_fraction(self) -> float:
        """The fraction of rows for validation, where their source has none."""
        return 0.0 if self.val_sources else 0.05 if self.val_fraction is None else self.val_fraction

    def list_entries(self) -> list[DatasetEntry]:
        """List the rows of all sources; with streaming, only those for validation."""
        if self.streaming:
            held_out = [self._build_held_out(source) for source in self._streamed] if self.val_rows else []
            return held_out + [DatasetEntry(self._read_rows(source), source, "val") for source in self._val_sources]
        split: Split = "train" if self.val_sources else "both"
        return [DatasetEntry(self._read_rows(source), source, split) for source in self._sources] + [
            DatasetEntry(self._read_rows(source), source, "val") for source in self._val_sources
        ]

    def _read_rows(self, source: DataSource) -> RowSet:
        return self._build_row_set(source, *self.open_files(list_files(source, self.cache_dir)))

    def _build_row_set(
        self, source: DataSource, files: list[Source], read: Callable[[], Iterable[LocatedRow]]
    ) -> RowSet:
        def convert(row: Any) -> list[Conversation]:
            filled = fill_placeholders(row, self._names)
            conversation = to_conversation(filled, source.columns, source.format)
            return [self.complete(resolve(conversation))]

        resolve, urls = self._build_resolver(source), self.media_urls
        media_dir = find_media_folder(source, self.cache_dir, self.media_dir)
        names = [self._names] if any(self._names.values()) else []
        settings = [source.format, source.columns, self.system, self.tool_format, *names, *urls.fingerprint_parts()]
        settings += [name for name in ("split_sounds", "video_sounds") if getattr(self, name)]
        threads = urls.connections if urls.enabled else 0
        return RowSet(source.path, files, read, convert, settings, source.channel, media_dir, threads=threads)

    def _build_resolver(self, source: DataSource) -> Callable[[Conversation], Conversation]:
        """What finds the files of the media of conversations, splits long sounds, and marks the tracks of videos."""
        folder = find_media_folder(source, self.cache_dir, self.media_dir)
        asked = {"split_sounds": self.split_sounds, "video_sounds": self.video_sounds}
        steps = media.media_steps.find_media_steps(self.tokenizer.folder, **asked)
        return build_resolver(folder, self.cache_dir, self.media_urls, steps)

    def complete(self, conversation: Conversation) -> Conversation:
        """Add the default system message to a conversation, and write its tools in the format of the settings."""
        if conversation.system is None and self.system is not None and not conversation.is_text:
            conversation = replace(conversation, system=self.system)
        if self.tool_format == "template":
            return conversation
        return write_tools_as_text(conversation, self.tool_format)

    def build_renderer(self) -> Renderer:
        """Build the renderer of the chat template, or of the prompt style that replaces it."""
        if self.prompt_style is not None:
            settings = (self.train_on == "last_answer", self.weights, self.template_args, self.chat_template)
            of_media = (self.null_prompt, self.split_sounds, self.video_sounds)
            if any((*settings, *of_media)) or self.end_of_turn != "turn":
                raise UserError(
                    "data.prompt_style: chat_template, template_args, weights, end_of_turn, null_prompt, split_sounds, "
                    "video_sounds and train_on: last_answer are not supported; leave it out to use the chat template"
                )
            if self.tool_format in RESULT_MASKS:
                raise UserError(
                    f"data.tool_format: {self.tool_format} writes results into answers, which data.prompt_style would "
                    "train; set data.tool_format: hermes"
                )
            mask_prompt = self.train_on == "answers"
            return InstructionRenderer(self.tokenizer, parse_style(self.prompt_style), mask_prompt=mask_prompt)
        weights = (*self.weights, *RESULT_MASKS.get(self.tool_format, ()))
        loss_mask = LossMask(self.train_on, self.end_of_turn, weights)
        placer = render.placers.open_placer(self.tokenizer, self._media_reader, null_prompt=self.null_prompt)
        options = {"placer": placer, "null_prompts": self.null_prompt > 0}
        return ChatRenderer(self.tokenizer, self._read_template(), loss_mask, self.template_args, **options)

    def _row_options(self, split: Literal["train", "val"]) -> dict[str, Any]:
        options = super()._row_options(split)
        drops = split == "train" and self.null_prompt > 0
        return options | ({"null_prompts": stream.samples.NullPrompts(self.null_prompt, self.seed)} if drops else {})

    def build_media_loader(self) -> "MediaLoader | None":
        """Build what loads the images of micro-batches; None for a model that reads none."""
        reader = self._media_reader
        return None if reader is None else stream.batch_media.MediaLoader(reader, self.on_error)

    @cached_property
    def _media_reader(self) -> "AnyReader | None":
        """The reader of images as the model sees them; None for a model that reads none, and with streaming."""
        if self.streaming or self.prompt_style is not None:
            return None
        return media.reader.open_media_reader(self.tokenizer.folder)

    def _read_template(self) -> ChatTemplate:
        if self.chat_template is not None:
            source = read_utf8(self.chat_template)
            template: ChatTemplate | None = ChatTemplate(source, self.chat_template, date=self._date)
        else:
            template = read_template(self.tokenizer.folder, self._date)
        if template is None:
            raise UserError(
                f"data: {self.tokenizer.folder} has no chat template; set data.prompt_style: alpaca, or "
                "data.chat_template: a file"
            )
        check_variables(template, self.template_args, "data.template_args")
        return template

    def count_samples(self, sources: list[DataSource], sizes: list[int]) -> list[int]:
        """Number of samples per epoch from each source."""
        return sizes if self.mix == "concat" else count_interleaved(sources, sizes, self.stopping == "first_exhausted")

    @cached_property
    def _streamed(self) -> list[streamed_sources.StreamedSource]:
        """The sources, opened for streaming."""
        return [streamed_sources.open_source(source, self.cache_dir, self.val_rows) for source in self._sources]

    def _build_held_out(self, source: streamed_sources.StreamedSource) -> DatasetEntry:
        """Build the entry of the rows of a source that are held out for validation."""
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        rows = self._build_row_set(source.source, source.files, source.read_held_out)
        settings = [*rows.settings, self.val_rows]
        return DatasetEntry(replace(rows, name=f"{rows.name} (val_rows)", settings=settings), source.source, "val")

    def iter_conversations(self) -> Iterator[Conversation]:
        """Iterate over all conversations that are valid."""
        if not self.streaming:
            yield from super().iter_conversations()
        for source in self._streamed if self.streaming else ():
            yield from iter_conversations(self._build_row_set(source.source, source.files, source.read_rows))

    def pick_conversation(self, which: Literal["first", "random"] | int, seed: int) -> int:
        """Return the index of the first conversation, of a random one, or the given one."""
        if not self.streaming:
            return super().pick_conversation(which, seed)
        if which == "random":
            raise UserError("eval.evaluate_example: random needs the number of rows; with data.streaming use first")
        return 0 if which == "first" else int(which)

    def training_documents(self) -> Iterable[str]:
        """Iterate over the texts of the training rows, message by message."""
        return iter_texts(self.iter_conversations()) if self.streaming else super().training_documents()

    def train_stream(self, shape: BatchShape) -> Stream:
        """Stream the training samples, endlessly."""
        if not self.streaming:
            return super().train_stream(shape)
        self.print_row_reports(shape)
        sources = self._streamed
        length = self.packing.length or shape.max_seq_length * self.answers_per_sample
        packing = (length, self.packing.strategy) if self.packing.enabled else None
        builder = stream.streaming.SampleBuilder(
            renderer=self.build_renderer(),
            on_error=self.on_error,
            on_overlong=self.on_overlong,
            length=shape.max_seq_length,
            packing=packing,
            padding=self.padding,
            window=self.shuffle_buffer or streamed_sources.DEFAULT_WINDOW,
            seed=streamed_sources.derive_seed(self.seed, shape.rank, shape.ranks),
        )
        row_sets = [self._build_row_set(source.source, source.files, source.read_rows) for source in sources]
        channels = sorted({source.source.channel or "default" for source in sources})
        rows = stream.streaming.StreamedRows(
            row_sets,
            streamed_sources.build_shards(sources, self.mix, self.seed, shape),
            builder,
            micro_batch_size=shape.micro_batch_size,
            channels=[] if channels == ["default"] else channels,
            value_name=self.value_name,
            columns_read=self.columns_read(),
        )
        contents = [[rows.sources, rows.settings, rows.channel] for rows in row_sets]
        weights = [source.source.weight for source in sources]
        fingerprint = stream.fingerprint.compute_fingerprint(
            contents, weights, self.mix, self.val_rows, self.seed, shape.ranks, builder.fingerprint_parts()
        )
        return stream.streaming.StreamedBatches(
            rows, shape, workers=self.num_workers, fingerprint=fingerprint, cached_reports=self.report()
        )
