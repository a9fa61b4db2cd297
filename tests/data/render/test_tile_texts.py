"""The tokens of an image that is cut into tiles, as the published processor writes them."""

from pathlib import Path

import numpy as np
import pytest
from transformers import Llama4ImageProcessor, Llama4Processor

from litgpt.data.media.reader import open_media_reader
from litgpt.data.read.conversation import to_conversation
from litgpt.data.read.media import MARK
from litgpt.data.render.placers import build_feature_placer
from litgpt.data.tokenizer import Tokenizer
from tests.vision_model import draw_image, write_vision_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_model(tmp_path_factory.mktemp("llama4") / "model", "llama4")


@pytest.mark.parametrize(("size", "tiles"), [((9, 14), 1), ((30, 12), 2), ((12, 40), 3), ((40, 36), 4)])
def test_tokens_of_tiles(size: tuple[int, int], tiles: int, folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    draw_image(tmp_path / "a.png", (200, 30, 90), size)
    reader, tokenizer = open_media_reader(folder), Tokenizer(folder)
    assert reader is not None
    placer = build_feature_placer(reader, tokenizer)
    row = {"messages": [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "red"}]}
    conversation = to_conversation({**row, "images": [str(tmp_path / "a.png")]})
    ids = tokenizer.processor.encode(placer.write_places(f"a{MARK}b"), add_special_tokens=False).ids
    example = placer.write_images(np.array(ids, np.int32), np.ones(len(ids), np.float32), conversation)

    images = Llama4ImageProcessor.from_pretrained(folder)([Image.open(tmp_path / "a.png")], return_tensors="pt")
    rows, columns = images["aspect_ratios"][0].tolist()
    assert rows * columns == tiles and len(images["pixel_values"]) == len(example.media[0].grids)
    text = object.__new__(Llama4Processor)._prompt_split_image((rows, columns), 4)
    expected = tokenizer.processor.encode(f"a{text}b", add_special_tokens=False).ids
    assert example.ids.tolist() == expected and text.count("|patch|") == 4 * len(example.media[0].grids)
    (image,) = example.media
    assert not example.weights[image.start : image.stop].any() and example.weights.sum() == len(expected) - image.tokens
