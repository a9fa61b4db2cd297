"""Prompts with images: tokens as in training, sources, what is shared, and what is refused."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from litgpt.api import LLM
from litgpt.cli import main
from litgpt.data import Conversations
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.infer.engine import Engine
from litgpt.infer.requests import Request
from litgpt.recipe.data import BatchShape
from tests.parity.test_vision_families import ROWS
from tests.parity.test_vision_generation import PREFIX, TEXTS, Case, count_tower_runs
from tests.vision_model import KINDS, draw_image, write_rows, write_vision_model

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}
FLAGS = ["--max_new_tokens", "6", "--temperature", "0"]
SHAPE = BatchShape(micro_batch_size=1, global_batch_size=1, max_seq_length=256, rank=0, ranks=1, seed=0)
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that see, and images."""
    root = tmp_path_factory.mktemp("seeing")
    for kind in KINDS:
        write_vision_model(root / kind, kind)
    draw_image(root / "red.png", (230, 20, 30), (24, 16))
    draw_image(root / "blue.png", (10, 40, 220), (32, 16))
    return root


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(folder / "qwen2_vl", distribute=None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["Which?", "<image> or <image>: which?"])
def test_prompts_have_the_tokens_of_training(kind: str, text: str, folder: Path, tmp_path: Path) -> None:
    images, message = ["red.png", "blue.png"], {"role": "user", "content": text}
    rows = write_rows(tmp_path, [{"messages": [message, {"role": "assistant", "content": "red"}], "images": images}])
    settings: dict[str, Any] = {"val_fraction": 0.0, "num_workers": 0, "media_dir": folder}
    data = Conversations(str(rows), cache_dir=tmp_path / "cache", **settings)
    data.connect(Tokenizer(folder / kind), 1, 256)
    data.prepare_data()
    trained = next(iter(data.train_stream(SHAPE))).ids[0].tolist()
    encoder = LLM.load(folder / kind, distribute=None).prompt_encoder()
    prompt = encoder.encode(text, None, None, sources={"image": [str(folder / name) for name in images]})
    assert list(prompt.ids) == trained[: len(prompt.ids)] and len(prompt.ids) < len(trained)
    assert encoder.encode_messages([message], sources={"image": images}, folder=folder).ids == prompt.ids


def test_processors_are_read_once_a_prompt(llm: LLM, folder: Path) -> None:
    usual, opened = llm.prompt_encoder(), list[int]()
    encoder = replace(usual, open_placer=lambda: opened.append(1) or usual.open_placer())
    sources: dict[str, Any] = {"image": [str(folder / "red.png")]}
    encoder.encode("Which?", None, None, sources=sources)
    encoder.encode_messages([{"role": "user", "content": "<image>Which?"}], sources=sources)
    assert len(opened) == 2
    encoder.encode("Which?", None, None)
    assert len(opened) == 2


def test_images_are_paths_bytes_or_pil_images(llm: LLM, folder: Path) -> None:
    path = folder / "red.png"
    data = path.read_bytes()
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    expected = see(llm, [path])
    for source in (str(path), data, uri, Image.open(path), Image.open(path).convert("RGBA")):
        assert see(llm, [source]) == expected
    assert see(llm, path) == expected
    other, text = see(llm, [folder / "blue.png"]), see(llm, None)
    assert expected != other and expected != text
    lists = [[path], [folder / "blue.png"], []]
    ids = llm.generate(["Which?"] * 3, images=lists, return_as_token_ids=True, **SETTINGS)
    assert [each.tolist() for each in ids] == [expected, other, text]
    assert list(llm.generate("Which?", images=[path], stream=True, return_as_token_ids=True, **SETTINGS)) == expected


def see(llm: LLM, images: Any) -> list[int]:
    """The tokens after a question to images."""
    return llm.generate("Which?", images=images, return_as_token_ids=True, **SETTINGS).tolist()


WRONG: list[tuple[Any, Any, str]] = [
    ("Which?", ["https://x.org/a.png"], "image: image at a URL is not supported (https://x.org/a.png; download it"),
    ("Which?", ["none.png"], "none.png: image not found (no such file)"),
    ("Which?", [b"nothing"], "image: not an image that can be read"),
    ("Which?", [3], "images: int is not an image; give a path, the bytes of a file, or a PIL image"),
    ("<image><image>", ["red.png"], "image: more places for images than images (2 places, 1 images)"),
    ("<image>", None, "prompt: has token 258, which stands for an image, without an image"),
    (["a", "b"], ["red.png"], "images: is not a list of 2 lists, one for each prompt"),
]


@pytest.mark.parametrize(("prompt", "images", "text"), WRONG)
def test_wrong_images_are_one_line(
    prompt: Any, images: Any, text: str, llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as error:
        llm.generate(prompt, images=images, **SETTINGS)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_file_is_one_line(llm: LLM, folder: Path) -> None:
    data = (folder / "blue.png").read_bytes()
    with pytest.raises(UserError, match=r"^image: .*not an image that can be read"):
        llm.generate("Which?", images=[data[:-30]], **SETTINGS)


def test_a_model_of_texts_reads_no_images(folder: Path) -> None:
    blind = LLM.load(folder / "qwen2_vl", distribute=None)
    blind.config = blind.config.__class__(**{**blind.config.to_dict(), "vision": None})
    with pytest.raises(UserError, match=r"^image: the model has no vision tower; leave it out, or use"):
        blind.generate("Which?", images=[folder / "red.png"], **SETTINGS)


def test_the_command_takes_images(llm: LLM, folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    line = ["generate", "qwen2_vl", *FLAGS, "--prompt", "<image> or <image>?"]
    assert main([*line, "--image", "[red.png, blue.png]"]) == 0
    expected = llm.generate("<image> or <image>?", images=["red.png", "blue.png"], **SETTINGS)
    assert capsys.readouterr().out == f"{expected}\n"
    assert main([*line, "--image", "none.png"]) == 2
    assert capsys.readouterr().err == "litgpt: error: image: none.png is not a file; give the path of an image\n"


def test_rows_of_prompts_have_images(llm: LLM, folder: Path, capsys: Captured, tmp_path: Path) -> None:
    block = {"type": "image", "image": "red.png"}
    rows = [
        {"prompt": "Which?", "images": ["red.png"]},
        {"messages": [{"role": "user", "content": [block, {"type": "text", "text": "Which?"}]}]},
        {"messages": [{"role": "user", "content": "<image>Which?"}], "images": ["red.png"]},
        {"messages": [{"role": "user", "content": "Which?"}]},
    ]
    path = write_rows(folder, rows)
    assert main(["generate", str(folder / "qwen2_vl"), "--prompts", str(path), *FLAGS]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    seen = llm.generate("Which?", images=[folder / "red.png"], **SETTINGS)
    assert [line["text"] for line in lines] == [seen] * 3 + [llm.generate("Which?", **SETTINGS)]
    assert lines[0]["images"] == ["red.png"]
    outside = write_rows(tmp_path, [{"prompt": "Which?", "images": [str(folder / "red.png")]}])
    assert main(["generate", str(folder / "qwen2_vl"), "--prompts", str(outside), *FLAGS]) == 1
    assert f"{outside}:1: image: image outside of the folder of the data" in capsys.readouterr().err


def test_a_split_model_refuses_images(llm: LLM, folder: Path) -> None:
    prompt = llm.prompt_encoder().encode("Which?", None, None, sources={"image": [str(folder / "red.png")]})
    engine = Engine(llm.model, forward=llm.model.forward)
    with pytest.raises(UserError, match=r"^image: not supported with a model that is split over devices; use"):
        engine.submit(Request(prompt.ids, 1, images=prompt.load_images()))
    assert not engine.has_work


def test_a_chat_has_images(
    llm: LLM, folder: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat.jsonl"
    lines = ["/image none.png", f"/image {folder}/blue.png", "/image", f"/image {folder}/red.png", "Which?", "Hello"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, f"/save {path}", ""])))
    assert main(["chat", str(folder / "qwen2_vl"), *FLAGS]) == 0
    out, err = capsys.readouterr()
    assert "none.png: image not found" in err
    assert [line for line in out.splitlines() if line.startswith("Images of")] == [
        f"Images of the next message: {count}" for count in (1, 0, 1)
    ]
    messages = json.loads(path.read_text())["messages"]
    image = {"type": "image", "path": f"{folder}/red.png"}
    assert messages[0]["content"] == [image, {"type": "text", "text": "Which?"}] and messages[2]["content"] == "Hello"
    assert messages[1]["content"] == llm.generate("Which?", images=[folder / "red.png"], **SETTINGS)
    prompt = llm.prompt_encoder().encode_messages(messages[:3])  # what was said before keeps its image
    assert len(prompt.media) == 1


def test_a_prefix_is_shared_with_the_same_image_only(
    tmp_path: Path, processed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(ROWS["qwen2_5_vl"], tmp_path)
    runs, engine = count_tower_runs(case.model, monkeypatch), Engine(case.model)
    first, same, other = (case.build_request(text) for text in TEXTS[:3])
    engine.run([first])
    assert len(runs) == 1
    processed.clear()
    engine.run([same])
    assert len(runs) == 1 and processed[0] == 1  # all but the last token are known
    processed.clear()
    engine.run([other])
    assert len(runs) == 2 and processed[0] == len(other.prompt) - len(PREFIX)


def test_tokens_that_attend_to_the_whole_prompt_are_shared_with_the_same_prompt_only(
    tmp_path: Path, processed: list[int]
) -> None:
    case = Case(ROWS["paligemma-gemma-siglip"], tmp_path)
    engine = Engine(case.model, prefill_chunk=5)
    first, other, text = (case.build_request(TEXTS[number]) for number in (0, 1, 4))
    for request, tokens in ((first, len(first.prompt)), (first, 1), (other, len(other.prompt)), (text, 23), (text, 1)):
        processed.clear()
        engine.run([request])
        assert processed[0] == tokens  # in one chunk
    with pytest.raises(UserError, match=r"^prompt_logprobs: 0 is not supported with a model whose tokens of a prompt"):
        engine.submit(replace(text, prompt_logprobs=0))
    assert not engine.has_work


def test_targets_of_a_user_end_the_prompt(folder: Path) -> None:
    llm, ids = LLM.load(folder / "paligemma", distribute=None), torch.tensor([[5, 6, 7, 8, 9]])
    targets = torch.tensor([[-100, -100, -100, 8, 9]])
    logits, _ = llm(ids, targets)
    assert torch.equal(logits, llm.model(ids, prompts_BT=targets == -100))
    assert not torch.allclose(logits, llm(ids))


def test_exact_answers_to_questions_on_images(llm: LLM, folder: Path, tmp_path: Path) -> None:
    answers = [llm.generate("Which?", images=[str(folder / name)], **SETTINGS) for name in ("red.png", "blue.png")]
    unseen = llm.generate("Which?", **SETTINGS)
    assert unseen not in answers
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
    rows = [
        {"prompt": "Which?", "images": ["red.png"], "answer": answers[0]},
        {"messages": [question], "images": ["blue.png"], "answer": answers[1]},
        {"prompt": "Which?", "images": ["blue.png"], "answer": unseen},
    ]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--prompts", str(folder / "scored.jsonl"), "--max_new_tokens", "6", "--out_dir", str(tmp_path)]
    assert main(["evaluate", str(folder / "qwen2_vl"), *flags]) == 0
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["exact_match"] for line in lines] == [1, 1, 0]
    assert json.loads((tmp_path / "results.json").read_text())["prompts"]["exact_match"] == pytest.approx(2 / 3)
