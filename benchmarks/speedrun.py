"""Compare how well this package, LitGPT and a plain loop learn the text of the quickstart recipe in the same seconds.

    python benchmarks/speedrun.py --work /tmp/speedrun-benchmark --seconds 120

Run it with the interpreter that this package is installed in; the others get their own environments in the work folder,
as in [pretrain.py](pretrain.py). All sides use the same text, tokenizer, cores, and tokens per step. This package runs
its recipe, LitGPT the same model with AdamW, and the plain loop is nanoGPT's: a GPT-2 of the same depth and width with
AdamW, in float32. A short run of each measures its step, which gives the number of steps that its learning rate decays
over: what they reach after them is measured on all of the validation text, in bits per byte, because that does not
depend on the tokenizer. Starting, tokenization and validation do not count. Requires an idle machine.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pretrain import create_environments, read_last_metric, read_metrics_rate, run_command, run_measured

SIDES = ("ours", "litgpt", "plain")
PROBE_STEPS = 40
FINAL_LOSS = re.compile(r"Final evaluation \| val loss: ([\d.]+)")
PEER_OPTIMIZER = {
    "class_path": "torch.optim.AdamW",
    "init_args": {"lr": 2e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]},
}
PEER_FLOOR = 1e-4  # learning rate at the end of LitGPT's and nanoGPT's cosine
OURS_ONLY = {  # keys of the recipe that LitGPT does not have
    "": ("tokenizer",),
    "train": ("lr_decay_style", "wsd_decay_steps"),
    "eval": ("sample_prompt", "sample_tokens"),
}


class Shape(NamedTuple):
    """Of the plain loop's model and batches."""

    n_layer: int
    n_head: int
    n_embd: int
    rows: int
    batch: int
    length: int


def main() -> None:
    """Prepare text and tokenizer, run every side, and print the results."""
    if len(sys.argv) > 1 and sys.argv[1] in WORKERS:
        WORKERS[sys.argv[1]](*sys.argv[2:])
        return
    options = read_options()
    work = options.work.resolve()
    pythons = create_environments(work, ["ours", *({"litgpt"} & set(options.sides))])
    pythons["plain"] = pythons["ours"]
    if not (work / "prepared.json").exists():
        run_command(pythons["ours"], __file__, "prepare", work)
    prepared = json.loads((work / "prepared.json").read_text())
    bits = prepared["tokens"] / prepared["bytes"] / math.log(2)  # per byte, for a loss of 1 nat per token
    figures: dict[str, float] = {}
    print(f"{'':10}{'ms a step':>12}{'steps':>8}{'loss':>8}{'bits per byte':>15}")
    for side in options.sides:
        rate, _ = run_side(side, pythons[side], work, PROBE_STEPS, options.threads)
        steps = max(PROBE_STEPS, int(options.seconds * rate))
        _, loss = run_side(side, pythons[side], work, steps, options.threads)
        figures[f"bits per byte of {side}"] = loss * bits
        print(f"{side:10}{1000 / rate:>12.0f}{steps:>8,}{loss:>8.3f}{loss * bits:>15.3f}", flush=True)
    (work / "speedrun-figures.json").write_text(json.dumps(figures, indent=1))


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, text and results")
    parser.add_argument("--seconds", type=float, default=120, help="of training, for each side")
    parser.add_argument("--threads", type=int, default=2, help="cores that each run may use")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    return parser.parse_args()


def prepare(work: str) -> None:
    """Write text and tokenizer of the quickstart recipe, and the recipes of both packages."""
    import yaml

    from litgpt.data.read.python_docs import write_python_docs
    from litgpt.data.tokenizer import train_tokenizer
    from litgpt.recipe.config_hub import find_hub_recipe

    folder = Path(work)
    recipe: dict[str, Any] = yaml.safe_load(find_hub_recipe("quickstart").read_text(encoding="utf-8"))
    documents = {}
    for source, name in zip(write_python_docs(folder / "docs"), ("train", "val"), strict=True):
        documents[name] = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "text.txt").write_text("\n\n".join(documents[name]), encoding="utf-8")
    settings = recipe["tokenizer"]
    tokenizer = train_tokenizer(documents["train"], settings["kind"], settings["vocab_size"], folder / "tokenizer")
    text = (folder / "val" / "text.txt").read_text(encoding="utf-8")
    recipe["data"] = {"class_path": "TextFiles", "init_args": {"num_workers": 1}}
    recipe["train"] |= {"max_steps": None, "max_time": None, "save_interval": 1_000_000}
    recipe["eval"] |= {"interval": 1_000_000, "max_iters": 1_000_000}
    del recipe["tokenizer"]
    (folder / "ours.json").write_text(json.dumps(recipe))
    recipe["optimizer"] = PEER_OPTIMIZER
    recipe["train"]["min_lr"] = PEER_FLOOR
    for group, keys in OURS_ONLY.items():
        for key in keys:
            (recipe[group] if group else recipe).pop(key, None)
    (folder / "litgpt.json").write_text(json.dumps(recipe))
    amounts = {"bytes": len(text.encode()), "tokens": len(tokenizer.encode_batch([text])[0])}
    (folder / "prepared.json").write_text(json.dumps(amounts))


def run_side(side: str, python: Path, work: Path, steps: int, threads: int) -> tuple[float, float]:
    """Train some steps; returns the steps per second, and the validation loss at the end."""
    out = work / "runs" / side
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    recipe = json.loads((work / "ours.json").read_text())
    tokens = recipe["train"]["global_batch_size"] * recipe["train"]["max_seq_length"]
    if side == "plain":
        command = [python, __file__, "train_plain", work, out, steps]
    else:
        keys = {
            "config": work / f"{side}.json",
            "data.train_data_path": work / "train",
            "data.val_data_path": work / "val",
            "tokenizer_dir": work / "tokenizer",
            "out_dir": out,
            "train.max_tokens": steps * tokens,
        }
        flags = (word for key, value in keys.items() for word in (f"--{key}", str(value)))
        command = [python.with_name("litgpt"), "pretrain", *flags]
    log = work / "runs" / f"{side}.txt"
    run_measured([str(word) for word in command], log, threads)
    if side == "plain":
        found = json.loads((out / "result.json").read_text())
        return found["steps_per_second"], found["loss"]
    # LitGPT writes the loss of its last validation to its output only
    loss = read_last_metric(out, "val_loss") if side == "ours" else float(FINAL_LOSS.findall(log.read_text())[-1])
    return read_metrics_rate(out, tokens) / tokens, loss


def train_plain(work: str, out: str, steps: str) -> None:
    """nanoGPT's loop (https://github.com/karpathy/nanoGPT): random windows, AdamW, warm-up and cosine decay."""
    import torch
    from tokenizers import Tokenizer

    torch.manual_seed(0)
    recipe = json.loads(Path(work, "ours.json").read_text())
    train, model_config = recipe["train"], recipe["model_config"]
    names = ("n_layer", "n_head", "n_embd", "padded_vocab_size")
    shape = Shape(*(model_config[name] for name in names), train["global_batch_size"], train["max_seq_length"])
    encode = Tokenizer.from_file(f"{work}/tokenizer/tokenizer.json").encode
    ids, held_out = (torch.tensor(encode(Path(work, name, "text.txt").read_text()).ids) for name in ("train", "val"))
    model, settings = build_plain(shape), PEER_OPTIMIZER["init_args"]
    assert isinstance(settings, dict)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    count, warm, ends = int(steps), train["lr_warmup_steps"], [time.perf_counter()]
    for step in range(count):
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, count - warm)))
        lr = min((step + 1) / warm, 1) * (PEER_FLOOR + decay * (settings["lr"] - PEER_FLOOR))
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(ids) - shape.length, (shape.batch,))
        window = torch.stack([ids[start : start + shape.length + 1] for start in starts])
        compute_loss(model, window).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(time.perf_counter())
    windows = held_out[: (len(held_out) - 1) // shape.length * shape.length + 1].unfold(
        0, shape.length + 1, shape.length
    )
    with torch.no_grad():
        loss = torch.stack([compute_loss(model.eval(), window) for window in windows.split(1)]).mean().item()
    rate = (count - 8) / (ends[-1] - ends[8])  # the first steps are slower
    Path(out, "result.json").write_text(json.dumps({"steps_per_second": rate, "loss": loss}))


def build_plain(shape: Shape) -> Any:
    """A GPT-2: learned positions, LayerNorm before attention and MLP, GELU, and a head that is the embedding."""
    from torch import nn

    model = nn.ModuleDict(
        {
            "tokens": nn.Embedding(shape.rows, shape.n_embd),
            "positions": nn.Embedding(shape.length, shape.n_embd),
            "blocks": nn.ModuleList(
                nn.ModuleDict(
                    {
                        "norm_1": nn.LayerNorm(shape.n_embd, bias=False),
                        "attention": nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=False),
                        "proj": nn.Linear(shape.n_embd, shape.n_embd, bias=False),
                        "norm_2": nn.LayerNorm(shape.n_embd, bias=False),
                        "fc": nn.Linear(shape.n_embd, 4 * shape.n_embd, bias=False),
                        "out": nn.Linear(4 * shape.n_embd, shape.n_embd, bias=False),
                    }
                )
                for _ in range(shape.n_layer)
            ),
            "norm": nn.LayerNorm(shape.n_embd, bias=False),
        }
    )
    model.heads = shape.n_head
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            residual = name.endswith(("proj.weight", "out.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.n_layer) if residual else 0.02)
    return model


def predict(model: Any, inputs: Any) -> Any:
    """Logits (B, T, rows) of the token after each of the inputs (B, T)."""
    import torch
    from torch.nn import functional as F

    x = model["tokens"](inputs) + model["positions"](torch.arange(inputs.shape[1]))
    for block in model["blocks"]:
        parts = block["attention"](block["norm_1"](x)).split(x.shape[-1], dim=-1)
        query, key, value = (part.unflatten(-1, (model.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + block["proj"](mixed.transpose(1, 2).flatten(2))
        x = x + block["out"](F.gelu(block["fc"](block["norm_2"](x))))
    return F.linear(model["norm"](x), model["tokens"].weight)


def compute_loss(model: Any, window: Any) -> Any:
    """The mean cross-entropy of the next tokens of windows (B, T + 1)."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(predict(model, window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


WORKERS: dict[str, Callable[..., None]] = {"prepare": prepare, "train_plain": train_plain}

if __name__ == "__main__":
    main()
