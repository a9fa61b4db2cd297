"""Write images: the codes after a prompt, on a grid and with guidance, and the pixels of the codes.

Axes: R rows of logits, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from litgpt.data.media.codes import CodeReader
from litgpt.errors import UserError
from litgpt.infer.block_cache import BlockCache, find_window_layers, round_up_size
from litgpt.infer.packed_step import Chunk, run_packed
from litgpt.infer.prompt_images import PlacedFeatures
from litgpt.infer.requests import check_prompt
from litgpt.infer.sampling import SampledRow, Sampling, sample_rows
from litgpt.model.code_tokens import GridConstraint
from litgpt.model.gpt import GPT

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImagePrompt:
    """What an image is written after.

    Attributes:
        ids: tokens of the prompt.
        null_ids: tokens of the prompt without its text, or of one that describes what the image should not have.
        guidance: g in u + g (c - u), the logits after both (Ho and Salimans 2022, classifier-free guidance); 1 for the
            prompt alone.
    """

    ids: Sequence[int]
    null_ids: Sequence[int]
    guidance: float = 1.0

    @property
    def texts(self) -> list[list[int]]:
        """The texts that the model continues at once."""
        return [list(self.ids)] if self.guidance == 1 else [list(self.ids), list(self.null_ids)]


def guide(logits_RV: Tensor, guidance: float) -> Tensor:
    """The logits (V,) of a text with guidance: u + g (c - u), at least in float32.

    Args:
        logits_RV: c and u, or c alone without guidance.
    """
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    return logits_RV[0] if len(logits_RV) == 1 else logits_RV[1] + guidance * (logits_RV[0] - logits_RV[1])


def continue_texts(
    model: GPT,
    prompt: ImagePrompt,
    row: SampledRow,
    steps: int,
    *,
    embed: Callable[[int], Tensor] | None = None,
    forward: Callable[..., Tensor] | None = None,
) -> None:
    """Generate a number of tokens after the texts of a prompt, which continue with the same.

    Args:
        row: what they are sampled by, and where they are added.
        embed: what the model reads (1, D) for one that was generated, if it is none of its tokens.
        forward: as of `run_packed`.

    Raises:
        UserError: as `generate_codes`.
    """
    texts: list[list[int]] = prompt.texts
    for ids in texts:
        check_prompt(model, ids, steps)
    longest = max(map(len, texts)) + steps
    windows = find_window_layers(model.config, longest)
    cache = BlockCache(len(texts) * round_up_size(longest), len(texts), windows=windows)
    blocks, features = [cache.allocate(longest) for _ in texts], None
    for _ in range(steps):
        chunks = [
            Chunk(block, ids, features=features) for block, ids in zip(blocks, texts, strict=True) if block is not None
        ]
        logits = torch.cat(run_packed(model, chunks, cache.slabs, forward=forward))
        token = int(sample_rows(guide(logits, prompt.guidance)[None], [row]))
        if row.constraint is not None:
            row.constraint.accept(token)
        row.generated.append(token)
        features = None if embed is None else PlacedFeatures([0], embed(token))
        texts = [[token if features is None else 0]] * len(texts)


@torch.inference_mode()
def generate_codes(
    model: GPT, reader: CodeReader, prompt: ImagePrompt, *, sampling: Sampling, seed: int | None
) -> list[int]:
    """The codes of an image after a prompt: exactly as many as its grid has.

    Both texts of a prompt with guidance are rows of the same forward passes, and continue with the same codes.

    Args:
        seed: of the random numbers; None for torch's generator.

    Raises:
        UserError: if prompt and image exceed the model's context, or logits are not finite.
    """
    tokens, device = reader.tokens, next(model.parameters()).device
    constraint = GridConstraint(tokens, model.config.padded_vocab_size or 0, image_first=True)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    row = SampledRow(sampling, prompt.texts[0], [], generator, constraint)
    continue_texts(model, prompt, row, len(tokens.template) - 1)  # without the last, which is no code
    codes = tokens.read([*row.generated, tokens.end])
    assert codes is not None
    return codes


def draw_image(model: GPT, reader: CodeReader, prompt: ImagePrompt, *, sampling: Sampling, seed: int | None) -> "Image":
    """The image that a model writes after a prompt, as Pillow has it; arguments and errors as of `generate_codes`."""
    return reader.draw(generate_codes(model, reader, prompt, sampling=sampling, seed=seed))


def check_guidance(prompt: ImagePrompt) -> None:
    """Check that guidance changes something.

    Raises:
        UserError: if both prompts are the same.
    """
    if prompt.guidance != 1 and list(prompt.ids) == list(prompt.null_ids):
        raise UserError(f"guidance: {prompt.guidance} has no effect with a prompt without text; set 1")
