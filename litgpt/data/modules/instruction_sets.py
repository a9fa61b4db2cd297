"""LitGPT's data modules of instructions: JSON files, and published data sets by name."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from litgpt.data.modules.finetuning import DatasetEntry, FinetuningData, Split
from litgpt.data.read.conversation import Conversation, to_conversation
from litgpt.data.read.downloads import download_file
from litgpt.data.read.fields import BadRow
from litgpt.data.read.message import Message
from litgpt.data.read.row_sets import RowSet
from litgpt.data.read.row_sources import DataSource, download_dataset
from litgpt.data.render.example import Renderer
from litgpt.data.render.instruction_renderer import InstructionRenderer
from litgpt.data.render.prompt_format import build_style_files
from litgpt.data.render.prompt_styles import parse_style
from litgpt.errors import UserError
from litgpt.recipe.bounds import Fraction

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

SPLITS: tuple[Split, Split] = ("train", "val")


def convert_instruction(row: Any, columns: dict[str, str] | None) -> list[Conversation]:
    """Convert a row of `instruction`, `output` and optionally `input`, under these or other names."""
    return [to_conversation(row, columns, "instruction")]


def convert_exchanges(row: Any, multiturn: bool) -> list[Conversation]:
    """Split a conversation into its first question and answer, or all of them separately, as LitGPT does."""
    texts = row.get("conversations") if isinstance(row, dict) else None
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        messages: Sequence[Message] = [Message("user", text) for text in texts]  # the roles alternate
        unread = [name for name in row if name != "conversations"]
    else:
        conversation = to_conversation(row, format="messages")
        messages = conversation.messages
        unread = [*conversation.unread, *(["system"] if conversation.system else [])]
    pairs = list(zip(messages[::2], messages[1::2], strict=False))
    if not pairs:
        raise BadRow("no answer")
    conversations = [
        Conversation((Message("user", question.content), Message("assistant", answer.content)))
        for question, answer in (pairs if multiturn else pairs[:1])
    ]
    return [replace(conversations[0], unread=tuple(unread)), *conversations[1:]]


@dataclass(kw_only=True)
class Instructions(FinetuningData):
    """Base of the instruction data sets, which are formatted by a prompt style."""

    mask_prompt: bool = False
    """Train only the answers; false also trains the prompts."""
    prompt_style: str | dict[str, Any] = "alpaca"
    """Prompt style of the instructions: a name, or class_path and init_args."""
    ignore_index: int = -100
    """LitGPT's label of tokens that are not trained; only -100 is supported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ignore_index != -100:
            raise UserError(f"data.ignore_index: {self.ignore_index} is not supported; set it to -100")
        self.style = parse_style(self.prompt_style, "data.prompt_style")

    def build_renderer(self) -> Renderer:
        """Build the renderer of the prompt style."""
        return InstructionRenderer(self.tokenizer, self.style, mask_prompt=self.mask_prompt)

    def prompt_files(self) -> dict[str, str] | None:
        """Build the files of the prompt style."""
        return build_style_files(self.style, self.tokenizer) if self.tokenizer else None

    def build_entry(
        self,
        name: str,
        files: list[Path],
        settings: Any = None,
        split: Split = "both",
        convert: Callable[[Any, Any], list[Conversation]] = convert_instruction,
    ) -> DatasetEntry:
        """Build the entry of some files, whose rows are converted by `convert(row, settings)`."""
        sources, read = self.open_files(files)
        rows = RowSet(name, sources, read, lambda row: convert(row, settings), ["instruction", settings])
        return DatasetEntry(rows, DataSource(name), split)


class PublishedInstructions(Instructions):
    """Base of the instruction data sets that are downloaded into a folder."""

    output_key: ClassVar[str] = "data.download_dir"
    download_dir: Path
    val_split_fraction: float

    def cache_folder(self) -> Path:
        """The folder of the samples."""
        return self.download_dir

    def default_val_fraction(self) -> float:
        """The fraction of the rows for validation."""
        return self.val_split_fraction

    def download(self, url: str, name: str) -> Path:
        """Download a file unless it exists; returns its path."""
        path = self.download_dir / name
        if not path.is_file():
            download_file(url, path)
        return path


@dataclass
class JSON(Instructions):
    """Instructions of your own.

    On disk: a .json file (a list) or .jsonl file (one object per line) of `instruction`, `output` and optionally
    `input`; or a folder with two of them, train and val. Samples are cached next to it in .litgpt-tokens.
    """

    output_key: ClassVar[str] = "data.json_path"

    json_path: Path
    """The file, or a folder with train.json(l) and val.json(l)."""
    val_split_fraction: Fraction | None = None
    """Fraction of a single file for validation; null for 0.05."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.json_path.is_dir() and self.val_split_fraction is not None:
            raise UserError(
                f"data.val_split_fraction: {self.val_split_fraction}, but data.json_path is a folder with its own val "
                "file; leave it out"
            )

    def cache_folder(self) -> Path:
        """The folder of the samples."""
        folder = self.json_path if self.json_path.is_dir() else self.json_path.parent
        return folder / ".litgpt-tokens"

    def default_val_fraction(self) -> float:
        """The fraction of a single file for validation."""
        return 0.05 if self.val_split_fraction is None else self.val_split_fraction

    def check_files(self, *, has_tokenizer: bool) -> None:
        """Check that the file exists, or the two in the folder, and that there is a tokenizer."""
        super().check_files(has_tokenizer=has_tokenizer)
        self._list_files()

    def list_entries(self) -> list[DatasetEntry]:
        """List the file, or the two in the folder."""
        files = self._list_files()
        if len(files) == 1:
            return [self.build_entry(str(self.json_path), files)]
        pairs = zip(SPLITS, files, strict=True)
        return [self.build_entry(f"{self.json_path}/{split}", [file], split=split) for split, file in pairs]

    def _list_files(self) -> list[Path]:
        if self.json_path.is_dir():
            return [self._find_file(split) for split in SPLITS]
        if not self.json_path.is_file() or self.json_path.suffix not in (".json", ".jsonl"):
            raise UserError(f"data.json_path: {self.json_path} is not a .json or .jsonl file, or a folder of two")
        return [self.json_path]

    def _find_file(self, split: str) -> Path:
        paths = [path for suffix in ("json", "jsonl") if (path := self.json_path / f"{split}.{suffix}").is_file()]
        if not paths:
            raise UserError(f"data.json_path: {self.json_path} has no {split}.json or {split}.jsonl")
        return paths[0]


@dataclass
class Alpaca(PublishedInstructions):
    """The 52,000 instructions of Stanford Alpaca (Taori et al. 2023), cleaned, downloaded from GitHub.

    On disk: `file_name` in `download_dir`, a list of instruction, input and output, and samples next to it.
    """

    val_split_fraction: Fraction = 0.03865
    """Fraction of the rows for validation."""
    download_dir: Path = Path("./data/alpaca")
    """Folder of the file and the samples."""
    file_url: str = ALPACA
    """URL of the file."""
    file_name: str = "alpaca_data_cleaned_archive.json"
    """Name of the file on disk."""
    columns: ClassVar[dict[str, str] | None] = None

    def list_entries(self) -> list[DatasetEntry]:
        """List the one file."""
        return [self.build_entry(type(self).__name__, [self.download(self.file_url, self.file_name)], self.columns)]


@dataclass
class AlpacaGPT4(Alpaca):
    """Alpaca's instructions answered by GPT-4 (Peng et al. 2023), downloaded from GitHub; on disk as Alpaca."""

    val_split_fraction: Fraction = 0.03847
    """Fraction of the rows for validation."""
    download_dir: Path = Path("./data/alpacagpt4")
    """Folder of the file and the samples."""
    file_url: str = ALPACA_GPT4
    """URL of the file."""
    file_name: str = "alpacagpt4_data_cleaned_archive.json"
    """Name of the file on disk."""


@dataclass
class Dolly(Alpaca):
    """15,000 instructions written by employees of Databricks (Conover et al. 2023), downloaded from the hub.

    On disk: `file_name` in `download_dir`, rows of instruction, context and response, and samples next to it.
    """

    val_split_fraction: Fraction = 0.1
    """Fraction of the rows for validation."""
    download_dir: Path = Path("./data/dolly")
    """Folder of the file and the samples."""
    file_url: str = DOLLY
    """URL of the file."""
    file_name: str = "dolly_data_cleaned.jsonl"
    """Name of the file on disk."""
    columns: ClassVar[dict[str, str] | None] = {"context": "input", "response": "output"}


@dataclass
class Alpaca2k(PublishedInstructions):
    """2,000 rows of Alpaca, downloaded from the hub: parquet files in `download_dir`, and samples next to them."""

    val_split_fraction: Fraction = 0.05
    """Fraction of the rows for validation."""
    download_dir: Path = Path("./data/alpaca2k")
    """Folder of the files and the samples."""
    repo_id: str = "mhenrichsen/alpaca_2k_test"
    """Name on the hub."""

    def list_entries(self) -> list[DatasetEntry]:
        """List the files of the data set."""
        return [self.build_entry("Alpaca2k", list_hub_files(self.repo_id, self.download_dir, ""))]


@dataclass
class Deita(PublishedInstructions):
    """10,000 conversations chosen by Deita (Liu et al. 2023), downloaded from the hub; samples next to them."""

    include_multiturn_conversations: bool = False
    """Train every question and its answer as a separate sample; false trains the first of each conversation."""
    download_dir: Path = Path("./data/deita")
    """Folder of the files and the samples."""
    repo_id: str = "HuggingFaceH4/deita-10k-v0-sft"
    """Name on the hub."""

    def list_entries(self) -> list[DatasetEntry]:
        """List the splits train_sft and test_sft."""
        multiturn, entries = self.include_multiturn_conversations, []
        for name, split in zip(("train_sft", "test_sft"), SPLITS, strict=True):
            files = list_hub_files(self.repo_id, self.download_dir, name)
            entries.append(self.build_entry(f"Deita ({name})", files, multiturn, split, convert_exchanges))
        return entries


@dataclass
class LIMA(PublishedInstructions):
    """1,000 conversations chosen by hand (Zhou et al. 2023), a gated data set of the hub; samples in data/lima."""

    val_split_fraction: Fraction = 0.1
    """Fraction of the rows for validation."""
    include_multiturn_conversations: bool = False
    """Train every question and its answer as a separate sample; false trains the first of each conversation."""
    repo_id: str = "GAIR/lima"
    """Name on the hub."""
    access_token: str | None = field(default=None, repr=False)
    """Token of an account with access; null for $HF_TOKEN."""
    output_key: ClassVar[str] = "data"
    download_dir: ClassVar[Path] = Path("./data/lima")  # type: ignore[misc]

    def list_entries(self) -> list[DatasetEntry]:
        """List the split train."""
        files = list_hub_files(self.repo_id, self.download_dir, "train", self.access_token or os.getenv("HF_TOKEN"))
        return [self.build_entry("LIMA", files, self.include_multiturn_conversations, convert=convert_exchanges)]


@dataclass
class LongForm(PublishedInstructions):
    """Instructions for long texts (Köksal et al. 2023), downloaded from GitHub: train.json and val.json."""

    prompt_style: str | dict[str, Any] = field(default="longform", kw_only=True)
    """Prompt style of the instructions: a name, or class_path and init_args."""
    download_dir: Path = Path("./data/longform")
    """Folder of the files and the samples."""

    def list_entries(self) -> list[DatasetEntry]:
        """List both files."""
        files = [self.download(f"{LONGFORM}/{split}.json", f"{split}.json") for split in SPLITS]
        return [
            self.build_entry(f"LongForm ({split})", [file], {"input": "instruction"}, split)
            for split, file in zip(SPLITS, files, strict=True)
        ]


@dataclass
class FLAN(PublishedInstructions):
    """66 tasks of FLAN (Wei et al. 2021), downloaded from the hub: <subset>_train.jsonl and <subset>_test.jsonl."""

    prompt_style: str | dict[str, Any] = field(default="flan", kw_only=True)
    """Prompt style of the instructions: a name, or class_path and init_args."""
    download_dir: Path = Path("./data/flan")
    """Folder of the files and the samples."""
    url: str = FLAN_URL
    """URL of the files."""
    subsets: str | None = None
    """Names of tasks, such as aeslc_10templates,rte_10templates; null for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [f"{task}_10templates" for task in FLAN_TASKS]
        self.names = known if self.subsets is None else [name.strip() for name in self.subsets.split(",")]
        for name in self.names:
            if name not in known:
                raise UserError(f"data.subsets: {name!r} is unknown; use some of {', '.join(known[:3])}, ...")

    def list_entries(self) -> list[DatasetEntry]:
        """List all files for training and all for validation."""
        columns, entries = {"inputs": "instruction", "targets": "output"}, []
        for name, split in zip(("train", "test"), SPLITS, strict=True):
            file_names = [f"{task}_{name}.jsonl" for task in self.names]
            files = [self.download(f"{self.url}/{file_name}", file_name) for file_name in file_names]
            entries.append(self.build_entry(f"FLAN ({name})", files, columns, split))
        return entries


def list_hub_files(name: str, folder: Path, split: str, token: str | None = None) -> list[Path]:
    """Download a data set from the hub into a folder; returns the files whose names contain `split`."""
    dataset_folder = download_dataset(name, folder, token)
    files = sorted(path for path in dataset_folder.rglob("*") if path.suffix in (".parquet", ".json", ".jsonl"))
    files = [path for path in files if split in path.name and path.relative_to(dataset_folder).parts[0][:1] != "."]
    if not files:
        raise UserError(f"data: {dataset_folder} has no file of {split or 'rows'}; delete it to download it again")
    return files
