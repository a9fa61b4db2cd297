"""Compare the codes of images with transformers, of a model whose folder has their codec."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.data.media.codes import open_code_reader
from litgpt.data.media.pictures import open_picture
from litgpt.data.tokenizer import Tokenizer
from litgpt.infer.media_parity import draw_pixels


def compare_codes(folder: Path, reference: Any, seed: int) -> tuple[Tensor, Tensor]:
    """The tokens of the codes of two drawn images, here and by transformers with the folder's processor, (2, N) each.

    Args:
        reference: the model of transformers.
    """
    from PIL.Image import fromarray
    from transformers import AutoImageProcessor

    reader = open_code_reader(Tokenizer(folder))
    assert reader is not None
    images = [fromarray(values.numpy()) for values in draw_pixels(seed)]
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        expected = reference.get_image_tokens(processor(images=images, return_tensors="pt")["pixel_values"])
    actual = torch.tensor([reader.encode(open_picture(image)) for image in images]) + reader.tokens.first
    return actual, expected.view_as(actual)
