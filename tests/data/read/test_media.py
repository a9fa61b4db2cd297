"""Images, videos and sounds of rows in every form, in the order of their places in the text."""

import base64
from pathlib import Path
from typing import Any

import pytest

from litgpt.data.read.conversation import to_conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import MARK, MEDIA_KINDS, Medium
from litgpt.data.read.row_media import resolve_media
from tests.data.read.faults import check_fault

ENCODED = base64.b64encode(b"bytes").decode()
INLINE = {"data": ENCODED, "format": "wav"}
ANSWER = {"role": "assistant", "content": "red"}
TEXT = {"type": "text", "text": "which?"}
A, B, BYTES = Medium(path="a.png"), Medium(path="b.png"), Medium(data=ENCODED)
FILM, SOUND = Medium(path="c.mp4", kind="video"), Medium(path="d.wav", kind="audio")
MARKED = {kind: form.mark for kind, form in MEDIA_KINDS.items()}
URL, LONG = Medium(url="https://example.com/a.png"), base64.b64encode(bytes(range(256))).decode()
LONG_BYTES, LONG_PATH = Medium(data=LONG), Medium(path="a/" * 150 + ".png")


def ask(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}, ANSWER]}


def say(text: str, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, ANSWER], **columns}


FORMS: list[tuple[dict[str, Any], str, tuple[Medium, ...]]] = [
    (ask({"type": "image", "image": "a.png"}, TEXT), f"{MARK}which?", (A,)),
    (ask(TEXT, {"type": "image", "path": "a.png"}), f"which?{MARK}", (A,)),
    (ask({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ENCODED}"}}), MARK, (BYTES,)),
    (ask({"type": "image_url", "image_url": "a.png"}), MARK, (A,)),
    (ask({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ENCODED}}), MARK, (BYTES,)),
    (ask({"type": "image", "base64": f"{ENCODED[:4]}\n{ENCODED[4:]}"}), MARK, (BYTES,)),
    ({**ask({"type": "image"}, TEXT, {"type": "image"}), "images": ["a.png", "b.png"]}, f"{MARK}which?{MARK}", (A, B)),
    (say("<image>which? <image>", images=["a.png", "b.png"]), f"{MARK}which? {MARK}", (A, B)),
    (say("which? <image>", images=["a.png", "b.png"]), f"{MARK}which? {MARK}", (A, B)),
    (say("which?", images=["a.png"]), f"{MARK}which?", (A,)),
    (say("which?", image="a.png"), f"{MARK}which?", (A,)),
    (say("which?", image={"bytes": b"bytes", "path": "a.png"}), f"{MARK}which?", (BYTES,)),
    (say("which?", images=[{"bytes": None, "path": "a.png"}]), f"{MARK}which?", (A,)),
    (
        {
            "conversations": [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "red"}],
            "image": "a.png",
        },
        f"{MARK}\nwhich?",
        (A,),
    ),
    ({"query": "<image>which?", "response": "red", "images": ["a.png"]}, f"{MARK}which?", (A,)),
    ({"instruction": "which?", "input": "", "output": "red", "images": ["a.png"]}, f"{MARK}which?", (A,)),
    (say("<image>which?"), "<image>which?", ()),
    (
        say("<audio>then <video>, <image>?", images=["b.png", "a.png"], video="c.mp4", audios=["d.wav"]),
        f"{MARK}{MARKED['audio']}then {MARKED['video']}, {MARK}?",
        (B, SOUND, FILM, A),
    ),
    (
        {**ask({"type": "video", "video": "c.mp4"}, {"type": "audio"}, TEXT), "audio": {"path": "d.wav"}},
        f"{MARKED['video']}{MARKED['audio']}which?",
        (FILM, SOUND),
    ),
    (
        ask({"type": "video_url", "video_url": {"url": "c.mp4"}}, {"type": "input_audio", "input_audio": INLINE}),
        f"{MARKED['video']}{MARKED['audio']}",
        (FILM, Medium(data=ENCODED, kind="audio")),
    ),
    (say("<video>which?", image="a.png"), f"{MARK}<video>which?", (A,)),
    (say("which?", images=[]), "which?", ()),
    (say("which?", image=URL.url), f"{MARK}which?", (URL,)),
    (ask({"type": "image_url", "image_url": {"url": URL.url}}, TEXT), f"{MARK}which?", (URL,)),
    (ask({"type": "image", "source": {"type": "url", "url": URL.url}}), MARK, (URL,)),
    (
        say("which?", images=[LONG[:76] + "\n" + LONG[76:], "a/" * 150 + ".png"]),
        f"{MARK * 2}which?",
        (LONG_BYTES, LONG_PATH),
    ),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_forms(number: int) -> None:
    row, content, media = FORMS[number]
    conversation = to_conversation(row)
    assert (conversation.messages[0].content, conversation.messages[0].media) == (content, media)
    assert conversation.media == media and conversation.unread == ()


def test_images_of_several_messages_keep_their_order() -> None:
    messages = [
        {"role": "user", "content": "<image>?"},
        ANSWER,
        *ask({"type": "image", "image": "b.png"}, TEXT)["messages"],
    ]
    conversation = to_conversation({"messages": messages, "images": ["a.png"]})
    assert [message.media for message in conversation.messages] == [(A,), (), (B,), ()]


FAULTS: list[tuple[dict[str, Any], str]] = [
    (say("<image><image>", images=["a.png"]), "more places for images than images"),
    (ask({"type": "image"}, TEXT), "more places for images than images"),
    (ask({"type": "image", "image": "ftp://example.com/a.png"}), "image at a URL is not supported"),
    (say("which?", images=["file:///etc/passwd"]), "image at a URL is not supported"),
    (say("which?", images=[7]), "image is not text"),
    (say("which?", images=[""]), "image without a source"),
    (say("which?", images=["a\0.png"]), "image without a source"),
    (say("which?", images=[{}]), "image without a source"),
    (say("which?", images=["data:image/png,abc"]), "image without a source"),
    (say("which?", images=["a.png"], image="b.png"), "duplicate column"),
    (say(f"which {MARK}?"), "text with a character that stands for an image, video or sound"),
    (ask({"type": "video"}), "more places for videos than videos"),
    (say("<video>?", images=["a.png"], videos=["ftp://example.com/a.mp4"]), "video at a URL is not supported"),
    (say("which?", audio=7), "audio is not text"),
    (
        {"messages": [{"role": "system", "content": [{"type": "image", "image": "a.png"}]}, *ask(TEXT)["messages"]]},
        "image in the system message is not supported",
    ),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults(number: int) -> None:
    check_fault(*FAULTS[number])


def test_a_deeply_nested_image_is_read_or_one_bad_row() -> None:
    nested: Any = "a.png"
    for _ in range(100_000):
        nested = {"bytes": nested}
    assert to_conversation(say("which?", images=[nested])).media == (A,)


def test_links_that_lead_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("a.png")
    messages = to_conversation(say("which?", image="a.png")).messages
    try:
        resolved = resolve_media(messages, tmp_path)
    except BadRow as error:
        assert error.reason == "image not found"
    else:  # from Python 3.13 on, it is not found when it is opened
        assert resolved[0].media == (Medium(path=str(tmp_path / "a.png")),)


def test_paths_stay_in_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)

    def resolve(path: str) -> str | None:
        (message, _) = resolve_media(to_conversation(say("?", image=path)).messages, root)
        return message.media[0].path

    assert resolve("b/../a.png") == resolve(str(root / "a.png")) == str(root / "a.png")
    for path in ("../a.png", "/etc/passwd", "link/a.png", "b/../../data2/a.png"):
        with pytest.raises(BadRow, match=r"image outside of the folder of the data \(.*set data.media_dir"):
            resolve(path)
    assert resolve_media(to_conversation(say("?", image=f"{tmp_path}/a")).messages, Path("/"))[0].media[0].path


def test_urls_are_refused_or_fetched() -> None:
    messages = to_conversation(say("which?", images=[URL.url, "b.png"])).messages
    with pytest.raises(BadRow, match=r"image at a URL is not supported \(https://example.com/a.png; download it"):
        resolve_media(messages, None)
    media = resolve_media(messages, None, lambda medium: Path("/cache") / medium.name[-5:])[0].media
    assert media == (Medium(path="/cache/a.png", url=URL.url), B) and media[0].name == URL.url
