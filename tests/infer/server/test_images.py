"""Images in OpenAI's API: seen as data URLs, limits, and hostile ones, which are errors of their sender."""

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from litgpt.api import LLM
from litgpt.infer.server.app import Server
from litgpt.recipe.serve import Serve
from tests.infer.server.test_server import CLIENT, HELLO
from tests.infer.server.tiny_server import run_server
from tests.vision_model import draw_image, write_vision_model

LIMITS: dict[str, Any] = {"max_images": 3, "max_image_pixels": 5000, "max_body_bytes": 200_000}
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("seen")
    draw_image(root / "red.png", (230, 20, 30), (24, 16))
    draw_image(root / "blue.png", (10, 40, 220), (32, 16))
    return write_vision_model(root / "llava", "llava")


@pytest.fixture(scope="module")
def seeing(folder: Path) -> Iterator[tuple[str, Server]]:
    with run_server(Serve(checkpoint_dir=folder, **SETTINGS, **LIMITS)) as started:
        yield started


def write_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def build_image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def build_message(*parts: dict[str, Any], text: str = "Which?") -> list[Any]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_images_are_seen(seeing: tuple[str, Server], folder: Path) -> None:
    client = openai.OpenAI(base_url=f"{seeing[0]}/v1", api_key="none", max_retries=0)
    llm = LLM.load(folder, distribute=None)
    paths = [folder.parent / name for name in ("red.png", "blue.png")]
    seen = []
    for path in paths:
        messages = build_message(build_image(write_url(path.read_bytes())))
        answer = client.chat.completions.create(model="llava", messages=messages, n=2)
        expected = llm.generate("Which?", images=[path], **SETTINGS)
        assert [choice.message.content for choice in answer.choices] == [expected] * 2
        pieces = client.chat.completions.create(model="llava", messages=messages, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices) == expected
        seen.append(expected)
    assert seen[0] != seen[1]
    first, second = (build_image(write_url(path.read_bytes())) for path in paths)
    messages = build_message(first, {"type": "text", "text": " or "}, second, text=": which?")
    answer = client.chat.completions.create(model="llava", messages=messages)
    expected = llm.generate("<image> or <image>: which?", images=paths, **SETTINGS)
    assert answer.choices[0].message.content == expected
    text = client.chat.completions.create(model="llava", messages=HELLO).choices[0].message.content
    assert text == llm.generate(HELLO[0]["content"], **SETTINGS)


def build_png(width: int, height: int) -> bytes:
    """The header of an image of any size, without pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def encode_image(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = build_image(write_url(encode_image(16, 16)))
MARK = "\U000f8a35"
WRONG: list[tuple[list[Any], str]] = [
    (build_message(build_image("https://x.org/a.png")), "is not fetched; send the image itself: data:image/png;base64"),
    (build_message(build_image("file:///etc/passwd")), "is not fetched; send the image itself"),
    (build_message(build_image("/etc/passwd")), "is not fetched; send the image itself"),
    (build_message(build_image(3)), "image_url is not an object with a url"),
    (build_message({"type": "image_url", "image_url": "data:image/png;base64,AA=="}), "is not an object with a url"),
    (build_message({"type": "image_url"}), "image_url is not an object with a url"),
    (build_message({"type": "image", "path": "/etc/passwd"}), "content of type 'image' is not supported"),
    (build_message(build_image("data:image/png,abc")), "is not base64; send data:image/png;base64"),
    (build_message(build_image("data:image/png;base64,***")), "not base64"),
    (build_message(build_image("data:image/png;base64,")), "not an image that can be read"),
    (build_message(build_image(write_url(b"GIF89a nothing"))), "not an image that can be read"),
    (build_message(build_image(write_url(build_png(60_000, 60_000)))), "not an image that can be read"),
    (build_message(build_image(write_url(encode_image(100, 100)))), "100 x 100 pixels: more than max_image_pixels: 50"),
    (build_message(build_image(write_url(build_png(40, 40)))), "not an image that can be read"),
    (build_message(build_image(write_url(encode_image(16, 16)[:50]))), "not an image that can be read"),
    (build_message(*[GOOD] * 4), "4 images are more than max_images: 3; send fewer"),
    (build_message(GOOD, text=MARK), "text with a character that stands for an image, video or sound"),
    ([{"role": "system", "content": MARK}, *build_message(GOOD)], "text with a character that stands for an image"),
    (build_message(text=MARK), "stands for an image, without an image"),
    (build_message(text="<image>"), "stands for an image, without an image"),
    (build_message(GOOD, text="<image>"), "not one place for each image"),
    (build_message({**GOOD, "image_url": {**GOOD["image_url"], "detail": "low"}}), "image_url.detail: 'low'"),
    (build_message(GOOD, text="a" * 300), "exceed the model's context of 256"),
]


@pytest.mark.parametrize(("messages", "text"), WRONG)
def test_wrong_images_are_errors_of_the_request(seeing: tuple[str, Server], messages: list[Any], text: str) -> None:
    for stream in (False, True):
        body = {"messages": messages, "stream": stream}
        response = CLIENT.post(f"{seeing[0]}/v1/chat/completions", json=body)
        error = response.json()["error"]
        assert (response.status_code, set(error)) == (400, {"message", "type", "param", "code"}), error
        assert text in error["message"] and "\n" not in error["message"] and len(error["message"]) < 400
    answer = CLIENT.post(f"{seeing[0]}/v1/chat/completions", json={"messages": build_message(GOOD)})
    assert answer.status_code == 200


def test_a_model_of_texts_refuses_images(served: tuple[str, Server]) -> None:
    body = {"messages": build_message(GOOD)}
    response = CLIENT.post(f"{served[0]}/v1/chat/completions", json=body, headers={"Authorization": "Bearer secret"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("image: the model has no vision tower")
