"""Videos and sounds in OpenAI's API: heard and seen as in Python, limits, and hostile ones, which are refused."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from litgpt.api import LLM
from litgpt.infer.server.app import Server
from litgpt.recipe.serve import Serve
from tests.audio_model import draw_sound, write_audio_model
from tests.infer.server.test_images import GOOD as IMAGE
from tests.infer.server.test_images import build_message
from tests.infer.server.test_server import CLIENT
from tests.infer.server.tiny_server import run_server
from tests.video_files import write_video
from tests.vision_model import write_vision_model

LIMITS: dict[str, Any] = {"max_videos": 2, "max_video_pixels": 5000, "max_audios": 2, "max_body_bytes": 400_000}
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that read videos and hear sounds, two videos and two sounds."""
    root = tmp_path_factory.mktemp("played")
    write_vision_model(root / "qwen2_vl", "qwen2_vl")
    write_audio_model(root / "qwen2_audio")
    for number, name in enumerate(("a.mp4", "b.mp4")):
        write_video(root / name, 8, (16, 24), rate=4, seed=number)
    draw_sound(root / "low.wav", 200.0, 0.31)
    draw_sound(root / "high.wav", 3000.0, 0.5, 44100)
    return root


@pytest.fixture(scope="module")
def seeing(folder: Path) -> Iterator[tuple[str, Server]]:
    with run_server(Serve(checkpoint_dir=folder / "qwen2_vl", **SETTINGS, **LIMITS)) as started:
        yield started


@pytest.fixture(scope="module")
def hearing(folder: Path) -> Iterator[tuple[str, Server]]:
    with run_server(Serve(checkpoint_dir=folder / "qwen2_audio", **SETTINGS, **LIMITS)) as started:
        yield started


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def build_url(kind: str, data: bytes, form: str = "mp4") -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{kind}/{form};base64,{encode(data)}"}}


def build_input(data: bytes, form: Any = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": encode(data), "format": form}}


def ask(address: str, *parts: dict[str, Any], text: str = "Which?", stream: bool = False) -> str:
    """The answer that OpenAI's client gets."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    messages = build_message(*parts, text=text)
    model = client.models.list().data[0].id
    if not stream:
        return client.chat.completions.create(model=model, messages=messages).choices[0].message.content or ""
    chunks = client.chat.completions.create(model=model, messages=messages, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def measure_first_token(address: str, *parts: dict[str, Any]) -> float:
    """The log-probability of the first token of the answer."""
    body = {"messages": build_message(*parts), "logprobs": True, "max_tokens": 1}
    answer = CLIENT.post(f"{address}/v1/chat/completions", json=body).json()
    logprob: float = answer["choices"][0]["logprobs"]["content"][0]["logprob"]
    return logprob


def test_videos_are_seen(seeing: tuple[str, Server], folder: Path) -> None:
    llm, seen = LLM.load(folder / "qwen2_vl", distribute=None), []
    for name in ("a.mp4", "b.mp4"):
        part = build_url("video", (folder / name).read_bytes())
        expected = llm.generate("Which?", videos=[folder / name], **SETTINGS)
        assert [ask(seeing[0], part, stream=stream) for stream in (False, True)] == [expected] * 2
        seen.append(measure_first_token(seeing[0], part))
    assert abs(seen[0] - seen[1]) > 1e-4
    first, second = (build_url("video", (folder / name).read_bytes()) for name in ("a.mp4", "b.mp4"))
    image = base64.b64decode(IMAGE["image_url"]["url"].partition(",")[2])
    expected = llm.generate(
        "<video><image><video>Which?", images=image, videos=[folder / "a.mp4", folder / "b.mp4"], **SETTINGS
    )
    assert ask(seeing[0], first, IMAGE, second) == expected


def test_sounds_are_heard(hearing: tuple[str, Server], folder: Path) -> None:
    llm, heard = LLM.load(folder / "qwen2_audio", distribute=None), []
    for name in ("low.wav", "high.wav"):
        data, expected = (folder / name).read_bytes(), llm.generate("Which?", audios=[folder / name], **SETTINGS)
        for part in (build_input(data), build_url("audio", data, "wav")):
            assert [ask(hearing[0], part, stream=stream) for stream in (False, True)] == [expected] * 2
        heard.append(measure_first_token(hearing[0], part))
    assert abs(heard[0] - heard[1]) > 1e-4
    both = [build_input((folder / name).read_bytes()) for name in ("low.wav", "high.wav")]
    expected = llm.generate("Which?", audios=[folder / "low.wav", folder / "high.wav"], **SETTINGS)
    assert ask(hearing[0], *both) == expected


def film(**settings: Any) -> bytes:
    buffer = io.BytesIO()
    write_video(buffer, **{"form": "mp4", **settings})
    return buffer.getvalue()


def film_growing() -> bytes:
    """A video whose frames are much larger from the fourth on."""
    small, large = (film(frames=4, size=size, form="mpegts") for size in ((16, 24), (96, 128)))
    return small + large


def check_refusals(address: str, wrong: list[tuple[list[dict[str, Any]], str]], good: dict[str, Any]) -> None:
    """Each is a 400 in one line, and the server answers then."""
    for parts, text in wrong:
        for stream in (False, True):
            body = {"messages": build_message(*parts), "stream": stream}
            response = CLIENT.post(f"{address}/v1/chat/completions", json=body)
            error = response.json()["error"]
            assert (response.status_code, set(error)) == (400, {"message", "type", "param", "code"}), error
            assert text in error["message"] and "\n" not in error["message"] and len(error["message"]) < 400, error
    body = {"messages": build_message(good)}
    assert CLIENT.post(f"{address}/v1/chat/completions", json=body).status_code == 200


def test_wrong_videos_are_errors_of_the_request(seeing: tuple[str, Server], folder: Path) -> None:
    good, sound = (folder / "a.mp4").read_bytes(), (folder / "low.wav").read_bytes()
    wrong: list[tuple[list[dict[str, Any]], str]] = [
        ([{"type": "video_url", "video_url": {"url": url}}], text)
        for url, text in {
            "https://x.org/a.mp4": "is not fetched; send the video itself: data:video/mp4;base64,...",
            "file:///etc/passwd": "is not fetched; send the video itself",
            "data:video/mp4,abc": "is not base64; send data:video/mp4;base64",
            "data:video/mp4;base64,***": "video_url.url: not base64",
            "data:video/mp4;base64,": "video_url.url: video: not a video that can be read",
        }.items()
    ]
    wrong += [
        ([{"type": "video_url", "video_url": "a.mp4"}], "video_url is not an object with a url; send"),
        ([{"type": "video", "path": "/etc/passwd"}], "content of type 'video' is not supported; use one of text, im"),
        ([{"type": "video_url", "video_url": {"url": "data:,", "fps": 2}}], "video_url.fps: 2 is not supported; leave"),
        ([build_url("video", good[: len(good) // 2])], "not a video that can be read"),
        ([build_url("video", b"#EXTM3U\nfile:///etc/passwd")], "not a video that can be read"),
        ([build_url("video", sound)], "not a video that can be read"),
        (
            [build_url("video", film(frames=20))],
            "20 frames of 64 x 48 pixels: more than max_video_pixels: 5000; send a",
        ),
        ([build_url("video", film_growing())], "too many pixels (more than 5,000 in its frames, which grow)"),
        ([build_url("video", good)] * 3, "3 videos are more than max_videos: 2; send fewer"),
        ([build_input(sound)], "audio: audio data is not supported (by this model)"),
    ]
    check_refusals(seeing[0], wrong, build_url("video", good))


def test_wrong_sounds_are_errors_of_the_request(hearing: tuple[str, Server], folder: Path) -> None:
    good, long = (folder / "low.wav").read_bytes(), folder / "long.wav"
    draw_sound(long, 200.0, 1.1)
    wrong: list[tuple[list[dict[str, Any]], str]] = [
        ([{"type": "audio_url", "audio_url": {"url": "https://x.org/a.wav"}}], "is not fetched; send the audio itself"),
        ([{"type": "input_audio", "input_audio": {"data": "/etc/passwd", "format": "wav"}}], "input_audio.data: "),
        ([{"type": "input_audio", "input_audio": {"data": "***", "format": "wav"}}], "input_audio.data: not base64"),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA"}}], "is not an object with a data and a format; send"),
        ([{"type": "input_audio", "input_audio": encode(good)}], "input_audio is not an object with a data and a form"),
        ([build_input(good, 3)], "input_audio is not an object with a data and a format"),
        ([build_input(good, "midi")], "input_audio.format: 'midi' is not supported; use one of wav, mp3"),
        ([build_input(good, "mp3")], "input_audio.format: 'mp3' is not that of the sound, wav; send its own"),
        ([build_input(b"")], "input_audio.data: sound: not a sound that can be read"),
        ([build_input(good[:900])], "input_audio.data: sound: not a sound that can be read (it is cut off"),
        (
            [build_input((folder / "a.mp4").read_bytes(), "mp4")],
            "input_audio.data: sound: not a sound that can be read",
        ),
        ([build_input(long.read_bytes())], "sound that is too long (1.1 s); cut it into pieces of at most 1 s"),
        ([build_input(good)] * 3, "3 audios are more than max_audios: 2; send fewer"),
        ([IMAGE], "image: image data is not supported (by this model)"),
    ]
    check_refusals(hearing[0], wrong, build_input(good))


def test_long_sounds_are_split(folder: Path) -> None:
    draw_sound(folder / "longer.wav", 500.0, 1.5)
    llm = LLM.load(folder / "qwen2_audio", distribute=None)
    llm.split_sounds = True
    expected = llm.generate("Which?", audios=[folder / "longer.wav"], **SETTINGS)
    with run_server(Serve(checkpoint_dir=folder / "qwen2_audio", split_sounds=True, **SETTINGS)) as (address, _):
        assert ask(address, build_input((folder / "longer.wav").read_bytes())) == expected


@pytest.mark.parametrize(("kind", "tower"), [("video", "vision"), ("audio", "audio")])
def test_a_model_of_texts_refuses_videos_and_sounds(
    kind: str, tower: str, served: tuple[str, Server], folder: Path
) -> None:
    data = (folder / {"video": "a.mp4", "audio": "low.wav"}[kind]).read_bytes()
    body = {"messages": build_message(build_url(kind, data))}
    response = CLIENT.post(f"{served[0]}/v1/chat/completions", json=body, headers={"Authorization": "Bearer secret"})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"{kind}: the model has no {tower} tower; leave it out")
