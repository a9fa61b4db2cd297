"""Draw images with a model that has a head of its own for their codes, which are no tokens (Janus).

Axes: V codes, D width of the decoder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import read_json_object
from litgpt.infer.image_codes import ImagePrompt, continue_texts
from litgpt.infer.sampling import SampledRow, Sampling
from litgpt.model.gpt import GPT
from litgpt.model.hf_config import ImageHeadKeys
from litgpt.model.hf_config_values import check_count, unsupported_key
from litgpt.model.image_codec import Codec, load_codec
from litgpt.model.image_head import ImageHead, ImageHeadShape
from litgpt.model.registry import find_published_family
from litgpt.model.tower_block import TOWER_ACTIVATIONS
from litgpt.model.tower_config import TowerShape
from litgpt.store.weight_files import open_weights

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageGenerator:
    """Draws images after a prompt.

    Attributes:
        codec: decodes codes to pixels.
        begin: the token after which a model draws.
        start: the first token of a text; None for none.
        padding: the token that the null prompt has in place of all between these.
    """

    head: ImageHead
    codec: Codec
    begin: int
    start: int | None
    padding: int

    def build_prompt(self, ids: Sequence[int], guidance: float) -> ImagePrompt:
        """The tokens of a prompt with the one after which the model draws, and of the same length without its text."""
        ids = [*ids, self.begin]
        null_ids = [token if token in (self.start, self.begin) else self.padding for token in ids]
        return ImagePrompt(ids, null_ids, guidance)


@torch.inference_mode()
def generate_head_codes(
    model: GPT, generator: ImageGenerator, prompt: ImagePrompt, *, sampling: Sampling, seed: int | None
) -> list[int]:
    """The codes of an image after a prompt; arguments and errors as of `generate_codes`."""
    head, device = generator.head, model.embedding.weight.device
    random = None if seed is None else torch.Generator(device).manual_seed(seed)
    row = SampledRow(sampling, (), [], random)
    steps = generator.codec.shape.places

    def embed(code: int) -> Tensor:
        return head.embed(torch.tensor([code], device=device))

    continue_texts(model, prompt, row, steps, embed=embed, forward=partial(run_with_head, model, head))
    return row.generated


def run_with_head(
    model: GPT, image_head: ImageHead, ids: Tensor, *, head: Callable[..., Tensor], **inputs: Any
) -> Tensor:
    """The logits of codes, in place of those of tokens; as of `GPT.forward`."""

    def compute(hidden_BTD: Tensor, *_: object) -> Tensor:
        return head(image_head.prepare(hidden_BTD), image_head.output.weight, image_head.output.bias, None)

    output: Tensor = model(ids, head=compute, **inputs)
    return output


def draw_head_image(
    model: GPT, generator: ImageGenerator, prompt: ImagePrompt, *, sampling: Sampling, seed: int | None
) -> "Image":
    """The image that a model draws after a prompt, as Pillow has it; arguments and errors as of `generate_codes`."""
    from PIL import Image

    codes = generate_head_codes(model, generator, prompt, sampling=sampling, seed=seed)
    return Image.fromarray(generator.codec.decode(torch.tensor([codes]))[0].permute(1, 2, 0).numpy())


def open_image_generator(model: GPT, tokenizer: Tokenizer) -> ImageGenerator | None:
    """What draws by the head in a model's folder, in its type and on its device; None without one.

    Raises:
        UserError: if it is not supported, or the tokenizer does not have its tokens.
    """
    folder, config = tokenizer.folder, model.config
    if config.vision is None or not (folder / "config.json").is_file():
        return None
    values = read_json_object(folder / "config.json")
    family = find_published_family(values)
    if family is None or family.image_head is None:
        return None
    head = load_image_head(folder, family.image_head, values, config.n_embd)
    mark = TowerShape.from_values(config.vision).mark
    assert mark is not None
    begin = tokenizer.token_to_id(mark["text"].partition("{image}")[0])
    codec, embedding = load_codec(folder), model.embedding.weight
    if head.embedding.num_embeddings != codec.shape.codes:
        problem = f"{head.embedding.num_embeddings} codes are drawn, and {codec.shape.codes} are decoded"
        raise UserError(f"{folder}: {problem}; download the folder again")
    head = head.to(embedding.device, embedding.dtype).eval().requires_grad_(False)
    return ImageGenerator(head, codec, begin, tokenizer.bos_id, find_padding(tokenizer))


def find_padding(tokenizer: Tokenizer) -> int:
    """The padding token of a model.

    Raises:
        UserError: if the folder names none.
    """
    path = tokenizer.folder / "generation_config.json"
    number = read_json_object(path).get("pad_token_id") if path.is_file() else None
    if number is None and (text := tokenizer.special_tokens().get("pad_token")) is not None:
        number = tokenizer.find_token(text)
    if type(number) is not int or not 0 <= number < tokenizer.id_limit:
        raise UserError(f"{path}: pad_token_id: {number} is not a token; set that of the model, which guidance needs")
    return number


def load_image_head(folder: Path, keys: ImageHeadKeys, values: dict[str, Any], width: int) -> ImageHead:
    """Load the head in a model's folder, on the CPU.

    Args:
        values: of its `config.json`.
        width: of the decoder.

    Raises:
        UserError: if its settings are not supported, or a tensor is missing or of another shape.
    """
    settings, source = values.get(keys.key) or {}, open_weights(folder)
    if not isinstance(settings, dict):
        raise unsupported_key(keys.key, settings, "a mapping of its settings")
    act = settings.get("hidden_act", "gelu")
    if act not in [*TOWER_ACTIVATIONS]:  # a list may have what has no hash
        raise unsupported_key(f"{keys.key}.hidden_act", act, " or ".join(TOWER_ACTIVATIONS))
    layers = check_count(f"{keys.key}.num_hidden_layers", settings.get("num_hidden_layers", 2))
    known = set(source.names)
    table = keys.publish("embedding.weight")
    if table not in known:
        raise UserError(f"{folder}: has no {table}, which draws images; use the folder of the whole model")
    if len(sizes := source.read_meta(table).shape) != 2:
        raise UserError(f"{folder}: {table} has the shape {list(sizes)}, not one of codes and width")
    codes, embed = sizes
    layers = min(layers, len(known))  # of more, one has no tensor, which is said below
    with torch.device("meta"):
        head = ImageHead(ImageHeadShape(codes, embed, width, layers, act))
    state = {}
    for name, parameter in head.named_parameters():
        published = keys.publish(name)
        given = list(source.read_meta(published).shape) if published in known else None
        if given != list(parameter.shape):
            problem = "is missing" if given is None else f"has the shape {given}"
            raise UserError(f"{folder}: {published} {problem}; config.json says {list(parameter.shape)}")
        state[name] = source.read(published)
    head.load_state_dict(state, assign=True)
    return head
