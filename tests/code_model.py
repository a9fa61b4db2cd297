"""A tiny model that writes images: an untrained codec of 2 x 2 codes, a tokenizer of bytes, and drawn images."""

import json
from pathlib import Path
from typing import Any

import torch

from litgpt.data.tokenizer import train_tokenizer
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.image_codec import CodecShape, ImageCodec, save_codec
from litgpt.model.init import initialize
from litgpt.store.save_model import save_model_folder

SHAPE = CodecShape(size=8, patch=4, levels=(4, 3), width=8)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
TEXT = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 258, "hidden_size": 48},
    **{"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128},
    **{"bos_token_id": 0, "eos_token_id": 1},
}


def write_codec_folder(folder: Path, seed: int = 0) -> Path:
    """Write a codec with random weights."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    save_codec(folder, ImageCodec(SHAPE))
    return folder


def write_text_model(folder: Path) -> Path:
    """Write a model of text with random weights and a chat template."""
    source = folder.parent / f"{folder.name}-source"
    train_tokenizer([], "bytes", 258, source)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "config.json").write_text(json.dumps(TEXT))
    config = Config.from_checkpoint(source)
    model = GPT(config)
    initialize(model, seed=1)
    save_model_folder(folder, config=config, tensors=model.named_parameters(), tokenizer_dir=source)
    return folder


def draw_noise(path: Path, seed: int) -> str:
    """Write an image of random colors; returns its name."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(256, (3, 2, 2), dtype=torch.uint8, generator=generator)
    pixels = colors.repeat_interleave(4, 1).repeat_interleave(4, 2)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return path.name


def build_row(question: list[Any], answer: list[Any]) -> dict[str, Any]:
    """A row whose contents are texts and, as paths, images."""
    turns = []
    for role, parts in (("user", question), ("assistant", answer)):
        blocks = [{"type": "image", "image": str(part)} if isinstance(part, Path) else part for part in parts]
        turns.append({"role": role, "content": blocks})
    return {"messages": turns}
