"""The example of the page on models that see: a small model, from random weights, names what held-out images show."""

import contextlib
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from litgpt.cli import main
from litgpt.data import Conversations
from litgpt.data.tokenizer import Tokenizer
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.recipe.data import BatchShape
from litgpt.store.load_model import load_model

PAGE = Path(__file__).parents[2] / "tutorials" / "multimodal.md"
STEPS = 150


def read_script() -> str:
    """The script of the page that draws shapes and makes a model."""
    match = re.search(r"cat > shapes\.py <<'PY'\n(.*?)^PY$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert match is not None
    return match[1]


def read_flags() -> list[str]:
    """The command of the page."""
    match = re.search(r"^litgpt (finetune_full shapes/model .*?)\n```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert match is not None
    return match[1].replace("\\\n", " ").split()


def count_right(folder: Path, rows: str, *, shift: int = 0) -> float:
    """The share of rows whose answer is the most likely text, with the image of another row if shifted."""
    data = Conversations(rows, val_fraction=0.0, num_workers=0, shuffle=False, cache_dir=Path("data/measured"))
    data.connect(Tokenizer(folder), 1, 128)
    data.prepare_data()
    model = GPT(Config.from_checkpoint(folder)).eval()
    load_model(model, folder)
    count = len(Path(rows).read_text().splitlines())
    stream = iter(data.train_stream(BatchShape(1, 1, 128)))
    batches, right = [next(stream) for _ in range(count)], 0
    with torch.no_grad():
        for number, batch in enumerate(batches):
            logits = model(batch.ids, media=batches[(number + shift) % count].media)
            targets = batch.labels >= 0
            right += torch.equal(logits.argmax(-1)[targets], batch.labels[targets])
    return right / count


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_held_out_shapes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shapes.py").write_text(read_script())
    with contextlib.chdir(tmp_path):
        runpy.run_path("shapes.py")
        flags = ["--train.max_steps", str(STEPS), "--eval.interval", "1000"]
        assert main([*read_flags(), *flags]) == 0
        before = count_right(Path("shapes/model"), "shapes/held_out.jsonl")
        after = count_right(Path("out/shapes/final"), "shapes/held_out.jsonl")
        shuffled = count_right(Path("out/shapes/final"), "shapes/held_out.jsonl", shift=1)
    rows = [json.loads(line) for line in (tmp_path / "shapes/held_out.jsonl").read_text().splitlines()]
    assert len({row["messages"][1]["content"] for row in rows}) == 8
    with capsys.disabled():
        print(f"\nheld-out shapes: {before:.0%} before, {after:.0%} after, {shuffled:.0%} with images of others")
    assert before == 0 and after >= 0.9 and shuffled <= 0.35
