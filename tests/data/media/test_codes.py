"""Images as codes: the codec, the tokens of a vocabulary, rows of both modalities, and prompts without text."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.cli import main
from litgpt.data import Conversations
from litgpt.data.media.codes import CODE_NAMES, open_code_reader
from litgpt.data.modules.finetuning import Packing
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.model.code_tokens import CodeTokens, GridConstraint
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.image_codec import CodecShape, ImageCodec, load_codec, save_codec
from litgpt.recipe.data import BatchShape
from litgpt.store.load_model import iter_tensors, load_config, load_model
from litgpt.train.image_codec import CodecArgs, measure_codec, train_codec
from tests.code_model import SHAPE, build_row, draw_noise, write_codec_folder, write_text_model
from tests.vision_model import write_rows

BATCHES = BatchShape(micro_batch_size=1, global_batch_size=1, max_seq_length=128, rank=0, ranks=1, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    text, codec = write_text_model(folder / "text"), write_codec_folder(folder / "codec")
    assert main(["tokenizer", "extend", str(text), str(codec), str(folder / "model")]) == 0
    return folder / "model"


def open_data(model: Path, folder: Path, **settings: Any) -> Conversations:
    options = {"sources": str(folder / "rows.jsonl"), "val_fraction": 0.0, "num_workers": 0, "shuffle": False}
    data = Conversations(cache_dir=folder / "cache", **{**options, **settings})
    data.connect(Tokenizer(model), 1, BATCHES.max_seq_length)
    data.prepare_data()
    return data


def read_batches(data: Conversations, number: int) -> list[Any]:
    return list(itertools.islice(data.train_stream(BATCHES), number))


def show(data: Conversations, ids: Any) -> str:
    return str(data.tokenizer.processor.decode(ids.tolist(), skip_special_tokens=False))


def test_every_code_is_decoded_and_encoded_by_its_digits() -> None:
    codec = ImageCodec(CodecShape(size=4, patch=2, levels=(4, 3, 2), width=4))
    codes = torch.arange(24).view(6, 2, 2)
    digits = codes[:, None] // codec.strides_C11 % codec.levels_C11
    latents = torch.logit((digits / (codec.levels_C11 - 1)).clamp(1e-4, 1 - 1e-4))
    scaled, again = codec.quantize(latents)
    assert torch.equal(again, codes) and torch.allclose(scaled, codec.scale_digits(digits.float()))
    assert scaled.amin() == -1 and scaled.amax() == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((8, 3, (4,), 4), "patch: 3 is not a power of two"),
        ((10, 4, (4,), 4), "that divides size: 10"),
        ((8, 4, (4, 1), 4), r"levels: \[4, 1\] is not valid"),
        ((8, 4, (4096, 4096), 4), "16,777,216 codes, each a row"),
    ],
)
def test_shapes_without_a_grid_are_refused(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CodecShape(*values)


def test_a_codec_learns_and_returns_from_its_folder(tmp_path: Path) -> None:
    images = torch.randint(256, (12, 3, 2, 2), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    settings = CodecArgs(size=8, patch=4, levels=[4, 4, 4], width=16, steps=150, batch_size=12, lr=5e-3, seed=1)
    shape = CodecShape(8, 4, (4, 4, 4), 16)
    codec = train_codec(images, shape, settings, torch.device("cpu"))
    again = train_codec(images, shape, settings, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(codec.parameters(), again.parameters(), strict=True))
    errors, codes = measure_codec(codec, images)
    assert errors.abs().mean() < 30 and len(codes.unique()) > 8
    save_codec(tmp_path, codec)
    loaded = load_codec(tmp_path)
    assert torch.equal(loaded.encode(images), codes) and torch.equal(loaded.decode(codes), codec.decode(codes))
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"not the weights of config\.json"):
        load_codec(tmp_path)


def test_a_tokenizer_of_images_is_trained_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        draw_noise(tmp_path / "in" / f"{number}.png", number)
    (tmp_path / "in" / "bad.png").write_text("no image")
    words = ["tokenizer", "train", str(tmp_path / "in"), str(tmp_path / "out"), "--kind", "vq"]
    words += ["--codec.size", "8", "--codec.levels", "[4, 3]", "--codec.width", "8", "--codec.steps", "2"]
    assert main(words) == 1 and "bad.png: not an image" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*words, "--bad_rows", "skip"]) == 0
    assert "of 12" in capsys.readouterr().out.replace("\n", " ")
    assert load_codec(tmp_path / "out").shape == SHAPE
    assert main([*words[:4], "--codec.steps", "2"]) == 2 and "set kind: vq" in capsys.readouterr().err


def test_a_model_has_rows_for_the_tokens_of_images(model: Path) -> None:
    base, codes = model.parent / "text", SHAPE.codes
    tokenizer, config = Tokenizer(model), load_config(model)
    assert tokenizer.id_limit == 258 + 2 + codes and config.padded_vocab_size == 320
    assert open_code_reader(tokenizer).tokens == CodeTokens(258, 259, 260, codes, 4)  # type: ignore[union-attr]
    old, new = (dict(iter_tensors(folder, load_config(folder))) for folder in (base, model))
    assert set(old) == set(new)
    for name, tensor in old.items():
        assert torch.equal(new[name][: len(tensor)], tensor), name
    assert new["embedding.weight"][258:].std() > 0.5 * old["embedding.weight"].std()
    again = GPT(Config.from_checkpoint(model))
    load_model(again, model)
    assert main(["tokenizer", "extend", str(model), str(model.parent / "codec"), str(model.parent / "other")]) == 1
    assert not (model.parent / "other").exists()


def test_images_are_codes_in_every_role(model: Path, tmp_path: Path) -> None:
    images = [tmp_path / draw_noise(tmp_path / f"{number}.png", number) for number in range(2)]
    rows = [
        build_row(["red"], [images[0]]),
        build_row([images[0]], ["red"]),
        build_row(["turn ", images[0]], ["so: ", images[1]]),
    ]
    write_rows(tmp_path, rows)
    data = open_data(model, tmp_path)
    reader = open_code_reader(data.tokenizer)
    assert reader is not None
    codes = [reader.codec.encode(open_pixels(path)[None])[0].tolist() for path in images]
    first, second = ("<|image_codes|>" + "".join(f"<|image_code_{code}|>" for code in each) for each in codes)
    first, second = first + "<|end_image_codes|>", second + "<|end_image_codes|>"
    batches = read_batches(data, 3)
    texts = [show(data, batch.ids[0]) for batch in batches]
    trained = [show(data, batch.labels[batch.labels >= 0]) for batch in batches]
    assert trained == [f"{first}<|eos|>", "red<|eos|>", f"so: {second}<|eos|>"]
    assert texts[2] == f"User: turn {first}<|eos|>\nAssistant: so: {second}<|eos|>\n"
    assert texts[0] == f"User: red<|eos|>\nAssistant: {first}<|eos|>\n"
    prompt = data.build_renderer().encode_prompt(next(data.iter_conversations()))
    assert show(data, torch.tensor(prompt)) == "User: red<|eos|>\nAssistant: "


def open_pixels(path: Path) -> torch.Tensor:
    from litgpt.data.media.pictures import open_picture

    return open_picture(path)


@pytest.mark.parametrize("settings", [{}, {"packing": Packing(True, strategy="sequential")}, {"tokenize": "lazy"}])
def test_prompts_are_dropped_by_seed_and_row(settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    image = tmp_path / draw_noise(tmp_path / "a.png", 1)
    write_rows(tmp_path, [build_row(["a red one"], [image]), build_row([image], ["a red one"])] * 2)
    plain = read_batches(open_data(model, tmp_path, **settings), 3)
    all_dropped = read_batches(open_data(model, tmp_path, null_prompt=1.0, **settings), 3)
    data = open_data(model, tmp_path)
    for before, after in zip(plain, all_dropped, strict=True):
        expected = show(data, before.ids[0]).replace("User: a red one", "User: ")
        assert show(data, after.ids[0]) == expected
        assert torch.equal(after.labels[after.labels >= 0], before.labels[before.labels >= 0])
    data = open_data(model, tmp_path, null_prompt=0.5, **settings)
    whole = [batch.ids for batch in read_batches(data, 12)]
    stream = data.train_stream(BATCHES)
    taken = [next(iter(stream)).ids for _ in range(5)]
    resumed = data.train_stream(BATCHES)
    resumed.load_state_dict(stream.state_dict())
    rest = [batch.ids for batch in itertools.islice(resumed, 7)]
    assert all(map(torch.equal, [*taken, *rest], whole)) and len({len(ids[0]) for ids in whole}) > 1


def test_the_share_of_dropped_prompts_is_the_rate() -> None:
    from litgpt.data.stream.samples import NullPrompts

    choice = NullPrompts(0.1, 42)
    assert 340 < sum(choice.chooses(row, 0) for row in range(4000)) < 460
    assert [choice.chooses(row, 0) for row in range(99)] != [NullPrompts(0.1, 43).chooses(row, 0) for row in range(99)]


def test_text_that_looks_like_an_image_is_refused(model: Path, tmp_path: Path) -> None:
    image = tmp_path / draw_noise(tmp_path / "a.png", 1)
    write_rows(tmp_path, [build_row(["<|image_code_3|>"], [image]), build_row(["red"], [image])])
    data = open_data(model, tmp_path, on_error="drop")
    (report,) = data.report().values()
    assert report["reasons"] == {"not one place for each image": 1}
    (tmp_path / "b.png").write_bytes(b"x")
    write_rows(tmp_path, [build_row(["red"], [tmp_path / "b.png"]), json.loads('{"text": "plain"}')])
    assert next(iter(open_data(model, tmp_path, on_error="drop").report().values()))["reasons"] == {
        "not an image that can be read": 1
    }


def test_null_prompts_need_a_model_that_writes_images(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path, [build_row(["red"], ["blue"])])
    with pytest.raises(UserError, match=r"data\.null_prompt: 0\.1 needs a model that writes images"):
        open_data(model.parent / "text", tmp_path, null_prompt=0.1)
    with pytest.raises(UserError, match=r"data\.null_prompt: 0\.1 is not supported with data\.streaming"):
        Conversations("rows.jsonl", streaming=True, null_prompt=0.1)


def test_an_image_has_exactly_its_places_and_then_ends() -> None:
    tokens = CodeTokens(begin=2, end=3, first=5, codes=4, places=3)
    constraint = GridConstraint(tokens, rows=12)
    assert constraint.allowed().nonzero().flatten().tolist() == [0, 1, 2, 4, 9, 10, 11]
    for token in (1, 2):
        constraint.accept(token)
    for code in (5, 8, 6):
        assert constraint.allowed().nonzero().flatten().tolist() == [5, 6, 7, 8]
        constraint.accept(code)
    assert constraint.allowed().nonzero().flatten().tolist() == [3]
    constraint.accept(3)
    assert constraint.allowed()[:3].tolist() == [True, True, True] and not constraint.allowed()[5:9].any()
    assert GridConstraint(tokens, 12, image_first=True).allowed().nonzero().flatten().tolist() == [2]
    ids = [0, 2, 5, 8, 6, 3, 1, 2, 5, 5, 3]
    assert tokens.find_images(ids) == [[0, 3, 1]]
    assert tokens.is_image(torch.tensor(ids)).tolist() == [token not in (0, 1) for token in ids]


def test_a_token_of_more_digits_than_a_number_has_is_refused_by_name() -> None:
    *_, names = CODE_NAMES
    assert names.read_number("IMGIMGBCZ") == 12 and names.read_number("IMGIMGKZ") is None
    with pytest.raises(UserError, match=r"^tokenizer: IMGIMGB{18}\.\.\.Z: 5000 digits are too many for a code; use 18"):
        names.read_number(f"IMGIMG{'B' * 5000}Z")  # more than Python converts
