"""Teach a language model to caption images: compose it with a vision tower, train the projector alone, and score it.

    python benchmarks/captions.py --tower facebook/dinov2-small --model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --work /tmp/captions

Both folders are those of Hugging Face on this disk. An image of 56 x 56 pixels has one shape of four kinds and two
sizes, in a random color, at a random place on a background of random brightness; its caption names size and shape. The
tower reads it as 16 patches, with its positions resized; only the new projector is trained, 0.6 million weights.
`litgpt evaluate` scores the exact captions of images that were not trained on: before, after, and after with the images
of others. 70 steps take 90 seconds on two cores.
"""

import argparse
import itertools
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer

from litgpt import GPT, Config
from litgpt.model.init import initialize
from litgpt.model.registry import find_family
from litgpt.store.save_model import save_model_folder

SIDE = 56  # of an image, in pixels
CORNERS = {"circle": (60, 1.0), "square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.45)}
"""Their number, and the radius of every second one."""
QUESTION = "Describe."
SIZES = {"small": (0.14, 0.18), "large": (0.32, 0.38)}  # radius as a share of the image
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    """Draw, compose, score, train, and score again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", type=Path, required=True, help="folder of a DINOv2 model")
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama model with ChatML's tokens")
    parser.add_argument("--work", type=Path, required=True, help="folder for images, models and scores")
    parser.add_argument("--steps", type=int, default=70, help="optimizer steps of 16 images")
    parser.add_argument("--images", type=int, default=1200, help="number of images to train on")
    parser.add_argument("--held_out", type=int, default=100, help="number of images to score")
    options = parser.parse_args()
    work = options.work.resolve()
    (work / "images").mkdir(parents=True)
    write_rows(work, options.images, options.held_out)
    compose(options.tower, options.model, work / "model")
    scores = {"before": score(work / "model", work, "before")}
    start = time.perf_counter()
    train(work, options.steps)
    seconds = time.perf_counter() - start
    scores["after"] = score(work / "out" / "final", work, "after")
    scores["after, with images of others"] = score(work / "out" / "final", work, "shuffled")
    for name, value in scores.items():
        print(f"{name}: {value:.0%} of {options.held_out} held-out captions exact")
    print(f"trained in {seconds:.0f} s")


def draw_scene(draw: random.Random, size: str, shape: str) -> Image.Image:
    """An image with a shape at a random place."""
    image = Image.new("RGB", (SIDE, SIDE), (draw.randint(190, 250),) * 3)
    pen, radius = ImageDraw.Draw(image), draw.uniform(*SIZES[size]) * SIDE
    x, y = (draw.uniform(radius, SIDE - radius) for _ in range(2))
    corners, inner = CORNERS[shape]
    radii = [radius * (inner if corner % 2 else 1.0) for corner in range(corners)]
    angles = [2 * math.pi * (corner + 0.5 * (shape == "square")) / corners - math.pi / 2 for corner in range(corners)]
    points = [(x + r * math.cos(angle), y + r * math.sin(angle)) for r, angle in zip(radii, angles, strict=True)]
    pen.polygon(points, fill=tuple(draw.randrange(180) for _ in range(3)))
    return image


def write_rows(work: Path, images: int, held_out: int) -> None:
    """Write images, rows to train on, rows to score, and those with the images of others."""
    draw = random.Random(1)
    scenes = list(itertools.product(SIZES, CORNERS))
    files = dict[str, list[tuple[str, str]]]()
    for name, count in (("train", images), ("held_out", held_out)):
        files[name] = []
        for number in range(count):
            scene, path = scenes[number % len(scenes)], f"images/{name}{number}.png"
            draw_scene(draw, *scene).save(work / path)
            files[name].append((path, "a " + " ".join(scene)))
    question = {"role": "user", "content": f"<image>{QUESTION}"}
    rows: dict[str, list[dict[str, Any]]] = {
        "train": [
            {"messages": [question, {"role": "assistant", "content": caption}], "images": [path]}
            for path, caption in files["train"]
        ]
    }
    scored = files["held_out"]
    for name, shift in (("held_out", 0), ("shuffled", 1)):
        paths = [path for path, _ in scored[shift:] + scored[:shift]]
        rows[name] = [
            {"messages": [question], "images": [path], "answer": caption}
            for path, (_, caption) in zip(paths, scored, strict=True)
        ]
    for name, lines in rows.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def compose(tower: Path, decoder: Path, folder: Path) -> None:
    """Write a LLaVA folder of a DINOv2 tower and a Llama decoder, with a random projector."""
    source = folder.with_name("parts")
    source.mkdir()
    tokenizer = Tokenizer.from_file(str(decoder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    tokenizer.save(str(source / "tokenizer.json"))
    vision, text = (json.loads((path / "config.json").read_text()) for path in (tower, decoder))
    image = tokenizer.token_to_id("<image>")
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -1,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "text_config": {**text, "vocab_size": image + 1},
        "vision_config": {**vision, "image_size": SIDE},
    }
    processor = json.loads((tower / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    for name, values in {"config.json": config, "preprocessor_config.json": processor}.items():
        (source / name).write_text(json.dumps(values))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    model = GPT(Config.from_checkpoint(source))
    initialize(model, seed=1)
    load_parts(model, load_file(tower / "model.safetensors"), load_file(decoder / "model.safetensors"))
    save_model_folder(folder, config=model.config, tensors=model.named_parameters(), tokenizer_dir=source)


@torch.no_grad()
def load_parts(model: GPT, tower: dict[str, torch.Tensor], decoder: dict[str, torch.Tensor]) -> None:
    """Load the weights of both parts; the token of images has the mean of the embeddings, and is not read."""
    family = find_family(model.config)
    assert family is not None and model.vision is not None
    embedding = decoder["model.embed_tokens.weight"]
    decoder["model.embed_tokens.weight"] = torch.cat([embedding, embedding.float().mean(0)[None].to(embedding)])
    name = "embeddings.position_embeddings"
    tower[name] = resize_positions(tower[name], SIDE // model.vision.shape.patch)
    published = {f"vision_tower.{key}": value for key, value in tower.items()}
    published |= {f"language_model.{key}": value for key, value in decoder.items()}
    for key, tensor in published.items():
        mapping = family.tensors.map_hf_name(key, model.config)
        if mapping is None:
            sys.exit(f"{key}: a model of this architecture has no such tensor")
        for part, value in zip(mapping.names, mapping.split(tensor, model.config), strict=True):
            model.get_parameter(part).copy_(value)


def resize_positions(positions_1ND: torch.Tensor, side: int) -> torch.Tensor:
    """The positions of a class token and of `side` by `side` patches, from those of a larger image."""
    first, rest = positions_1ND[:, :1], positions_1ND[:, 1:]
    old = math.isqrt(rest.shape[1])
    grid = rest.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (side, side), mode="bicubic", antialias=True).flatten(2).mT
    return torch.cat([first, resized.to(first)], 1)


def train(work: Path, steps: int) -> None:
    """Train the projector."""
    keys = {
        "out_dir": work / "out",
        "freeze.llm": "true",
        "freeze.vision": "true",
        "freeze.aligner": "false",
        "data": "Conversations",
        "data.sources": work / "train.jsonl",
        "data.val_fraction": 0,
        "data.cache_dir": work / "cache",
        "train.max_steps": steps,
        "train.epochs": 100,
        "train.global_batch_size": 16,
        "train.micro_batch_size": 16,
        "train.lr_warmup_steps": 8,
        "train.save_interval": 100_000,
        "train.log_interval": 10,
        "optimizer.lr": 2e-3,
        "precision": "bf16-true",
        "devices": 1,
    }
    run_litgpt("finetune_full", work / "model", *(word for key, value in keys.items() for word in (f"--{key}", value)))


def score(model: Path, work: Path, name: str) -> float:
    """The share of exact captions."""
    rows = work / ("shuffled.jsonl" if name == "shuffled" else "held_out.jsonl")
    out = work / "scores" / name
    run_litgpt("evaluate", model, "--prompts", rows, "--max_new_tokens", 24, "--out_dir", out)
    return float(json.loads((out / "results.json").read_text())["prompts"]["exact_match"])


def run_litgpt(*words: object) -> None:
    """Run a command of this package."""
    subprocess.run([sys.executable, "-m", "litgpt", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
