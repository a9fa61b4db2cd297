"""Conversations with images: places, labels, cuts, faults and batches."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from litgpt.data import Conversations
from litgpt.data.read import public_urls
from litgpt.data.read.media_urls import MediaUrls
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.recipe.data import BatchShape
from tests.data.url_server import run_server
from tests.vision_model import COLORS, draw_image, write_color_rows, write_rows, write_vision_model

SHAPE = BatchShape(micro_batch_size=2, global_batch_size=4, max_seq_length=256, rank=0, ranks=1, seed=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        kind: write_vision_model(folder / kind, kind) for kind in ("smolvlm", "llava", "llava_onevision", "qwen2_vl")
    }


def open_data(model: Path, folder: Path, **settings: Any) -> Conversations:
    options = {"sources": str(folder / "rows.jsonl"), "val_fraction": 0.0, "num_workers": 0, "shuffle": False}
    data = Conversations(cache_dir=folder / "cache", **{**options, **settings})
    data.connect(Tokenizer(model), 2, SHAPE.max_seq_length)
    data.prepare_data()
    return data


def ask(path: str, answer: str = "red", text: str = "Which?") -> dict[str, Any]:
    messages = [{"role": "user", "content": f"<image>{text}"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [path]}


def read_batches(data: Conversations, number: int, **shape: Any) -> list[Any]:
    stream = iter(data.train_stream(SHAPE if not shape else BatchShape(**{**vars(SHAPE), **shape})))
    return [next(stream) for _ in range(number)]


@pytest.mark.parametrize(("kind", "places"), [("smolvlm", 4 * 5), ("llava", 16), ("qwen2_vl", 2 * 3)])
def test_places_are_written_out_and_not_trained(
    kind: str, places: int, models: dict[str, Path], tmp_path: Path
) -> None:
    draw_image(tmp_path / "a.png", (1, 2, 3), (24, 16))
    write_rows(tmp_path, [ask("a.png")])
    data = open_data(models[kind], tmp_path, train_on="everything")
    (batch,) = read_batches(data, 1, micro_batch_size=1)
    tokenizer = data.tokenizer
    image = tokenizer.find_token("<image>")
    assert (batch.ids == image).sum() == places and not (batch.labels == image).any()
    features = sum(steps * height * width for steps, height, width in batch.media.grids)
    assert features == places * (1 if kind == "llava" else 4) == len(batch.media.patches_NP)
    trained = tokenizer.decode(batch.labels[batch.labels >= 0])
    assert "Which?" in trained and "red" in trained and "<image>" not in trained and "row" not in trained
    assert (batch.positions is not None and batch.positions.shape[1] == 3) == (kind == "qwen2_vl")


@pytest.mark.parametrize("settings", [{}, {"padding": True}, {"packing": {"enabled": True}}, {"tokenize": "lazy"}])
def test_batches_do_not_depend_on_how_they_are_read(
    settings: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    from litgpt.data.modules.finetuning import Packing

    write_color_rows(tmp_path)
    settings = {key: Packing(**value) if key == "packing" else value for key, value in settings.items()}
    settings |= {"packing": Packing(True, strategy="sequential")} if "packing" in settings else {}
    data = open_data(models["qwen2_vl"], tmp_path, **settings)
    batches = read_batches(data, 5)
    plain = [[batch] for batch in read_batches(open_data(models["qwen2_vl"], tmp_path), 5)]
    patches = [batch.media.patches_NP for batch in batches if batch.media is not None]
    expected = [batch.media.patches_NP for (batch,) in plain if batch.media is not None]
    assert torch.equal(torch.cat(patches)[: len(torch.cat(expected))], torch.cat(expected))
    for batch in batches:
        image = data.tokenizer.find_token("<image>")
        grids = () if batch.media is None else batch.media.grids
        assert (batch.ids == image).sum() == sum(height * width // 4 for _, height, width in grids)
    again = [next(iter_) for iter_ in [iter(data.train_stream(SHAPE))] for _ in range(2)]
    assert torch.equal(again[1].ids, batches[1].ids)


@pytest.mark.parametrize("policy", ["truncate_right", "truncate_left", "split", "drop"])
def test_a_cut_never_divides_an_image(policy: Any, models: dict[str, Path], tmp_path: Path) -> None:
    for name, color in COLORS.items():
        draw_image(tmp_path / f"{name}.png", color, (32, 32))
    answer = {"role": "assistant", "content": "the answer " * 3}
    rows = []
    for size in range(0, 40, 3):
        turns = [{"role": "user", "content": "q" * size + "<image>" + "r" * (40 - size)}, answer]
        rows.append({"messages": turns * 3, "images": ["red.png", "blue.png", "green.png"]})
    write_rows(tmp_path, rows)
    for length in (120, 137, 200):
        data = open_data(models["qwen2_vl"], tmp_path, on_overlong=policy)
        if policy == "drop":
            with pytest.raises(UserError, match="none of 14 samples has an answer"):
                read_batches(data, 1, max_seq_length=length)
            continue
        for batch in read_batches(data, 20, max_seq_length=length, micro_batch_size=1):
            grids = () if batch.media is None else batch.media.grids
            places = (batch.ids == data.tokenizer.find_token("<image>")).sum()
            assert places == 16 * len(grids) and 0 < batch.ids.shape[1] <= length


def test_a_sample_with_an_image_longer_than_a_part_is_left_out_whole_and_counted(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_image(tmp_path / "a.png", (9, 9, 9), (32, 32))
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    long = ask("a.png", "then ends")
    write_rows(tmp_path, [{"messages": short}, {**long, "messages": [*short, *long["messages"]]}])
    data = open_data(models["qwen2_vl"], tmp_path, on_overlong="split")
    batches = read_batches(data, 2, max_seq_length=15, micro_batch_size=1)
    assert "1 left out" in capsys.readouterr().err
    assert torch.equal(batches[0].ids, batches[1].ids) and batches[0].media is None


def test_bad_rows_are_counted_and_named(models: dict[str, Path], tmp_path: Path) -> None:
    draw_image(tmp_path / "a.png", (1, 2, 3))
    (tmp_path / "text.png").write_text("none")
    bad = [ask("missing.png"), ask("text.png"), ask("../a.png"), ask("http://x/a.png"), ask("a.png", text="<image>")]
    bad += [{"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]}]
    write_rows(tmp_path, [ask("a.png"), *bad])
    data = open_data(models["llava"], tmp_path, on_error="drop")
    report = data.report()[str(tmp_path / "rows.jsonl")]
    assert (report["rows"], sum(report["reasons"].values())) == (7, 6)
    assert report["reasons"] == {
        "image not found": 1,
        "not an image that can be read": 1,
        "image outside of the folder of the data": 1,
        "image at a URL is not supported": 1,
        "more places for images than images": 1,
        "not one place for each image": 1,
    }
    write_rows(tmp_path, [ask("a.png"), bad[0]])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: image not found .*missing\.png.*data\.on_error: drop"):
        open_data(models["llava"], tmp_path)


def test_an_image_that_is_lost_later(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_color_rows(tmp_path)
    kept = open_data(models["smolvlm"], tmp_path, on_error="drop")
    before = read_batches(kept, 5)
    (tmp_path / "red.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    after = read_batches(open_data(models["smolvlm"], tmp_path, on_error="drop"), 5)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(before, after, strict=True))
    assert sum(batch.targets for batch in after) < sum(batch.targets for batch in before)
    assert all(torch.isfinite(batch.media.patches_NP).all() for batch in after if batch.media is not None)
    assert "red.png: not an image that can be read" in capsys.readouterr().err
    for workers in (0, 2):
        stream = open_data(models["smolvlm"], tmp_path, on_error="drop", num_workers=workers).train_stream(SHAPE)
        batches = [batch for _, batch in zip(range(10), stream, strict=False)]
        stream.close()
        assert sum(batch.targets for batch in batches) == 2 * sum(batch.targets for batch in after)
        err = capsys.readouterr().err
        assert (
            err.count("data: 4 samples were not trained, because an image, video or sound of each could not be read")
            == 1
        )
    with pytest.raises(UserError, match=r"red\.png: .*or set data\.on_error: drop"):
        read_batches(open_data(models["smolvlm"], tmp_path, on_error="raise"), 5)


def test_a_lost_image_on_a_canvas_keeps_its_places(models: dict[str, Path], tmp_path: Path) -> None:
    write_color_rows(tmp_path)
    data = open_data(models["llava_onevision"], tmp_path, on_error="drop")
    before = read_batches(data, 5)
    (tmp_path / "red.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    after = read_batches(data, 5)
    assert sum(batch.targets for batch in after) < sum(batch.targets for batch in before)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.ids, other.ids) and one.media.order.counts == other.media.order.counts
        assert one.media.grids == other.media.grids and one.media.order.features == other.media.order.features


def test_images_at_urls(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_color_rows(tmp_path)
    plain = read_batches(open_data(models["llava"], tmp_path), 5)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "web").mkdir()
    with run_server({f"/{path.name}": path.read_bytes() for path in tmp_path.glob("*.png")}) as server:
        rows = [json.loads(re.sub(r'"(\w+\.png)"', rf'"{server.url}/\1"', line)) for line in lines]
        bad = ["missing", "missing", "header", "private", "large", "half"]
        write_rows(tmp_path / "web", [*(ask(f"{server.url}/{path}") for path in bad), *rows])
        monkeypatch.setattr(public_urls, "is_public", lambda address: address == "127.0.0.1")
        monkeypatch.setattr(public_urls, "WAITS", ())
        urls = MediaUrls(True, seconds=1, connections=3)
        data = open_data(models["llava"], tmp_path / "web", media_urls=urls, on_error="drop")
        asked = len(server.asked)
        again = open_data(models["llava"], tmp_path / "web", media_urls=urls, on_error="drop")
        assert len(server.asked) == asked
        with pytest.raises(UserError, match=r"rows\.jsonl:1: image at a URL .* set data\.media_urls\.enabled: true"):
            open_data(models["llava"], tmp_path / "web")
    assert data.report()[str(tmp_path / "web" / "rows.jsonl")]["reasons"] == {
        "URL with status 404": 2,
        "URL that takes too long": 1,
        "URL of no public address": 1,
        "URL of too large a file": 1,
        "URL that cannot be reached": 1,
    }
    for each in (data, again):
        for batch, expected in zip(read_batches(each, 5), plain, strict=True):
            assert torch.equal(batch.ids, expected.ids)
            assert (batch.media is None) == (expected.media is None)
            assert batch.media is None or torch.equal(batch.media.patches_NP, expected.media.patches_NP)


def test_folder_of_images(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    draw_image(tmp_path / "elsewhere" / "a.png", (1, 2, 3))
    write_rows(tmp_path / "data", [ask("a.png"), ask(str(tmp_path / "elsewhere" / "a.png"))])
    data = open_data(models["llava"], tmp_path / "data", media_dir=tmp_path / "elsewhere")
    assert len(read_batches(data, 1)[0].media.grids) == 2
    with pytest.raises(UserError, match=r"(outside of the folder|no such file)"):
        open_data(models["llava"], tmp_path / "data")
    with pytest.raises(UserError, match=r"data\.media_dir: .* is not a folder"):
        open_data(models["llava"], tmp_path / "data", media_dir=tmp_path / "none").check_files(has_tokenizer=True)


def test_text_models_refuse_images(tmp_path: Path) -> None:
    from tests.chat_model import write_chat_model

    draw_image(tmp_path / "a.png", (1, 2, 3))
    write_rows(tmp_path, [ask("a.png")])
    with pytest.raises(UserError, match="image data is not supported"):
        open_data(write_chat_model(tmp_path / "model"), tmp_path)


def test_nothing_decoded_is_kept(models: dict[str, Path], tmp_path: Path) -> None:
    write_color_rows(tmp_path)
    data = open_data(models["smolvlm"], tmp_path)
    stored = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    lines = next((tmp_path / "cache").rglob("media.jsonl")).read_text().splitlines()
    assert stored < 40_000 and len(lines) == 5 and "patches" not in json.loads(lines[0])[0]
    batch = read_batches(data, 1)[0]
    assert isinstance(batch.media.patches_NP.numpy(), np.ndarray)
