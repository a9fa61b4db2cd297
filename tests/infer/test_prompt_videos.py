"""Prompts with videos: texts are those of the model without a cache; sources, the command, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.api import LLM
from litgpt.cli import main
from litgpt.errors import UserError
from litgpt.model.feature_order import join_orders
from litgpt.model.media import Media
from tests.video_files import write_video
from tests.vision_model import draw_image, write_rows, write_vision_model

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}
FLAGS = ["--max_new_tokens", "6", "--temperature", "0"]
QUESTION = "<image>Before <video>?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that read videos, two videos and an image."""
    root = tmp_path_factory.mktemp("moving")
    for kind in ("qwen2_vl", "qwen3_vl", "llava_onevision", "llava"):
        write_vision_model(root / kind, kind)
    write_video(root / "a.mp4", 8, (16, 24), rate=4)
    write_video(root / "b.mp4", 8, (16, 24), rate=4, seed=1)
    draw_image(root / "c.png", (200, 30, 40), (24, 16))
    return root


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "llava_onevision"])
def test_texts_are_those_without_a_cache(kind: str, folder: Path) -> None:
    llm = LLM.load(folder / kind, distribute=None)
    files = {"images": [folder / "c.png"], "videos": [folder / "a.mp4"]}
    expected = llm.generate(QUESTION, **files, return_as_token_ids=True, **SETTINGS).tolist()
    sources = {"image": [str(folder / "c.png")], "video": [str(folder / "a.mp4")]}
    prompt = llm.prompt_encoder().encode(QUESTION, None, None, sources=sources)
    images = prompt.load_images()
    assert images is not None
    read = [image.media for image in images.images]
    grids, order = [grid for each in read for grid in each.grids], join_orders([each.order for each in read])
    media = Media(torch.cat([each.patches_NP for each in read]), grids, order=order)
    ids = list(prompt.ids)
    with torch.no_grad():
        for _ in expected:
            positions = images.find_positions(0, len(ids))
            places = {} if positions is None else {"positions_BT": positions[None]}
            logits = llm.model(torch.tensor([ids]), media=media, **places)
            ids.append(int(logits[0, -1].argmax()))
    assert ids[len(prompt.ids) :] == expected


def test_the_same_frames_at_another_rate_do_not_share_keys_and_values(folder: Path) -> None:
    """Positions follow from the time between frames."""
    encoder, images = LLM.load(folder / "qwen2_vl", distribute=None).prompt_encoder(), []
    for rate in (1, 2, 2):
        write_video(folder / "lossless.mkv", 4, (16, 24), rate=rate, codec="ffv1")
        read = encoder.encode(
            "<video>", None, None, sources={"video": [(folder / "lossless.mkv").read_bytes()]}
        ).load_images()
        assert read is not None
        images.append(read.images[0])
    slow, fast, same = images
    assert torch.equal(slow.media.patches_NP, fast.media.patches_NP)
    assert slow.key != fast.key == same.key


def test_videos_are_paths_and_bytes_and_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm, path = LLM.load(folder / "qwen3_vl", distribute=None), folder / "a.mp4"
    expected = llm.generate("Where?", videos=path, **SETTINGS)
    for source in (str(path), path.read_bytes()):
        assert llm.generate("Where?", videos=[source], **SETTINGS) == expected
    other, plain = llm.generate("Where?", videos=[folder / "b.mp4"], **SETTINGS), llm.generate("Where?", **SETTINGS)
    assert len({expected, other, plain}) == 3
    lists = [[path], [], [folder / "b.mp4"]]
    assert llm.generate(["Where?"] * 3, videos=lists, **SETTINGS) == [expected, plain, other]

    line = ["generate", str(folder / "qwen3_vl"), *FLAGS]
    assert main([*line, "--prompt", "Where?", "--video", str(path)]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    block = {"type": "video", "video": "a.mp4"}
    rows = [
        {"prompt": "Where?", "videos": ["a.mp4"]},
        {"messages": [{"role": "user", "content": [block, {"type": "text", "text": "Where?"}]}]},
    ]
    assert main([*line, "--prompts", str(write_rows(folder, rows))]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["text"] for each in lines] == [expected] * 2 and lines[0]["videos"] == ["a.mp4"]


def test_a_chat_has_images_and_videos(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"/{kind} {folder}/{name}" for kind, name in (("video", "a.mp4"), ("image", "c.png"), ("video", "b.mp4"))]
    question = "Is <video> as <image>?"
    lines += ["/audio a.wav", question, f"/save {tmp_path}/chat.jsonl", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(folder / "qwen2_vl"), *FLAGS]) == 0
    out, err = capsys.readouterr()
    assert "Videos of the next message: 2" in out and "audio: audio data is not supported (by this model)" in err
    first, second = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    parts = [
        ("video", "a.mp4"),
        ("text", "Is "),
        ("video", "b.mp4"),
        ("text", " as "),
        ("image", "c.png"),
        ("text", "?"),
    ]
    blocks = [
        {"type": kind, **({"text": text} if kind == "text" else {"path": f"{folder}/{text}"})} for kind, text in parts
    ]
    assert first["content"] == blocks
    media = {"images": [folder / "c.png"], "videos": [folder / "a.mp4", folder / "b.mp4"]}
    assert second["content"] == LLM.load(folder / "qwen2_vl", distribute=None).generate(question, **media, **SETTINGS)


WRONG: list[tuple[Any, str, str]] = [
    ([3], "Where?", "videos: int is no video; give a path, or the bytes of a file"),
    ([b"nothing"], "Where?", "video: not a video that can be read"),
    (["none.mp4"], "Where?", "none.mp4: video not found (no such file)"),
    (["https://example.com/a.mp4"], "Where?", "video: video at a URL is not supported"),
    (["a.mp4"], "<video><video>", "video: more places for videos than videos (2 places, 1 videos)"),
]


@pytest.mark.parametrize(("videos", "prompt", "text"), WRONG)
def test_wrong_videos_are_one_line(
    videos: Any, prompt: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    llm = LLM.load(folder / "qwen2_vl", distribute=None)
    with pytest.raises(UserError) as error:
        llm.generate(prompt, videos=videos, **SETTINGS)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_images_refuses_videos(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^video: video data is not supported"):
        LLM.load(folder / "llava", distribute=None).generate("Where?", videos=[folder / "a.mp4"], **SETTINGS)
    assert main(["generate", str(folder / "qwen2_vl"), "--video", "none.mp4"]) == 2
    assert capsys.readouterr().err == "litgpt: error: video: none.mp4 is not a file; give the path of a video\n"
