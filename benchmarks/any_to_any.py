"""Teach a small language model to draw captions and to caption drawings, both of which it has not seen, and score it.

    python benchmarks/any_to_any.py --work /tmp/any-to-any

A drawing of 32 x 32 pixels has a shape of one of two sizes, four colors and three forms at one of nine places, and a
caption that says so. A codec is trained on the drawings, its codes are added to a decoder of 0.8 million random
weights, and one run trains both directions. 24 of the 216 combinations are in no training row, nor is their caption:
for these, the model draws after captions, and its images are named after the nearest of all drawings as the codec
reconstructs them; and it captions drawings, exactly or not. Then another run overfits a few drawings, whose codes and
captions should come back exactly. Writes `drawn.png`: a drawing of each held-out caption above what the model drew.
Takes less than ten minutes on two cores.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from litgpt import GPT, LLM, Config
from litgpt.data.media.codes import CodeReader, open_code_reader
from litgpt.data.media.pictures import open_picture
from litgpt.data.tokenizer import train_tokenizer
from litgpt.infer.image_codes import ImagePrompt, generate_codes
from litgpt.infer.sampling import Sampling
from litgpt.model.init import initialize
from litgpt.store.save_model import save_model_folder

SIDE = 32  # of a drawing, in pixels
SIZES = {"small": 4, "large": 7}
COLORS = {"red": (220, 30, 40), "green": (30, 170, 60), "blue": (40, 70, 220), "yellow": (235, 200, 40)}
FORMS = ("circle", "square", "triangle")
PLACES = {
    f"{row} {column}": (x, y)
    for row, y in (("top", 8), ("middle", 16), ("bottom", 24))
    for column, x in (("left", 8), ("center", 16), ("right", 24))
}
PARTS = ("size", "color", "form", "place")
KINDS = list(itertools.product(SIZES, COLORS, FORMS, PLACES))
HELD_OUT = random.Random(7).sample(KINDS, 24)
SHIFTS = list(itertools.product((-1, 0, 1), repeat=2))  # of a drawing, in pixels
MEMORIZED = 8
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
Kind = tuple[str, ...]


def main() -> None:
    """Draw, train a codec and a model, score it, and overfit another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="new folder for drawings, models and scores")
    parser.add_argument("--codec_steps", type=int, default=800, help="steps of 32 drawings")
    parser.add_argument("--steps", type=int, default=1000, help="steps of 32 rows")
    parser.add_argument("--guidance", type=float, default=3.0, help="of the drawings that are scored with guidance")
    options = parser.parse_args()
    start, work = time.perf_counter(), options.work.resolve()
    (work / "images").mkdir(parents=True)
    write_rows(work, "train", [kind for kind in KINDS if kind not in HELD_OUT], 2400)
    write_rows(work, "held_out", HELD_OUT, 2 * len(HELD_OUT))
    write_rows(work, "memorized", KINDS[:: len(KINDS) // MEMORIZED], MEMORIZED)
    write_model(work)
    words = ["tokenizer", "train", work / "images", work / "codes", "--kind", "vq", "--codec.patch", 8]
    words += ["--codec.width", 32, "--codec.batch_size", 32, "--codec.lr", 2e-3, "--codec.steps", options.codec_steps]
    run_litgpt(*words)
    run_litgpt("tokenizer", "extend", work / "text", work / "codes", work / "model")
    train(work, "train", options.steps, 32)
    llm = LLM.load(work / "out-train" / "final")
    for guidance in (1.0, options.guidance):
        print_drawn(llm, guidance, work / "drawn.png")
    captions = write_captions(llm, work, "held_out")
    print(f"captions of held-out drawings: {captions:.0%} exact; by chance {1 / len(KINDS):.1%}")
    train(work, "memorized", 300, MEMORIZED)
    print_memorized(work)
    print(f"in all {time.perf_counter() - start:.0f} s")


def draw(kind: Kind, shift: Sequence[int]) -> Image.Image:
    """A drawing, moved by a number of pixels to the right and down."""
    size, color, form, place = kind
    (x, y), radius = PLACES[place], SIZES[size]
    x, y = x + shift[0], y + shift[1]
    image = Image.new("RGB", (SIDE, SIDE), (250, 250, 250))
    pen, box = ImageDraw.Draw(image), (x - radius, y - radius, x + radius, y + radius)
    if form == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=COLORS[color])
    else:
        paint = pen.ellipse if form == "circle" else pen.rectangle
        paint(box, fill=COLORS[color])
    return image


def describe(kind: Kind) -> str:
    """The caption of a drawing."""
    size, color, form, place = kind
    return f"a {size} {color} {form} at the {place}"


def write_rows(work: Path, name: str, kinds: Sequence[Kind], count: int) -> None:
    """Write drawings, and for each a row from caption to drawing and one from drawing to caption."""
    numbers, rows = random.Random(name), []
    for number in range(count):
        kind, path = kinds[number % len(kinds)], f"images/{name}{number}.png"
        draw(kind, numbers.choice(SHIFTS)).save(work / path)
        image, text = {"type": "image", "image": path}, {"type": "text", "text": describe(kind)}
        for question, answer in ((text, image), (image, text)):
            turns = ("user", [question]), ("assistant", [answer])
            messages = [{"role": role, "content": content} for role, content in turns]
            rows.append(json.dumps({"messages": messages, "channel": f"to_{answer['type']}"}) + "\n")
    (work / f"{name}.jsonl").write_text("".join(rows))


def write_model(work: Path) -> None:
    """Write a small model of text with random weights, and a tokenizer of bytes."""
    source = work / "start"
    train_tokenizer([], "bytes", 258, source)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 258, "hidden_size": 128},
        **{"intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 128},
        **{"bos_token_id": 0, "eos_token_id": 1},
    }
    (source / "config.json").write_text(json.dumps(config))
    shape = Config.from_checkpoint(source)
    model = GPT(shape)
    initialize(model, seed=1)
    save_model_folder(work / "text", config=shape, tensors=model.named_parameters(), tokenizer_dir=source)


def train(work: Path, name: str, steps: int, batch: int) -> None:
    """Train both directions on the rows of a name."""
    keys = {
        "out_dir": work / f"out-{name}",
        "data": "Conversations",
        "data.sources": work / f"{name}.jsonl",
        "data.val_sources": work / "held_out.jsonl",
        "data.null_prompt": 0.1,
        "data.padding": "true",
        "data.num_workers": 1,
        "data.cache_dir": work / "cache",
        "train.max_steps": steps,
        "train.epochs": 1000,
        "train.global_batch_size": batch,
        "train.micro_batch_size": batch,
        "train.lr_warmup_steps": 10,
        "train.save_interval": 100_000,
        "train.log_interval": 50,
        "optimizer.lr": 3e-3,
        "eval.interval": 100,
        "eval.max_new_tokens": 40,
        "precision": "32-true",
        "devices": 1,
    }
    run_litgpt("finetune_full", work / "model", *(word for key, value in keys.items() for word in (f"--{key}", value)))


def get_reader(llm: LLM) -> CodeReader:
    """What reads and writes the codes of a model."""
    reader = open_code_reader(llm.tokenizer)
    assert reader is not None
    return reader


def reconstruct(reader: CodeReader, image: Image.Image) -> torch.Tensor:
    """An image as its codes say, float (3, SIDE, SIDE)."""
    return reader.decode(reader.encode(open_picture(image))).float()


def write_codes(llm: LLM, caption: str, *, guidance: float, temperature: float, seed: int) -> list[int]:
    """The codes that a model writes after a caption."""
    prompt = ImagePrompt(llm.prompt_tokens(caption), llm.prompt_tokens(""), guidance)
    return generate_codes(llm.model, get_reader(llm), prompt, sampling=Sampling(temperature=temperature), seed=seed)


def print_drawn(llm: LLM, guidance: float, file: Path) -> None:
    """Print the share of drawings after held-out captions that show what these say, and write them."""
    reader = get_reader(llm)
    known = [(kind, reconstruct(reader, draw(kind, shift))) for kind in KINDS for shift in SHIFTS]
    pixels = torch.stack([image for _, image in known])
    pairs, found = [], []
    for number, kind in enumerate(HELD_OUT * 2):
        codes = write_codes(llm, describe(kind), guidance=guidance, temperature=0.7, seed=number)
        image = reader.decode(codes)
        nearest = int((pixels - image.float()).square().flatten(1).sum(1).argmin())
        found.append([named == asked for named, asked in zip(known[nearest][0], kind, strict=True)])
        pairs.append((draw(kind, (0, 0)), reader.draw(codes)))
    write_sheet(pairs, file)
    shares = ", ".join(
        f"{part} {sum(column) / len(found):.0%}" for part, column in zip(PARTS, zip(*found, strict=True), strict=True)
    )
    print(
        f"drawings of held-out captions, guidance {guidance:g}: {sum(map(all, found)) / len(found):.0%} right; {shares}"
    )


def write_sheet(pairs: Sequence[tuple[Image.Image, Image.Image]], file: Path, columns: int = 12) -> None:
    """Write pairs of images, one above the other, in rows."""
    sheet = Image.new("RGB", (columns * (SIDE + 4), -(-len(pairs) // columns) * (2 * SIDE + 10)))
    for number, pair in enumerate(pairs):
        row, column = divmod(number, columns)
        for place, image in enumerate(pair):
            sheet.paste(image, (column * (SIDE + 4), row * (2 * SIDE + 10) + place * (SIDE + 2)))
    sheet.resize((sheet.width * 3, sheet.height * 3), Image.Resampling.NEAREST).save(file)


def read_rows(work: Path, name: str) -> list[tuple[Path, str]]:
    """The drawings of rows from drawing to caption, and the captions."""
    rows = [json.loads(line)["messages"] for line in (work / f"{name}.jsonl").read_text().splitlines()]
    return [(work / user["content"][0]["image"], answer["content"][0]["text"]) for user, answer in rows[1::2]]


def write_captions(llm: LLM, work: Path, name: str) -> float:
    """The share of exact captions among those that a model writes for the drawings of a name."""
    rows = read_rows(work, name)
    images: list[Any] = [[path] for path, _ in rows]
    texts = llm.generate([""] * len(rows), images=images, max_new_tokens=50, temperature=0)
    return sum(text.strip() == caption for text, (_, caption) in zip(texts, rows, strict=True)) / len(rows)


def print_memorized(work: Path) -> None:
    """Print how many codes and captions of the drawings that a model has memorized come back exactly."""
    llm = LLM.load(work / "out-memorized" / "final")
    reader, rows = get_reader(llm), read_rows(work, "memorized")
    exact = sum(
        write_codes(llm, caption, guidance=1, temperature=0, seed=1) == reader.encode(open_picture(path))
        for path, caption in rows
    )
    captions = round(write_captions(llm, work, "memorized") * len(rows))
    print(f"memorized: the codes of {exact} of {len(rows)} drawings are exact, and {captions} captions")


def run_litgpt(*words: object) -> None:
    """Run a command of this package."""
    subprocess.run([sys.executable, "-m", "litgpt", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
