"""Train an image codec on a folder of images.

The step of training in `litgpt.train.step` is that of a decoder: it shards tokens over ranks, counts targets and
resumes. A codec has none of these, and takes minutes, so its loop is a plain one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.data.media.pictures import interpolate, open_picture
from litgpt.errors import UserError
from litgpt.files import staged_folder
from litgpt.messages import print_message
from litgpt.model.image_codec import CodecShape, ImageCodec, save_codec, scale_pixels
from litgpt.phases import phase
from litgpt.recipe.data_commands import CodecArgs

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
HELD_OUT = 20  # one image of this many is not trained on
EVAL_BATCH = 256


@dataclass(frozen=True)
class CodecScores:
    """How well a codec reconstructs the images that it was not trained on.

    Attributes:
        images, held_out: the numbers of images that it was trained on, and not.
        skipped: images that could not be read.
        psnr: peak signal-to-noise ratio, 10 log10(255^2 / mean squared error), in dB.
        error: mean absolute error of a pixel, of 255.
        codes_used: the number of different codes of all images.
    """

    images: int
    held_out: int
    skipped: int
    psnr: float
    error: float
    codes_used: int


def read_images(folder: Path, size: int, *, skip_bad: bool) -> tuple[Tensor, int]:
    """The images in a folder and its subfolders, uint8 (B, 3, size, size), and the number of those left out.

    Raises:
        UserError: if there are fewer than two, or one cannot be read and is not skipped.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    images, skipped = list[Tensor](), 0
    with phase("reading images", len(files)) as entry:
        for path in files:
            entry.advance()
            try:
                images.append(interpolate(open_picture(path), (size, size), "bilinear"))
            except UserError as error:
                if not skip_bad:
                    raise UserError(f"{error}; or set bad_rows: skip") from None
                skipped += 1
    if len(images) < 2:
        raise UserError(f"input: {folder} has {len(images)} images that can be read; use a folder with two or more")
    return torch.stack(images), skipped


def train_codec(images_BCHW: Tensor, shape: CodecShape, settings: CodecArgs, device: torch.device) -> ImageCodec:
    """Train a codec: the mean absolute and the mean squared error of pixels, by AdamW with a cosine schedule.

    Args:
        images_BCHW: uint8, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU, the same for every device
        torch.manual_seed(settings.seed)
        codec = ImageCodec(shape).to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    with phase("training image codes", settings.steps) as entry:
        for step in range(settings.steps):
            entry.advance()
            chosen = torch.randint(len(images_BCHW), (settings.batch_size,), generator=generator)
            pixels = scale_pixels(images_BCHW[chosen].to(device))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (0.5 + 0.5 * math.cos(math.pi * step / settings.steps))
            output, _ = codec(pixels)
            loss = F.l1_loss(output, pixels) + F.mse_loss(output, pixels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
            optimizer.step()
            if step % max(settings.steps // 10, 1) == 0:
                print_message(f"step {step}: loss {loss.item():.4f}")
    return codec.eval()


def measure_codec(codec: ImageCodec, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The difference (B, 3, H, W) of each pixel of images from its reconstruction, and their codes (B, N)."""
    device = codec.levels_C11.device
    codes = torch.cat([codec.encode(part.to(device)).cpu() for part in images_BCHW.split(EVAL_BATCH)])
    decoded = torch.cat([codec.decode(part.to(device)).cpu() for part in codes.split(EVAL_BATCH)])
    return images_BCHW.float() - decoded.float(), codes


def write_codec(folder: Path, output_dir: Path, settings: CodecArgs, *, skip_bad: bool) -> CodecScores:
    """Train a codec on the images in a folder, and write its folder, whole or not at all.

    Raises:
        UserError: if the shape is not valid, or as `read_images`.
    """
    shape = CodecShape(settings.size, settings.patch, tuple(settings.levels), settings.width)
    images, skipped = read_images(folder, shape.size, skip_bad=skip_bad)
    train, held_out = split_images(images, settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec = train_codec(train, shape, settings, device)
    errors, held_out_codes = measure_codec(codec, held_out)
    _, codes = measure_codec(codec, train)
    with staged_folder(output_dir) as staged:
        save_codec(staged, codec)
    return CodecScores(
        images=len(train),
        held_out=len(held_out),
        skipped=skipped,
        psnr=10 * math.log10(255**2 / max(errors.square().mean().item(), 1e-9)),
        error=errors.abs().mean().item(),
        codes_used=len(torch.cat([codes, held_out_codes]).unique()),
    )


def split_images(images: Tensor, seed: int) -> Sequence[Tensor]:
    """The images to train on, and those that are held out."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    held_out = max(len(images) // HELD_OUT, 1)
    return images[order[held_out:]], images[order[:held_out]]
