"""Instructions and their collation at the import paths of LitGPT, and a data module of a user's own that trains."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from litgpt.data import SFTDataset, get_sft_collate_fn
from litgpt.data.stream.loader import LoaderStream
from litgpt.data.tokenizer import Tokenizer, train_tokenizer
from litgpt.errors import UserError
from litgpt.prompts import PromptStyle
from litgpt.recipe.data import BatchShape

ROWS = [{"instruction": "ab", "output": "cd"}, {"instruction": "a", "output": "longer", "input": "x"}]


class Shout(PromptStyle):
    """A style of a user's own."""

    def apply(self, prompt, **kwargs):
        return f"{prompt.upper()}{kwargs.get('input', '')}!"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes") / "tokenizer"
    train_tokenizer(["a"], "bytes", 0, folder)
    return Tokenizer(folder)


@pytest.mark.parametrize("limit", [-1, 4, 1000])
@pytest.mark.parametrize("masked", [True, False])
def test_a_sample_is_prompt_and_answer(tokenizer: Tokenizer, limit: int, masked: bool) -> None:
    sample = SFTDataset(ROWS, tokenizer, Shout(), max_seq_length=limit, mask_prompt=masked, ignore_index=-1)[0]
    prompt, answer = tokenizer.encode("AB!").tolist(), [*tokenizer.encode("cd", bos=False).tolist(), tokenizer.eos_id]
    ids = (prompt + answer)[: limit if limit > 0 else None]
    labels = ([-1] * len(prompt) + answer)[: len(ids)] if masked else ids
    assert sample["input_ids"].tolist() == ids and sample["labels"].tolist() == labels
    assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
    assert sample["token_counts"]["raw_plus_prompt_template"] == len(ids)


def test_rows_are_transformed_and_padded_at_the_right(tokenizer: Tokenizer) -> None:
    dataset = SFTDataset(ROWS, tokenizer, "alpaca", transform=lambda row: {**row, "output": row["output"] * 2})
    samples = [dataset[0], dataset[1]]
    assert tokenizer.decode(samples[0]["input_ids"]).endswith("cdcd")
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch = get_sft_collate_fn(pad_id=7)(samples)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, longest)
    short = min(samples, key=lambda sample: len(sample["input_ids"]))
    row, length = [len(sample["input_ids"]) for sample in samples].index(len(short["input_ids"])), len(short["labels"])
    assert set(batch["input_ids"][row, length:].tolist()) <= {7}
    assert set(batch["labels"][row, length:].tolist()) <= {-100}
    assert batch["token_counts"]["raw"].shape == (2, 1)
    assert get_sft_collate_fn(max_seq_length=5)(samples)["labels"].shape == (2, 5)


def test_labels_of_a_loader_are_shifted_and_excluded_where_negative(tokenizer: Tokenizer) -> None:
    dataset = SFTDataset(ROWS, tokenizer, Shout(), ignore_index=-1)
    loader = DataLoader(dataset, batch_size=2, collate_fn=get_sft_collate_fn(ignore_index=-1))
    (batch,) = LoaderStream(lambda: loader, BatchShape(2, 2, 64, 0, 1, 1), repeat=False)
    raw = get_sft_collate_fn(ignore_index=-100)([dataset[0], dataset[1]])
    assert torch.equal(batch.ids, raw["input_ids"][:, :-1])
    assert torch.equal(batch.labels, torch.where(raw["labels"][:, 1:] < 0, -100, raw["labels"][:, 1:]))
    for wrong in ({"input_ids": raw["input_ids"]}, {**raw, "labels": raw["labels"][:, :-1]}):
        with pytest.raises(UserError, match="labels"):
            next(iter(LoaderStream(lambda wrong=wrong: [wrong], BatchShape(2, 2, 64, 0, 1, 1), repeat=False)))


MODULE = """
from dataclasses import dataclass, field
from typing import Optional, Union

import torch
from torch.utils.data import DataLoader

from litgpt import PromptStyle, Tokenizer
from litgpt.config import configs, find_multiple, name_to_config
from litgpt.data import DataModule, SFTDataset, get_sft_collate_fn
from litgpt.prompts import Alpaca, Default, prompt_styles


class Shout(Default):
    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return super().apply(prompt.upper(), sys_prompt=sys_prompt) + "!"


@dataclass
class Sums(DataModule):
    number: int = 40
    mask_prompt: bool = True
    prompt_style: Union[str, PromptStyle] = "alpaca"
    ignore_index: int = -100
    seed: int = 42
    num_workers: int = 0

    tokenizer: Optional[Tokenizer] = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)
    train_dataset: Optional[SFTDataset] = field(default=None, init=False, repr=False)
    test_dataset: Optional[SFTDataset] = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__init__()
        if isinstance(self.prompt_style, str):
            self.prompt_style = PromptStyle.from_name(self.prompt_style)

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None) -> None:
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.max_seq_length = -1 if max_seq_length is None else max_seq_length

    def setup(self, stage: str = "") -> None:
        rows = [{"instruction": f"How many are {n} things?", "output": "There are many."} for n in range(self.number)]
        make = lambda rows: SFTDataset(
            data=rows, tokenizer=self.tokenizer, prompt_style=self.prompt_style, max_seq_length=self.max_seq_length,
            mask_prompt=self.mask_prompt, ignore_index=self.ignore_index,
        )
        self.train_dataset, self.test_dataset = make(rows[4:]), make(rows[:4])

    def train_dataloader(self) -> DataLoader:
        return self.load(self.train_dataset, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.load(self.test_dataset, shuffle=False)

    def load(self, dataset, shuffle):
        collate = get_sft_collate_fn(max_seq_length=self.max_seq_length, ignore_index=self.ignore_index)
        return DataLoader(
            dataset, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers, collate_fn=collate
        )
"""


def test_a_data_module_in_the_style_of_litgpt_trains(tmp_path: Path) -> None:
    from tests.commands.test_finetune import LORA, run, write_base

    (tmp_path / "own_sums.py").write_text(MODULE)
    data = {"class_path": "own_sums.Sums", "init_args": {"prompt_style": {"class_path": "own_sums.Shout"}}}
    losses = run(tmp_path, write_base(tmp_path / "base"), **LORA, data=data)
    assert losses[10] < losses[1] - 0.3
    assert "own_sums.Shout" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_prompt_style_of_the_user_is_saved_and_loaded_if_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    from litgpt.data import JSON
    from litgpt.prompts import load_prompt_style

    (tmp_path / "own_style.py").write_text(MODULE)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS * 10))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompt_style.yaml").write_text("class_path: own_style.Shout\n")
    with pytest.raises(UserError, match="import the module of your own style"):
        load_prompt_style(tmp_path)
    data = JSON(json_path=tmp_path / "rows.json", prompt_style="own_style.Shout", num_workers=0)  # imports it
    data.connect(tokenizer)
    data.prepare_data()
    batch = next(iter(data.train_stream(BatchShape(2, 2, 64, 0, 1, 1))))
    assert "AB!" in tokenizer.decode(batch.ids[0]) or "A!" in tokenizer.decode(batch.ids[0])
    files = data.prompt_files()
    assert files is not None and "own_style.Shout" in files["prompt_style.yaml"]
    assert load_prompt_style(tmp_path).apply("hi") == "HI!"


def test_import_paths_of_litgpts_users() -> None:
    import litgpt
    from litgpt.config import configs, find_multiple, name_to_config
    from litgpt.prompts import Alpaca, Default, model_name_to_prompt_style, prompt_styles

    assert litgpt.PromptStyle is PromptStyle
    assert (find_multiple(8, 5), find_multiple(10, 5), find_multiple(1, 64)) == (10, 10, 64)
    assert len(configs) == len(name_to_config) and name_to_config["pythia-14m"]["n_layer"] == 6
    assert prompt_styles["alpaca"] is Alpaca and issubclass(Default, PromptStyle)
    assert type(model_name_to_prompt_style("Llama-3.2-1B-Instruct")).__name__ == "Llama3"
    assert type(model_name_to_prompt_style("pythia-14m")) is Default
