"""Compare finetuning a small LLaVA model on images with transformers' Trainer and with this package.

    python benchmarks/multimodal.py --work /tmp/multimodal-benchmark --rounds 3

Run it with an interpreter in which this package, transformers and accelerate are installed. The model has a CLIP tower
of 11 million parameters, which is frozen, for images of 112 x 112 pixels, and a Llama decoder of 30 million, which is
trained with the projector in float32. The rows are drawn images of 640 x 480 pixels as JPEG, with a question and an
answer of 5 to 120 words of Python's documentation. Both sides start with the same weights, take the same rows in one
order, in batches of the same size, with two worker processes that read images; the losses of the first step, which are
equal, are printed. Prints the medians over the rounds: images/s without the first steps, wall and CPU seconds and peak
resident memory (largest process) of the whole run, and the ratios.
"""

import argparse
import json
import pydoc_data.topics
import random
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pretrain import read_metrics, run_measured

SIDES = ("ours", "transformers")
SIDE, PATCH, VOCABULARY, LENGTH = 112, 14, 4096, 512
WARM = 2  # steps excluded from the rate
RATE = 1e-4
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": PATCH,
}
DECODER = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
}
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
}


class Result(NamedTuple):
    """The measurements of one run."""

    images_per_second: float
    wall_seconds: float
    cpu_seconds: float
    peak_gb: float
    first_loss: float


def main() -> None:
    """Make the model and the rows, run both sides in turn, and print the results."""
    if len(sys.argv) > 1 and sys.argv[1] == "train_transformers":
        train_transformers(Path(sys.argv[2]), *map(int, sys.argv[3:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model, the rows and the results")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run")
    parser.add_argument("--batch", type=int, default=8, help="rows of each step")
    parser.add_argument("--threads", type=int, default=2, help="cores that each run may use")
    options = parser.parse_args()
    if options.steps <= WARM + 1:
        parser.error(f"--steps: {options.steps} leaves none to measure; use more than {WARM + 1}")
    work = options.work.resolve()
    if not (work / "model").exists():
        make_model(work)
    make_rows(work, options.steps * options.batch)
    results: dict[str, list[Result]] = {side: [] for side in SIDES}
    for turn in range(options.rounds):
        for side in SIDES:
            results[side].append(run_side(side, work, options))
            print(f"round {turn + 1} {side}: {results[side][-1]}", flush=True)
    (work / "results.json").write_text(json.dumps(results, indent=1))
    print_results(results)


def make_model(work: Path) -> None:
    """Write a model with random weights, which both sides load."""
    from tokenizers import AddedToken

    from litgpt import GPT, Config
    from litgpt.data.tokenizer import train_tokenizer
    from litgpt.model.init import initialize
    from litgpt.store.save_model import save_model_folder

    source = work / "source"
    tokenizer = train_tokenizer(list(pydoc_data.topics.topics.values()), "bpe", VOCABULARY - 8, source).processor
    tokens = ["<image>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    tokenizer.save(str(source / "tokenizer.json"))
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": tokenizer.token_to_id("<image>"),
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -2,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "text_config": {**DECODER, "vocab_size": VOCABULARY},
        "vision_config": TOWER,
    }
    for name, values in {"config.json": config, "preprocessor_config.json": PROCESSOR}.items():
        (source / name).write_text(json.dumps(values))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    model = GPT(Config.from_checkpoint(source))
    initialize(model, seed=1)
    save_model_folder(work / "model", config=model.config, tensors=model.named_parameters(), tokenizer_dir=source)


def make_rows(work: Path, count: int) -> None:
    """Draw images, and write a row for each."""
    from PIL import Image, ImageDraw

    draw, rows = random.Random(1), []
    words = " ".join(pydoc_data.topics.topics.values()).split()
    (work / "images").mkdir(exist_ok=True)
    for number in range(count):
        image = Image.new("RGB", (640, 480), tuple(draw.randrange(256) for _ in range(3)))
        pen = ImageDraw.Draw(image)
        for _ in range(60):
            x, y, size = draw.randrange(640), draw.randrange(480), draw.randrange(10, 120)
            pen.ellipse((x, y, x + size, y + size), fill=tuple(draw.randrange(256) for _ in range(3)))
        path = f"images/{number}.jpg"
        image.save(work / path, quality=90)
        start = draw.randrange(len(words) - 200)
        answer = " ".join(words[start : start + draw.randint(5, 120)])
        messages = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages, "images": [path]}) + "\n")
    (work / "rows.jsonl").write_text("".join(rows))


def run_side(side: str, work: Path, options: argparse.Namespace) -> Result:
    """Run one side."""
    out = work / f"out-{side}"
    for folder in (out, work / "cache"):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, __file__, "train_transformers", str(work), str(options.steps), str(options.batch)]
    if side == "ours":
        command = [sys.executable, "-m", "litgpt", *build_flags(work, out, options.steps, options.batch)]
    wall, cpu, peak = run_measured(command, work / f"log-{side}.txt", options.threads)
    if side == "ours":
        steps = [row for row in read_metrics(out) if row.get("loss")]
        points = [(float(row["time"]), float(row["loss"])) for row in steps]
    else:
        points = [(seconds, loss) for seconds, loss in json.loads((out / "points.json").read_text())]
    seconds = points[-1][0] - points[WARM - 1][0]
    rate = (len(points) - WARM) * options.batch / seconds
    return Result(round(rate, 2), round(wall, 1), round(cpu, 1), round(peak, 3), round(points[0][1], 4))


def build_flags(work: Path, out: Path, steps: int, batch: int) -> list[str]:
    """The command line of this package."""
    keys = {
        "out_dir": out,
        "freeze.aligner": "false",
        "data": "Conversations",
        "data.sources": work / "rows.jsonl",
        "data.val_fraction": 0,
        "data.shuffle": "false",
        "data.num_workers": 2,
        "data.cache_dir": work / "cache",
        "train.max_steps": steps,
        "train.global_batch_size": batch,
        "train.micro_batch_size": batch,
        "train.max_seq_length": LENGTH,
        "train.max_norm": 1.0,
        "train.lr_warmup_steps": 1,
        "train.log_interval": 1,
        "train.save_interval": 1_000_000,
        "eval.max_new_tokens": "null",
        "optimizer.lr": RATE,
        "optimizer.weight_decay": 0,
        "precision": "32-true",
        "devices": 1,
        "logger_name": "csv",
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return ["finetune_full", str(work / "model"), *words]


def train_transformers(work: Path, steps: int, batch: int) -> None:
    """Train with transformers' Trainer, and record the end time and the loss of each step."""
    import transformers
    from PIL import Image
    from torch.utils.data import SequentialSampler

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(work / "model" / "tokenizer.json"),
        chat_template=TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=PROCESSOR["size"], crop_size=PROCESSOR["crop_size"]),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    model = transformers.LlavaForConditionalGeneration.from_pretrained(work / "model", dtype="float32")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)

    def collate(items: list[dict[str, Any]]) -> Any:
        texts = [tokenizer.apply_chat_template(item["messages"], tokenize=False) for item in items]
        prompts = [
            tokenizer.apply_chat_template(item["messages"][:-1], tokenize=False, add_generation_prompt=True)
            for item in items
        ]
        images = [Image.open(work / item["images"][0]).convert("RGB") for item in items]
        options = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_tensors": "pt"}
        inputs = processor(images=images, text=texts, **options)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        places = (SIDE // PATCH) ** 2 - 1  # a prompt has one token for the image
        for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            start, stop = (len(tokenizer(part, add_special_tokens=False).input_ids) for part in (prompt, text))
            labels[number, : start + places] = -100
            labels[number, stop + places - 1 :] = -100  # the line break after the answer
        return {**inputs, "labels": labels}

    points: list[tuple[float, float]] = []

    class Clock(transformers.TrainerCallback):
        def on_log(self, *_arguments: Any, logs: Any = None, **_more: Any) -> None:
            if "loss" in logs:
                points.append((time.perf_counter(), logs["loss"]))

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_arguments: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    settings = transformers.TrainingArguments(
        output_dir=str(work / "out-transformers"),
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=RATE,
        warmup_steps=1,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        dataloader_num_workers=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = InOrder(model, settings, train_dataset=rows, data_collator=collate, callbacks=[Clock()])
    trainer.train()
    trainer.save_model(str(work / "out-transformers" / "final"))
    (work / "out-transformers" / "points.json").write_text(json.dumps(points))


def print_results(results: dict[str, list[Result]]) -> None:
    """Print the medians of both sides, and their ratios."""
    medians = {side: Result(*map(median, zip(*rows, strict=True))) for side, rows in results.items()}
    print(f"\n{'32-true':16}{'images/s':>10}{'run, s':>9}{'CPU, s':>9}{'peak, GB':>10}{'first loss':>12}")
    for side, row in medians.items():
        figures = f"{row.images_per_second:>10.2f}{row.wall_seconds:>9.1f}{row.cpu_seconds:>9.1f}{row.peak_gb:>10.2f}"
        print(f"{side:16}{figures}{row.first_loss:>12.4f}")
    ours, theirs = (medians[side] for side in SIDES)
    print(
        f"ours against transformers: {ours.images_per_second / theirs.images_per_second:.2f}x images/s, whole run "
        f"{theirs.wall_seconds / ours.wall_seconds:.2f}x faster, {ours.peak_gb / theirs.peak_gb:.2f} of its memory"
    )


if __name__ == "__main__":
    main()
