"""LitGPT's data modules of instructions: an own JSON file, and published sets by name."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litgpt.data.modules.finetuning import DatasetEntry, FinetuningData
from litgpt.data.read.conversation import Conversation, Message, to_conversation
from litgpt.data.read.documents import fingerprint_files
from litgpt.data.read.downloads import download_file
from litgpt.data.read.fields import BadRow
from litgpt.data.read.row_sources import DataSource, LocatedRow, download_dataset, read_rows
from litgpt.data.render.prompt_styles import parse_style, save_prompt_style
from litgpt.errors import UserError
from litgpt.recipe.bounds import Fraction

if TYPE_CHECKING:
    from litgpt.data.cache.examples import Renderer

ALPACA = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
ALPACA_GPT4 = (
    "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json"
)
DOLLY = "https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"
LONGFORM = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"
FLAN_URL = "https://huggingface.co/datasets/Muennighoff/flan/resolve/main"
FLAN_TASKS = re.findall(
    r"\w+",
    "aeslc ag_news_subset anli_r1 anli_r2 anli_r3 arc_challenge arc_easy bool_q cb cnn_dailymail cola common_gen copa "
    "coqa cosmos_qa dart definite_pronoun_resolution drop e2e_nlg fix_punct gigaword glue_mrpc glue_qqp hellaswag "
    "imdb_reviews math_dataset mnli_matched mnli_mismatched multi_news multirc natural_questions openbookqa "
    "opinion_abstracts_idebate opinion_abstracts_rotten_tomatoes para_crawl_enes paws_wiki piqa qnli quac record rte "
    "samsum sentiment140 snli squad_v1 squad_v2 sst2 story_cloze stsb trec trivia_qa true_case web_nlg_en wic "
    "wiki_lingua_english_en wmt14_enfr wmt16_translate_csen wmt16_translate_deen wmt16_translate_fien "
    "wmt16_translate_roen wmt16_translate_ruen wmt16_translate_tren wnli word_segment wsc yelp_polarity_reviews",
)

Split = Literal["both", "train", "val"]
Convert = Callable[[Any], list[Conversation]]


def convert_instruction(row: Any, columns: dict[str, str] | None = None) -> list[Conversation]:
    """A row of `instruction`, `output` and perhaps `input`, under these or other names."""
    return [to_conversation(row, columns, "instruction")]


def convert_exchanges(row: Any, every: bool) -> list[Conversation]:
    """The first question and answer of a conversation, or every one by itself, as LitGPT trains them."""
    said = row.get("conversations") if isinstance(row, dict) else None
    if isinstance(said, list) and said and all(isinstance(text, str) for text in said):
        messages: Sequence[Message] = [Message("user", text) for text in said]  # the roles take turns
    else:
        messages = to_conversation(row, format="messages").messages
    pairs = list(zip(messages[::2], messages[1::2], strict=False))
    if not pairs:
        raise BadRow("no answer")
    return [
        Conversation((Message("user", question.content), Message("assistant", answer.content)))
        for question, answer in (pairs if every else pairs[:1])
    ]


@dataclass(kw_only=True)
class Instructions(FinetuningData):
    """What the sets of instructions share: a prompt style writes them."""

    mask_prompt: bool = False
    """Train the answers only; false trains the prompts too."""
    prompt_style: str | dict[str, Any] = "alpaca"
    """How instructions are written: a style's name, or class_path and init_args of one."""
    ignore_index: int = -100
    """LitGPT's label of tokens that are not trained; -100 is the only one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ignore_index != -100:
            raise UserError(f"data.ignore_index: {self.ignore_index} will not do; -100 is what the loss leaves out")
        self.style = parse_style(self.prompt_style)

    def renders(self) -> "Renderer":
        """The prompt style."""
        from litgpt.data.render.instruction_renderer import InstructionRenderer

        return InstructionRenderer(self.tokenizer, self.style, mask_prompt=self.mask_prompt)

    def save_prompt_format(self, folder: Path) -> None:
        """Name the prompt style."""
        save_prompt_style(self.style, folder)

    def build_entry(
        self, name: str, files: list[Path], convert: Convert, about: Any, part: Split = "both"
    ) -> DatasetEntry:
        """Files as a set of rows; `about` is what `convert` depends on."""
        from litgpt.data.cache.examples import RowSet

        def read() -> Iterator[LocatedRow]:
            for file in files:
                yield from read_rows(file)

        self.cache().mkdir(parents=True, exist_ok=True)
        known = fingerprint_files(files, self.cache() / "hashes.json")
        return DatasetEntry(RowSet(name, known, read, convert, ["instruction", about]), DataSource(name), part)


@dataclass
class JSON(Instructions):
    """Instructions of your own.

    On disk: a .json file (a list) or .jsonl file (one object a line) of `instruction`, `output` and perhaps `input`; or
    a folder with two of them, train and val. Samples are kept beside it in .litgpt-tokens.
    """

    json_path: Path
    """The file, or the folder of train.json(l) and val.json(l)."""
    val_split_fraction: Fraction | None = None
    """Share of a single file for validation; null for 0.05."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json_path.is_dir() and self.val_split_fraction is not None:
            raise UserError(
                f"data.val_split_fraction: {self.val_split_fraction}, but data.json_path is a folder with a val file "
                "of its own; leave it out"
            )

    def cache(self) -> Path:
        """The folder that the samples go to."""
        beside = self.json_path if self.json_path.is_dir() else self.json_path.parent
        return beside / ".litgpt-tokens"

    def default_fraction(self) -> float:
        """The share of a single file for validation."""
        return 0.05 if self.val_split_fraction is None else self.val_split_fraction

    def sets(self) -> list[DatasetEntry]:
        """The file, or the two in the folder."""
        if not self.json_path.is_dir():
            if not self.json_path.is_file() or self.json_path.suffix not in (".json", ".jsonl"):
                raise UserError(f"data.json_path: {self.json_path} is no .json or .jsonl file, nor a folder of two")
            return [self.build_entry(str(self.json_path), [self.json_path], convert_instruction, None)]
        parts: tuple[Split, Split] = ("train", "val")
        return [
            self.build_entry(f"{self.json_path}/{part}", [self._file(part)], convert_instruction, None, part)
            for part in parts
        ]

    def _file(self, part: str) -> Path:
        found = [path for suffix in ("json", "jsonl") if (path := self.json_path / f"{part}.{suffix}").is_file()]
        if not found:
            raise UserError(f"data.json_path: {self.json_path} holds no {part}.json or {part}.jsonl")
        return found[0]


@dataclass
class Alpaca(Instructions):
    """The 52,000 instructions of Stanford Alpaca (Taori et al. 2023), cleaned, downloaded from GitHub.

    On disk: `file_name` in `download_dir`, a list of instruction, input and output, and samples beside it.
    """

    val_split_fraction: Fraction = 0.03865
    """Share of the rows for validation."""
    download_dir: Path = Path("./data/alpaca")
    """Where the file and the samples are kept."""
    file_url: str = ALPACA
    """Where it is downloaded from."""
    file_name: str = "alpaca_data_cleaned_archive.json"
    """Its name on disk."""

    def cache(self) -> Path:
        """The folder that the samples go to."""
        return self.download_dir

    def default_fraction(self) -> float:
        """The share of the rows for validation."""
        return self.val_split_fraction

    def sets(self) -> list[DatasetEntry]:
        """The one file."""
        return [self.build_entry(type(self).__name__, [self._downloaded()], convert_instruction, None)]

    def _downloaded(self) -> Path:
        path = self.download_dir / self.file_name
        if not path.is_file():
            download_file(self.file_url, path)
        return path


@dataclass
class AlpacaGPT4(Alpaca):
    """Alpaca's instructions answered by GPT-4 (Peng et al. 2023), downloaded from GitHub; on disk as Alpaca."""

    val_split_fraction: Fraction = 0.03847
    """Share of the rows for validation."""
    download_dir: Path = Path("./data/alpacagpt4")
    """Where the file and the samples are kept."""
    file_url: str = ALPACA_GPT4
    """Where it is downloaded from."""
    file_name: str = "alpacagpt4_data_cleaned_archive.json"
    """Its name on disk."""


@dataclass
class Dolly(Alpaca):
    """15,000 instructions written by employees of Databricks (Conover et al. 2023), downloaded from the hub.

    On disk: `file_name` in `download_dir`, a line of instruction, context and response each, and samples beside it.
    """

    val_split_fraction: Fraction = 0.1
    """Share of the rows for validation."""
    download_dir: Path = Path("./data/dolly")
    """Where the file and the samples are kept."""
    file_url: str = DOLLY
    """Where it is downloaded from."""
    file_name: str = "dolly_data_cleaned.jsonl"
    """Its name on disk."""

    def sets(self) -> list[DatasetEntry]:
        """The one file."""
        columns = {"context": "input", "response": "output"}
        return [self.build_entry("Dolly", [self._downloaded()], partial(convert_instruction, columns=columns), columns)]


@dataclass
class Alpaca2k(Instructions):
    """2,000 rows of Alpaca, downloaded from the hub: parquet files in `download_dir`, and samples beside them."""

    val_split_fraction: Fraction = 0.05
    """Share of the rows for validation."""
    download_dir: Path = Path("./data/alpaca2k")
    """Where the files and the samples are kept."""
    repo_id: str = "mhenrichsen/alpaca_2k_test"
    """Name on the hub."""

    def cache(self) -> Path:
        """The folder that the samples go to."""
        return self.download_dir

    def default_fraction(self) -> float:
        """The share of the rows for validation."""
        return self.val_split_fraction

    def sets(self) -> list[DatasetEntry]:
        """The files of the data set."""
        files = list_hub_files(self.repo_id, self.download_dir, "")
        return [self.build_entry("Alpaca2k", files, convert_instruction, None)]


@dataclass
class Deita(Instructions):
    """10,000 conversations chosen by Deita (Liu et al. 2023), downloaded from the hub; samples beside them."""

    include_multiturn_conversations: bool = False
    """Train every question and its answer as a sample of its own; false trains the first of each conversation."""
    download_dir: Path = Path("./data/deita")
    """Where the files and the samples are kept."""
    repo_id: str = "HuggingFaceH4/deita-10k-v0-sft"
    """Name on the hub."""

    def cache(self) -> Path:
        """The folder that the samples go to."""
        return self.download_dir

    def sets(self) -> list[DatasetEntry]:
        """The splits train_sft and test_sft."""
        every = self.include_multiturn_conversations
        parts: tuple[tuple[str, Split], ...] = (("train_sft", "train"), ("test_sft", "val"))
        return [
            self.build_entry(
                f"Deita ({split})",
                list_hub_files(self.repo_id, self.download_dir, split),
                partial(convert_exchanges, every=every),
                every,
                part,
            )
            for split, part in parts
        ]


@dataclass
class LIMA(Instructions):
    """1,000 conversations chosen by hand (Zhou et al. 2023), a gated data set of the hub; samples in data/lima."""

    val_split_fraction: Fraction = 0.1
    """Share of the rows for validation."""
    include_multiturn_conversations: bool = False
    """Train every question and its answer as a sample of its own; false trains the first of each conversation."""
    repo_id: str = "GAIR/lima"
    """Name on the hub."""
    access_token: str | None = field(default=None, repr=False)
    """Of an account that was granted access; null for $HF_TOKEN."""

    def cache(self) -> Path:
        """The folder that the samples go to."""
        return Path("./data/lima")

    def default_fraction(self) -> float:
        """The share of the rows for validation."""
        return self.val_split_fraction

    def sets(self) -> list[DatasetEntry]:
        """The split train."""
        every = self.include_multiturn_conversations
        files = list_hub_files(self.repo_id, self.cache(), "train", self.access_token or os.getenv("HF_TOKEN"))
        return [self.build_entry("LIMA", files, partial(convert_exchanges, every=every), every)]


@dataclass
class LongForm(Instructions):
    """Instructions for long texts (Köksal et al. 2023), downloaded from GitHub: train.json and val.json."""

    prompt_style: str | dict[str, Any] = field(default="longform", kw_only=True)
    """How instructions are written: a style's name, or class_path and init_args of one."""
    download_dir: Path = Path("./data/longform")
    """Where the files and the samples are kept."""

    def cache(self) -> Path:
        """The folder that the samples go to."""
        return self.download_dir

    def sets(self) -> list[DatasetEntry]:
        """Both files."""
        columns = {"input": "instruction"}
        parts: tuple[Split, Split] = ("train", "val")
        for part in parts:
            if not (self.download_dir / f"{part}.json").is_file():
                download_file(f"{LONGFORM}/{part}.json", self.download_dir / f"{part}.json")
        convert = partial(convert_instruction, columns=columns)
        return [
            self.build_entry(f"LongForm ({part})", [self.download_dir / f"{part}.json"], convert, columns, part)
            for part in parts
        ]


@dataclass
class FLAN(Instructions):
    """66 tasks of FLAN (Wei et al. 2021), downloaded from the hub: <subset>_train.jsonl and <subset>_test.jsonl."""

    prompt_style: str | dict[str, Any] = field(default="flan", kw_only=True)
    """How instructions are written: a style's name, or class_path and init_args of one."""
    download_dir: Path = Path("./data/flan")
    """Where the files and the samples are kept."""
    url: str = FLAN_URL
    """Where they are downloaded from."""
    subsets: str | None = None
    """Names of some of the tasks, such as aeslc_10templates,rte_10templates; null for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [f"{task}_10templates" for task in FLAN_TASKS]
        self.names = known if self.subsets is None else [name.strip() for name in self.subsets.split(",")]
        for name in self.names:
            if name not in known:
                raise UserError(f"data.subsets: {name!r} is not known; give some of {', '.join(known[:3])}, ...")

    def cache(self) -> Path:
        """The folder that the samples go to."""
        return self.download_dir

    def sets(self) -> list[DatasetEntry]:
        """All files for training and all for validation."""
        columns = {"inputs": "instruction", "targets": "output"}
        parts: tuple[tuple[str, Split], ...] = (("train", "train"), ("test", "val"))
        convert = partial(convert_instruction, columns=columns)
        return [
            self.build_entry(f"FLAN ({split})", self._files(split), convert, columns, part) for split, part in parts
        ]

    def _files(self, split: str) -> list[Path]:
        files = [self.download_dir / f"{name}_{split}.jsonl" for name in self.names]
        for file in files:
            if not file.is_file():
                download_file(f"{self.url}/{file.name}", file)
        return files


def list_hub_files(name: str, folder: Path, split: str, token: str | None = None) -> list[Path]:
    """The files of a hub's data set whose names hold `split`, fetched into a folder."""
    home = download_dataset(name, folder, token)
    files = sorted(path for path in home.rglob("*") if path.suffix in (".parquet", ".json", ".jsonl"))
    found = [path for path in files if split in path.name and "." not in path.relative_to(home).parts[0][:1]]
    if not found:
        raise UserError(f"data: {home} holds no file of {split or 'rows'}; remove it and it is fetched again")
    return found
