"""Without shuffling, samples are read in the order of the sources and of their rows."""

from pathlib import Path
from typing import Any

import pytest

from litgpt.data.modules.finetuning import Packing
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape
from tests.data.conversation_rows import module, questions, take
from tests.data.templates import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


@pytest.mark.parametrize("packing", [{}, {"enabled": True, "strategy": "sequential"}])
def test_samples_are_read_in_their_order_without_shuffling(
    tmp_path: Path, tokenizer: Tokenizer, packing: dict[str, Any]
) -> None:
    data = module(tmp_path, tokenizer, val_fraction=0.0, shuffle=False, packing=Packing(**packing))
    stream = data.train_stream(BatchShape(1, 1, 64))
    assert stream.samples_per_epoch is not None
    read = questions(take(stream, 2 * stream.samples_per_epoch), tokenizer)
    assert read == [f"0-{number}" for number in range(60)] * 2
    for settings in ({"packing": Packing(True)}, {"group_by_length": 2}):
        with pytest.raises(UserError, match=r"data.shuffle: false needs data.(packing.strategy|group_by)"):
            module(tmp_path, tokenizer, shuffle=False, **settings)
