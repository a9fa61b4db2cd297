"""`litgpt data inspect` and `data prepare` on conversations: what is trained is marked, what was left out counted."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from litgpt.commands import data_inspect, data_prepare
from litgpt.data import JSON, Conversations, Preferences, TextFiles
from litgpt.data.modules.finetuning import Packing
from litgpt.data.preview import mark_trained
from litgpt.data.render.loss_weights import WeightRule
from litgpt.errors import UserError
from litgpt.recipe.data_commands import DataInspect, DataPrepare
from tests.data.templates import write_tokenizer
from tests.vision_model import draw_image, write_vision_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "tokenizer", "chatml")
    rows = [{"query": f"question {n}", "response": "the quick fox", "channel": "c"} for n in range(20)]
    lines = [*rows, {"query": "alone"}, {"messages": []}, {"messages": 3}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Conversations(
        sources="rows.jsonl", on_error="drop", weights=[WeightRule(2, keyword="quick")], packing=Packing(True, 60)
    )
    data_inspect.run(DataInspect(data, folder / "tokenizer", 60, samples=1))
    said = capsys.readouterr().out
    assert "⟦the⟧⟦ quick⟧×2⟦ fox<|im_end|>⟧" in said and "<|im_start|>user" in said and "next sample" in said
    assert "rows.jsonl: 3 of 23 rows left out" in said and "rows.jsonl:21: no answer" in said and "(c)" in said
    assert "train: 10 rows" in said and "val: 1 rows" in said
    data = Conversations(sources="rows.jsonl", on_error="drop")
    data_inspect.run(DataInspect(data, folder / "tokenizer", 60, split="val", samples=5))
    assert capsys.readouterr().out.count("⟦the quick fox<|im_end|>⟧") == 1


def test_inspect_pairs_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"question {n}", "chosen": "the quick fox", "rejected": "the dog"} for n in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "q", "chosen": "a"}])))
    data = Preferences(sources="pairs.jsonl", on_error="drop")
    data_inspect.run(DataInspect(data, folder / "tokenizer", 60, samples=1))
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "⟦the" in line]
    assert "⟦the quick fox<|im_end|>⟧" in line and "⟦the dog<|im_end|>⟧" in line
    assert "chosen" in said and "rejected" in said and "1 of 21 rows left out: 1 not two answers" in said


def test_inspect_streamed_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Conversations(sources="rows.jsonl", on_error="drop", streaming=True, val_rows=2, shuffle_buffer=21)
    data_inspect.run(DataInspect(data, folder / "tokenizer", 60, samples=30))
    said = capsys.readouterr().out
    assert "train: read on demand" in said and "val: 2 rows" in said and "rows.jsonl (val_rows)" in said
    assert said.count("⟦the quick fox<|im_end|>⟧") == 18 and "question 2" in said and "question 1<" not in said
    assert "rows.jsonl: 3 of 21 rows left out" in said and "rows.jsonl:21: no answer" in said


def test_prepare_compares_samples_with_their_hashes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        data = Conversations(sources="rows.jsonl", on_error="drop")
        data_prepare.run(DataPrepare(data, folder / "tokenizer", 60))

    run()
    assert "rows.jsonl" in capsys.readouterr().out
    (path,) = (folder / "data" / "conversations").glob("*/tokens.npy")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"tokens\.npy"):
        run()


def test_instructions_with_the_prompt_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": f"question {n}", "output": "fox"} for n in range(20)]
    (folder / "data.json").write_text(json.dumps(rows))
    data = JSON(folder / "data.json", prompt_style="phi-2")
    data_inspect.run(DataInspect(data, folder / "tokenizer", 60, samples=1))
    assert "⟦Instruct: question" in capsys.readouterr().out
    (_, file), *_ = data.prepared
    masked = JSON(folder / "data.json", prompt_style="phi-2", mask_prompt=True)
    data_inspect.run(DataInspect(masked, folder / "tokenizer", 60, samples=1))
    (_, other), *_ = masked.prepared
    assert mark_trained(file.read(0), data.tokenizer).plain == "⟦Instruct: question 0\nOutput:fox<|im_end|>⟧"
    assert mark_trained(other.read(0), data.tokenizer).plain == "Instruct: question 0\nOutput:⟦fox<|im_end|>⟧"


def test_inspect_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_vision_model(folder / "model", "smolvlm")
    draw_image(folder / "cat <1>.png", (200, 30, 30))
    messages = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "red & blue"}]
    rows = [{"messages": messages, "images": ["cat <1>.png"]} for _ in range(3)]
    (folder / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Conversations(sources="images.jsonl", val_fraction=0.0, train_on="everything")
    data_inspect.run(DataInspect(data, model, 256, samples=1, page_file=folder / "page.html"))
    said = " ".join(capsys.readouterr().out.split())
    assert "[image cat <1>.png: " in said and " patches, " in said and " tokens]" in said and "<image>" not in said
    page = (folder / "page.html").read_text()
    assert "<mark>" in page and "red &amp; blue" in page and "image cat &lt;1&gt;.png: " in page
    (thumbnail,) = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    with Image.open(io.BytesIO(base64.b64decode(thumbnail))) as image:
        red, green, blue = image.getpixel((20, 10))
        assert image.size == (24, 16) and red > 3 * green == 3 * blue
    (folder / "cat <1>.png").write_bytes(b"no image")
    data_inspect.run(DataInspect(data, model, 256, samples=1, page_file=folder / "page.html"))
    page = (folder / "page.html").read_text()
    assert "<img" not in page and "not an image that can be read" in page


def test_a_page_is_of_samples(folder: Path) -> None:
    (folder / "texts").mkdir()
    for name in ("a", "b"):
        (folder / "texts" / f"{name}.txt").write_text("the quick fox " * 50)
    data = TextFiles(folder / "texts", num_workers=1)
    with pytest.raises(UserError, match=r"page_file: page.html is not supported for TextFiles; leave it out"):
        data_inspect.run(DataInspect(data, folder / "tokenizer", 8, page_file=Path("page.html")))
