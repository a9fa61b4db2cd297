"""Compare pretraining of the same model on the same text with LitGPT, transformers' Trainer and this package.

    python benchmarks/pretrain.py --work /tmp/pretrain-benchmark --model pythia-14m --rounds 3

Run it with the interpreter that this package is installed in; the peers get their own environments in the work folder,
with the same torch. All sides use one process, the same cores and tokenizer, no validation, and save the final model.
LitGPT compiles the model; this package runs without `compile`, its default on a CPU, and with it. Prints the medians
over the rounds for each side and precision: tokens/s without the first steps (compilation, warmup); the fraction of the
machine's limit, which `limit.py` measures with the parts of this package's step; wall and CPU seconds and peak resident
memory (largest process) of the whole run from text files to the saved model; and the ratios, which `record.py` adds to
the record. Requires only the standard library, pip and an idle machine.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = {
    "ours": ("--editable", str(Path(__file__).parents[1])),
    "litgpt": ("litgpt==0.5.13", "litdata==0.2.59"),
    "transformers": ("transformers==5.23.0", "accelerate"),
    "trl": ("trl==1.16.0", "peft==0.21.2", "transformers==5.23.0", "accelerate"),
}
PRECISIONS = ("32-true", "bf16-mixed")
OURS = ("ours", "compiled")  # this package, as it is and with `compile: true`; LitGPT always compiles
SIDES = (*OURS, "litgpt", "transformers")
ROWS = 50_304  # of the embedding
WARM = 8  # steps excluded from the rate
LIMIT = Path(__file__).with_name("limit.py")


class Shape(NamedTuple):
    """Of a model and its batches; with `groups` a Llama model with tied embeddings, without a Pythia model."""

    layers: int
    width: int
    heads: int
    inner: int
    length: int
    batch: int
    groups: int = 0

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.length * self.batch


SHAPES = {
    "pythia-14m": Shape(6, 128, 4, 512, length=512, batch=4),
    "llama-30m": Shape(6, 384, 6, 1024, length=1024, batch=2, groups=2),
    "smollm2-135m": Shape(30, 576, 9, 1536, length=512, batch=2, groups=3),
}


class Result(NamedTuple):
    """The measurements of one run."""

    tokens_per_second: float
    wall_seconds: float
    cpu_seconds: float
    peak_gb: float


def main() -> None:
    """Set up the work folder, run every side in turn, and print the results."""
    if len(sys.argv) > 1 and sys.argv[1] in WORKERS:
        WORKERS[sys.argv[1]](*sys.argv[2:])
        return
    options = read_options()
    work = options.work.resolve()
    pythons = create_environments(work, options.sides)
    make_text(work / "text")
    if not (work / "tokenizer").exists():
        run_command(sys.executable, __file__, "make_tokenizer", work / "text", work / "tokenizer")
    results: dict[str, dict[str, list[Result]]] = {
        name: {side: [] for side in options.sides} for name in options.precisions
    }
    for turn in range(options.rounds):
        for precision in options.precisions:
            for side in options.sides:
                result = run_side(side, pythons[side], precision, work, turn, options)
                results[precision][side].append(result)
                print(f"round {turn + 1} {precision} {side}: {result}", flush=True)
    (work / "results.json").write_text(json.dumps(results, indent=1))
    figures: dict[str, float] = {}
    for precision in options.precisions:
        text, out = work / "text", work / "runs" / f"limit-{precision}"
        flags = build_flags(options.model, text, work / "tokenizer", out, precision, options.steps)
        command = [pythons["ours"].with_name("litgpt"), *flags]
        at_limit = measure_limit(command, out, (WARM + 1, WARM + 4), options.threads)
        label = precision if options.model == "pythia-14m" else f"{options.model} {precision}"
        figures |= print_results(label, results[precision], SHAPES[options.model].tokens / at_limit)
    (work / "pretrain-figures.json").write_text(json.dumps(figures, indent=1))


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, text and results")
    parser.add_argument("--model", choices=SHAPES, default="pythia-14m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each run")
    parser.add_argument("--threads", type=int, default=2, help="cores that each run may use")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    options = parser.parse_args()
    if "ours" not in options.sides:
        parser.error("--sides: without ours there is nothing to compare; add it")
    if options.steps < WARM + 4:
        parser.error(f"--steps: {options.steps} leaves too few to measure; use at least {WARM + 4}")
    return options


def run_command(*command: object) -> str:
    """Run a command and return its output."""
    return subprocess.run([str(word) for word in command], check=True, text=True, stdout=subprocess.PIPE).stdout


def create_environments(work: Path, sides: list[str]) -> dict[str, Path]:
    """Return the Python interpreter of each side, in its own environment, where what it lacks is installed."""
    torch_packages = [
        f"torch=={version('torch').partition('+')[0]}",
        f"torchvision=={version('torchvision').partition('+')[0]}",
    ]
    pythons = {}
    for side, packages in PACKAGES.items():
        folder = work / f"venv-{side}"
        pythons[side], ready = folder / "bin" / "python", folder / "ready"
        installed = ready.read_text().splitlines() if ready.exists() else []
        missing = [package for package in (*packages, *torch_packages) if package not in installed]
        if side in sides and missing:
            print(f"Installing {' '.join(missing)} into {folder}", flush=True)
            if not ready.exists():
                venv.create(folder, with_pip=True, clear=True)
            run_command(pythons[side], "-m", "pip", "install", "-q", *packages, *torch_packages)
            ready.write_text("\n".join([*installed, *missing]))
    pythons["compiled"] = pythons["ours"]
    return pythons


def make_text(folder: Path, files: int = 9) -> None:
    """Write about 11 MB of text, the source code of Python's standard library, to a few files."""
    if folder.exists():
        return
    library = Path(sysconfig.get_path("stdlib"))
    excluded = {"site-packages", "test", "tests", "idlelib"}
    sources = sorted(path for path in library.rglob("*.py") if not excluded & set(path.parts))
    folder.mkdir(parents=True)
    for number in range(files):
        parts = (path.read_text(encoding="utf-8", errors="ignore") for path in sources[number::files])
        (folder / f"part-{number}.txt").write_text("\n\n".join(parts), encoding="utf-8")


def make_tokenizer(text: str, folder: str) -> None:
    """Train a byte-level BPE tokenizer with the vocabulary size of the model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=50_254, special_tokens=[end], initial_alphabet=alphabet)
    tokenizer.train([str(path) for path in sorted(Path(text).iterdir())], trainer)
    Path(folder).mkdir()
    tokenizer.save(f"{folder}/tokenizer.json")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "unk_token": end}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(names))


def run_side(side: str, python: Path, precision: str, work: Path, turn: int, options: argparse.Namespace) -> Result:
    """Run one side on fresh text files."""
    name, shape = f"{side}-{precision}-{turn}", SHAPES[options.model]
    text, out = work / "runs" / name / "text", work / "runs" / name / "out"
    shutil.rmtree(text.parent, ignore_errors=True)
    shutil.copytree(work / "text", text)
    if side == "transformers":
        command = [python, __file__, "train_transformers", options.model, text, work / "tokenizer", out, precision]
        command.append(options.steps)
    else:
        flags = build_flags(options.model, text, work / "tokenizer", out, precision, options.steps)
        command = [python.with_name("litgpt"), *flags, *(("--compile", "true") if side == "compiled" else ())]
    wall, cpu, peak = run_measured([str(word) for word in command], text.parent / "log.txt", options.threads)
    read_rate = read_times_rate if side == "transformers" else read_metrics_rate
    rate = read_rate(out, shape.tokens)
    shutil.rmtree(text)
    return Result(round(rate, 1), round(wall, 1), round(cpu, 1), round(peak, 3))


def build_flags(model: str, text: Path, tokenizer: Path, out: Path, precision: str, steps: int) -> list[str]:
    """Return the command line of `litgpt pretrain`, which is the same for LitGPT and for this package."""
    shape = SHAPES[model]
    keys = {
        "data": "TextFiles",
        "data.train_data_path": text,
        "data.num_workers": 2,
        "tokenizer_dir": tokenizer,
        "out_dir": out,
        "precision": precision,
        "devices": 1,
        "train.max_tokens": steps * shape.tokens,
        "train.global_batch_size": shape.batch,
        "train.micro_batch_size": shape.batch,
        "train.max_seq_length": shape.length,
        "train.lr_warmup_steps": 2,
        "train.save_interval": 1_000_000,
        "eval.interval": 1_000_000,
        "eval.max_iters": 1,  # LitGPT always validates on two batches before training
        "eval.final_validation": "false",
        "logger_name": "csv",
    }
    if shape.groups:
        keys |= {
            "train.tie_embeddings": "true",
            "model_config.block_size": shape.length,
            "model_config.padded_vocab_size": ROWS,
            "model_config.n_layer": shape.layers,
            "model_config.n_embd": shape.width,
            "model_config.n_head": shape.heads,
            "model_config.n_query_groups": shape.groups,
            "model_config.intermediate_size": shape.inner,
            "model_config.rotary_percentage": 1.0,
            "model_config.parallel_residual": "false",
            "model_config.bias": "false",
            "model_config.norm_class_name": "RMSNorm",
            "model_config.mlp_class_name": "LLaMAMLP",
        }
    return ["pretrain", model, *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


def run_measured(command: list[str], log: Path, threads: int) -> tuple[float, float, float]:
    """Run a command on `threads` cores; return wall seconds, CPU seconds and peak resident memory in GB."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    cores = sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_getaffinity") else None
    began = time.perf_counter()
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        if cores:
            os.sched_setaffinity(child.pid, cores)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - began
    if child.returncode:
        sys.exit(
            f"{' '.join(command)}\nexited with {child.returncode}; the last lines of {log}:\n{log.read_text()[-2000:]}"
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e9


def read_metrics_rate(out: Path, step_tokens: int) -> float:
    """Compute tokens/s after the warmup steps from the columns `time` (s) and `lengths` (tokens) of metrics.csv."""
    rows = [(float(row["time"]), float(row["lengths"])) for row in read_metrics(out) if row.get("lengths")]
    (start, before), (end, after) = next(row for row in rows if row[1] >= WARM * step_tokens), rows[-1]
    return (after - before) / (end - start)


def read_last_metric(out: Path, name: str) -> float:
    """The last value of a column of metrics.csv."""
    return [float(row[name]) for row in read_metrics(out) if row.get(name)][-1]


def read_metrics(out: Path) -> list[dict[str, str]]:
    """Read metrics.csv in the output folder of `litgpt pretrain`."""
    with next(out.glob("logs/csv/version_*/metrics.csv")).open() as file:
        return list(csv.DictReader(file))


def read_times_rate(out: Path, step_tokens: int) -> float:
    """Compute tokens/s after the warmup steps from the end times of the steps in times.json."""
    ends = json.loads((out / "times.json").read_text())
    return (len(ends) - WARM) * step_tokens / (ends[-1] - ends[WARM - 1])


def train_transformers(model: str, text: str, tokenizer_dir: str, out: str, precision: str, steps: str) -> None:
    """Train with transformers' Trainer, and record the end time of each step."""
    import torch
    from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

    shape = SHAPES[model]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_arguments: object, **_more: object) -> None:
            ends.append(time.perf_counter())

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{tokenizer_dir}/tokenizer.json", eos_token="<|endoftext|>")
    documents = [path.read_text(encoding="utf-8") for path in sorted(Path(text).iterdir())[1:]]
    ids = torch.tensor([number for document in tokenizer(documents)["input_ids"] for number in document])
    rows = ids[: len(ids) // shape.length * shape.length].view(-1, shape.length)
    samples = [{"input_ids": row, "labels": row} for row in rows]
    settings = TrainingArguments(
        output_dir=out,
        max_steps=int(steps),
        per_device_train_batch_size=shape.batch,
        bf16=precision == "bf16-mixed",
        use_cpu=True,
        learning_rate=1e-3,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        dataloader_num_workers=2,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(build_transformers_model(shape), settings, train_dataset=samples, callbacks=[Clock()])
    trainer.train()
    trainer.save_model(out)
    Path(out, "times.json").write_text(json.dumps(ends))


def build_transformers_model(shape: Shape) -> Any:
    """The model of transformers."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": ROWS,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.length,
        "use_cache": False,
    }
    if not shape.groups:
        return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=shape.groups, tie_word_embeddings=True))


def measure_limit(command: list[object], out: Path, steps: tuple[int, int], threads: int) -> float:
    """Run this package with a profile, print the parts of its step, and return the seconds of a step at the limit.

    Args:
        command: of the run, whose output folder is `out`.
        steps: the first and the last step of the profile.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    run_measured([*map(str, command), "--profile.steps", json.dumps(steps)], out / "log.txt", threads)
    found, trace = out / "limit.json", out / "profile" / "trace.json.gz"
    print(run_command(sys.executable, LIMIT, trace, "--threads", threads, "--json", found), flush=True)
    return json.loads(found.read_text())["seconds_at_limit"]


def print_results(precision: str, results: dict[str, list[Any]], limit: float) -> dict[str, float]:
    """Print the medians of one precision, and the ratios to each peer; returns the figures of the record.

    Args:
        limit: tokens/s at the machine's limit.
    """
    medians = {side: rows[0]._make(map(statistics.median, zip(*rows, strict=True))) for side, rows in results.items()}
    print(f"\n{precision:24}{'tokens/s':>10}{'of limit':>11}{'run, s':>9}{'CPU, s':>9}{'peak, GB':>10}")
    for side, row in medians.items():
        rate = f"{row.tokens_per_second:>10,.0f}{row.tokens_per_second / limit:>11.1%}"
        print(f"{side:24}{rate}{row.wall_seconds:>9.1f}{row.cpu_seconds:>9.1f}{row.peak_gb:>10.2f}")
    figures: dict[str, float] = {}
    for own in [side for side in OURS if side in medians]:
        ours, label = medians.pop(own), precision if own == "ours" else f"{precision} {own}"
        figures[f"{label}, of limit"] = ours.tokens_per_second / limit
        for side, peer in [(side, row) for side, row in medians.items() if side not in OURS]:
            speed, wall = ours.tokens_per_second / peer.tokens_per_second, peer.wall_seconds / ours.wall_seconds
            memory = ours.peak_gb / peer.peak_gb
            ratios = f"{speed:.2f}x tokens/s, whole run {wall:.2f}x faster, {memory:.2f} of its memory"
            print(f"{own} against {side}: {ratios}")
            figures |= {f"{label}, tokens/s of {side}": speed, f"{label}, memory of {side}": memory}
    return figures


WORKERS: dict[str, Callable[..., None]] = {
    "make_tokenizer": make_tokenizer,
    "train_transformers": train_transformers,
}

if __name__ == "__main__":
    main()
