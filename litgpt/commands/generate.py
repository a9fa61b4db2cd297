"""`litgpt generate`: print generated text to stdout and timings to stderr, or write generated images."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.api import LLM
from litgpt.data.media.codes import open_code_reader
from litgpt.errors import UserError
from litgpt.generation import load_llm, write_texts
from litgpt.infer.image_codes import ImagePrompt, check_guidance, draw_image
from litgpt.infer.image_head import draw_head_image, open_image_generator
from litgpt.infer.marked_messages import list_given_media
from litgpt.infer.sampling import Sampling
from litgpt.messages import print_message
from litgpt.recipe.generate import Generate

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SAMPLING_KEYS = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


def run(recipe: Generate) -> None:
    """Load the model and generate the samples."""
    if recipe.image_out is None:
        write_texts(recipe, partial(load_llm, recipe.checkpoint_dir, recipe))
    else:
        write_images(recipe, recipe.image_out)


def write_images(recipe: Generate, path: Path) -> None:
    """Write images after the prompt of a recipe, one file for each sample.

    Raises:
        UserError: if the model writes no images, or the prompt does not fit.
    """
    draw = prepare_drawing(load_llm(recipe.checkpoint_dir, recipe), recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(recipe.num_samples):
        start = time.perf_counter()
        image = draw(seed=recipe.seed + number)
        file = path if recipe.num_samples == 1 else path.with_name(f"{path.stem}-{number + 1}{path.suffix}")
        image.save(file)
        print(file)
        print_message(f"Time for inference {number + 1}: {time.perf_counter() - start:.2f} sec total")


def prepare_drawing(llm: LLM, recipe: Generate) -> Callable[..., "Image"]:
    """The function that draws an image after the prompt of a recipe, given a `seed`; errors as `write_images`."""
    sampling = Sampling(**{key: getattr(recipe, key) for key in IMAGE_SAMPLING_KEYS})
    encoder = replace(llm.prompt_encoder(), variables={"generation_mode": "image"})
    encode = partial(encoder.encode, sources=list_given_media(recipe.media))
    reader = open_code_reader(llm.tokenizer)
    if reader is not None:
        if not reader.codec.can_draw:
            raise UserError(f"image_out: the codes of {llm.tokenizer.folder} have no decoder of images; leave it out")
        ids, null_ids = (encode(text, recipe.sys_prompt, recipe.chat_template).ids for text in (recipe.prompt, ""))
        prompt = ImagePrompt(ids, null_ids, recipe.guidance)
        check_guidance(prompt)
        return partial(draw_image, llm.model, reader, prompt, sampling=sampling)
    generator = open_image_generator(llm.model, llm.tokenizer)
    if generator is None:
        raise UserError(
            f"image_out: {llm.tokenizer.folder} has no image codes; use a model that `litgpt tokenizer extend` has "
            "given some, and that was trained on images"
        )
    for kind in recipe.media:
        raise UserError(f"{kind}: is not supported with image_out by a model that draws by a head; leave it out")
    prompt = generator.build_prompt(encode(recipe.prompt, recipe.sys_prompt, recipe.chat_template).ids, recipe.guidance)
    check_guidance(prompt)
    return partial(draw_head_image, llm.model, generator, prompt, sampling=sampling)
