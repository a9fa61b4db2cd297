"""LitGPT's named sets of instructions: their files, as they are once downloaded, become questions and answers."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from litgpt.data import FLAN, LIMA, Alpaca, Alpaca2k, AlpacaGPT4, Deita, Dolly, LongForm
from litgpt.data.modules.instruction_sets import FLAN_TASKS, Instructions
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.recipe.data import DATA_MODULES, BatchShape
from tests.data.templates import write_tokenizer

ROWS = [{"instruction": f"i{n}", "input": "x" * (n % 2), "output": f"o{n}"} for n in range(30)]
TALK = [{"role": role, "content": f"{role}{n}"} for n in range(2) for role in ("user", "assistant")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever is asked of the network is an error, and paths are relative to a folder of their own."""

    def refuse(*arguments: Any, **_settings: Any) -> None:
        raise UserError(f"asked the network for {arguments}")

    monkeypatch.setattr("litgpt.data.modules.instruction_sets.download_file", refuse)
    monkeypatch.chdir(tmp_path)


def lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


def whole(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def parquet(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (path.parent if path.parent.name != "data" else path.parent.parent).joinpath(".complete").touch()


def read(data: Instructions, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The texts for training and for validation, sorted."""
    data.connect(tokenizer)
    data.prepare_data()
    split_texts = []
    for part in ("train", "val"):
        pieces = data._select_samples(BatchShape(1, 1, 1000), part)  # type: ignore[arg-type]
        texts = [] if pieces is None else [tokenizer.decode(pieces.read(n).ids) for n in range(len(pieces.table))]
        split_texts.append(sorted(texts))
    return split_texts[0], split_texts[1]


@pytest.mark.parametrize(("cls", "name", "held"), [(Alpaca, "alpaca", 1), (AlpacaGPT4, "alpacagpt4", 1)])
def test_alpaca(tokenizer: Tokenizer, cls: Any, name: str, held: int) -> None:
    whole(Path("data") / name / f"{name}_data_cleaned_archive.json", ROWS)
    data = cls(num_workers=0)
    train, val = read(data, tokenizer)
    wanted = [data.style.apply(row["instruction"], input=row["input"]) + row["output"] for row in ROWS]
    assert sorted(train + val) == sorted(wanted) and len(val) == held


def test_alpaca2k(tokenizer: Tokenizer) -> None:
    parquet(
        Path("data/alpaca2k/mhenrichsen--alpaca_2k_test/alpaca_2000.parquet"), [row | {"text": "t"} for row in ROWS]
    )
    train, val = read(Alpaca2k(val_split_fraction=0.1), tokenizer)
    assert len(train) == 27 and len(val) == 3


def test_dolly(tokenizer: Tokenizer) -> None:
    rows = [{"instruction": "i", "context": f"c{n}", "response": f"r{n}", "category": "qa"} for n in range(20)]
    lines(Path("data/dolly/dolly_data_cleaned.jsonl"), rows)
    data = Dolly()
    train, val = read(data, tokenizer)
    assert len(val) == 2 and sorted(train + val) == sorted(
        data.style.apply("i", input=f"c{n}") + f"r{n}" for n in range(20)
    )


@pytest.mark.parametrize("every", [False, True])
def test_deita(tokenizer: Tokenizer, every: bool) -> None:
    folder = Path("data/deita/HuggingFaceH4--deita-10k-v0-sft")
    for split, count in (("train_sft", 3), ("test_sft", 1)):
        parquet(folder / "data" / f"{split}-00000-of-00001.parquet", [{"messages": TALK}] * count)
    (folder / ".complete").touch()
    data = Deita(include_multiturn_conversations=every, prompt_style="default")
    train, val = read(data, tokenizer)
    assert set(train) == {"user0assistant0", *(["user1assistant1"] if every else [])}
    assert (len(train), len(val)) == ((6, 2) if every else (3, 1))


@pytest.mark.parametrize("every", [False, True])
def test_lima(tokenizer: Tokenizer, every: bool) -> None:
    folder = Path("data/lima/GAIR--lima")
    lines(
        folder / "train.jsonl",
        [{"conversations": ["q", "a", "r", "b"], "source": "s"}] * 9 + [{"conversations": ["q"]}],
    )
    lines(folder / "test.jsonl", [{"conversations": ["q"]}])
    (folder / ".complete").touch()
    data = LIMA(include_multiturn_conversations=every, prompt_style="default", on_error="drop", access_token="secret")
    train, val = read(data, tokenizer)
    assert set(train + val) == ({"qa", "rb"} if every else {"qa"}) and len(train + val) == (18 if every else 9)
    assert "secret" not in repr(data) and data.report()["LIMA"]["reasons"] == {"no answer": 1}


def test_longform(tokenizer: Tokenizer) -> None:
    whole(Path("data/longform/train.json"), [{"input": "q", "output": "a", "source": "s"}] * 4)
    whole(Path("data/longform/val.json"), [{"input": "v", "output": "b", "source": "s"}])
    data = LongForm()
    train, val = read(data, tokenizer)
    assert train == [data.style.apply("q") + "a"] * 4 and val == [data.style.apply("v") + "b"]
    assert "paired with an input" in train[0]


def test_flan(tokenizer: Tokenizer) -> None:
    for name, count in (("rte_10templates", 3), ("wic_10templates", 2)):
        lines(Path(f"data/flan/{name}_train.jsonl"), [{"inputs": name, "targets": "yes", "task": "t"}] * count)
        lines(Path(f"data/flan/{name}_test.jsonl"), [{"inputs": name, "targets": "no", "task": "t"}])
    data = FLAN(subsets="rte_10templates, wic_10templates")
    train, val = read(data, tokenizer)
    assert len(train) == 5 and len(val) == 2 and train[0] == data.style.apply("rte_10templates") + "yes"
    assert len(FLAN_TASKS) == 66
    with pytest.raises(UserError, match=r"data\.subsets"):
        FLAN(subsets="rte")
    with pytest.raises(UserError, match="asked the network"):
        read(FLAN(), tokenizer)


def test_every_name_stands_for_a_class() -> None:
    import litgpt.data

    for name, path in DATA_MODULES.items():
        assert path == f"litgpt.data.{name}" and getattr(litgpt.data, name).__name__ == name
