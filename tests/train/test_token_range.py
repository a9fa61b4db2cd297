"""Tokens that have no row in the embedding end a run with one line, whichever set they are in."""

import re
from pathlib import Path

import pytest
import torch

from litgpt.cli import main
from litgpt.data import TinyLlama
from litgpt.data.stream.batch import IGNORE, Batch
from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.train.run_spec import RunSpec, check_token_range
from tests.runs import SHAPE, write_recipe


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([0, 9], [9, IGNORE], None),
        ([0, 10], [9, 9], "holds token 10, but the model has 10 rows"),
        ([0, 9], [9, 10], "padded_vocab_size: 64"),
        ([-1, 9], [9, 9], "holds token -1, which is negative"),
        ([0, 9], [-2, IGNORE], "holds token -2, which is negative"),
    ],
)
def test_tokens_of_a_batch(ids: list[int], labels: list[int], message: str | None) -> None:
    batch = Batch(torch.tensor([ids]), torch.tensor([labels]))
    config = Config(**SHAPE | {"padded_vocab_size": 10})  # type: ignore[arg-type]
    spec = RunSpec("pretrain", config, TinyLlama(), weights=None, tokenizer_dir=None)
    if message is None:
        assert check_token_range(batch, spec) is batch
        return
    with pytest.raises(UserError, match=message):
        check_token_range(batch, spec)


@pytest.mark.parametrize("late", [0, 39])
@pytest.mark.parametrize("split", ["train", "val"])
def test_chunks_of_another_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], split: str, late: int
) -> None:
    """The first samples are checked before the first step, the others when they are read."""
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    monkeypatch.chdir(tmp_path)
    for name in ("train", "val"):
        (tmp_path / "data" / name).mkdir(parents=True)
        writer = BinaryWriter(str(tmp_path / "data" / name), chunk_bytes=8000, item_loader=TokensLoader())
        for number in range(40):
            writer[number] = torch.arange(200, dtype=torch.int) + (200 if name == split and number >= late else 0)
        writer.done()
        writer.merge()
    data = {"data_path": "data", "split_names": ["train", "val"], "num_workers": 0}
    changes = {"eval__initial_validation": True, "eval__max_iters": 100, "train__max_steps": 30}
    write_recipe(tmp_path, data={"class_path": "LitData", "init_args": data}, tokenizer=None, **changes)
    assert main(["pretrain", "--config", "recipe.yaml"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"data: holds token 3\d\d, but the model has 320 rows", error) and "Traceback" not in error
    assert (tmp_path / "out").exists() == (late > 0)
