"""Compare loading a published model folder with LitGPT, which converts it first, and with this package.

    python benchmarks/load.py --work /tmp/load-benchmark --rounds 3

Run it with the interpreter that this package is installed in; LitGPT gets its own environment in the work folder, with
the same torch. The model is a Llama with random weights in bfloat16, one safetensors file of about 2 GB. Prints the
medians over the rounds for each side: wall and CPU seconds and peak resident memory from the folder to the first
logits, in the dtype of the files, so that every weight is read; with `--until loaded`, to the loaded model, which this
package memory-maps and reads on use; the data written to disk; and the ratios. For this package, also prints the added
resident memory relative to the size of the model. Requires only the standard library, pip and an idle machine.
"""

import argparse
import json
import resource
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pretrain import create_environments, run_measured

SIDES = ("ours", "litgpt")
NAME = "tiny-llama-1.1b"  # the folder name, from which LitGPT infers the config


class Result(NamedTuple):
    """The measurements of loading a folder once."""

    wall_seconds: float
    cpu_seconds: float
    peak_gb: float
    written_gb: float


def main() -> None:
    """Set up the work folder, run every side in turn, and print the results."""
    if len(sys.argv) > 1 and sys.argv[1] in WORKERS:
        WORKERS[sys.argv[1]](*sys.argv[2:])
        return
    options = read_options()
    work = options.work.resolve()
    pythons = create_environments(work, options.sides)
    source = work / "source" / NAME
    if not source.exists():
        run([pythons["ours"], __file__, "write_model", source], work, options.threads)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e9
    results: dict[str, list[Result]] = {side: [] for side in options.sides}
    for turn in range(options.rounds):
        for side in options.sides:
            results[side].append(run_side(side, pythons[side], source, work, options.threads, options.until))
            print(f"round {turn + 1} {side}: {results[side][-1]}", flush=True)
    (work / "results.json").write_text(json.dumps(results, indent=1))
    print_results(results, size, measure_added_memory(pythons["ours"], source, work, options.threads))


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, the model and results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="cores that each run may use")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--until", choices=("loaded", "logits"), default="logits", help="when a run ends")
    return parser.parse_args()


def run(command: list[object], work: Path, threads: int) -> tuple[float, float, float]:
    """Run a command on `threads` cores; return wall seconds, CPU seconds and peak resident memory in GB."""
    return run_measured([str(word) for word in command], work / "log.txt", threads)


def run_side(side: str, python: Path, source: Path, work: Path, threads: int, until: str) -> Result:
    """Load a fresh copy of the folder once; making the copy is not measured."""
    folder = work / "runs" / side / NAME
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    before = count_bytes(folder)
    steps: list[list[object]] = [[python, __file__, f"load_{side}", folder, until]]
    if side == "litgpt":
        steps.insert(0, [python.with_name("litgpt"), "convert_to_litgpt", folder])
    walls, cpus, peaks = zip(*(run(step, work, threads) for step in steps), strict=True)
    written = (count_bytes(folder) - before) / 1e9
    shutil.rmtree(folder)
    return Result(round(sum(walls), 2), round(sum(cpus), 2), round(max(peaks), 3), round(written, 3))


def count_bytes(folder: Path) -> int:
    """Return the size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure_added_memory(python: Path, source: Path, work: Path, threads: int) -> float:
    """Return the resident memory in GB that loading adds to a process with all imports done."""
    run([python, __file__, "measure_added", source], work, threads)
    return float((work / "log.txt").read_text().split()[-1])


def write_model(folder: str) -> None:
    """Write a model folder with random weights under their published names."""
    import torch

    from litgpt.model.config import Config
    from litgpt.model.gpt import GPT
    from litgpt.store.save_model import save_model_folder

    torch.set_default_dtype(torch.bfloat16)
    model = GPT(Config.from_name(NAME))
    save_model_folder(folder, config=model.config, tensors=model.named_parameters())
    Path(folder, "model_config.yaml").unlink()
    Path(folder, "tokenizer_config.json").write_text("{}")


def load_ours(folder: str, until: str) -> None:
    """Load a published folder without conversion."""
    model = open_ours(folder)
    if until == "logits":
        compute_first_logits(model)


def compute_first_logits(model: Callable[..., object]) -> None:
    """Run one forward pass, which reads every weight."""
    import torch

    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.int64))


def open_ours(folder: str) -> Callable[..., object]:
    """Open a published folder with this package, in the dtype of its files."""
    import torch

    from litgpt.infer.load import open_model

    return open_model(Path(folder), device=torch.device("cpu"))


def load_litgpt(folder: str, until: str) -> None:
    """Load a converted folder as LitGPT's commands do on a CPU."""
    import torch

    from litgpt import GPT, Config

    torch.set_default_dtype(torch.bfloat16)
    model = GPT(Config.from_file(Path(folder) / "model_config.yaml"))
    state = torch.load(Path(folder) / "lit_model.pth", weights_only=True, mmap=True)
    model.load_state_dict(state.get("model", state))
    if until == "logits":
        compute_first_logits(model)


def measure_added(folder: str) -> None:
    """Print the peak resident memory, in GB, that loading and reading every weight adds."""
    import torch

    import litgpt.infer.load  # noqa: F401 - imported before the measure begins
    from litgpt.code_pages import return_code_pages

    return_code_pages()  # loading does
    torch.ones(2) @ torch.ones(2)
    before, peak, done = read_resident_memory(), [0.0], threading.Event()

    def sample_memory() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], read_resident_memory())
            time.sleep(0.002)

    sampler = threading.Thread(target=sample_memory)
    sampler.start()
    model = open_ours(folder)
    compute_first_logits(model)
    done.set()
    sampler.join()
    print(max(peak[0], read_resident_memory()) - before)


def read_resident_memory() -> float:
    """Return the current resident memory of this process, in GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def print_results(results: dict[str, list[Result]], size: float, added_gb: float) -> None:
    """Print the medians and the ratios."""
    medians = {side: Result(*map(statistics.median, zip(*rows, strict=True))) for side, rows in results.items()}
    print(f"\na model of {size:.2f} GB{'':6}{'wall, s':>9}{'CPU, s':>9}{'peak, GB':>10}{'written, GB':>13}")
    for side, row in medians.items():
        print(f"{side:25}{row.wall_seconds:>9.1f}{row.cpu_seconds:>9.1f}{row.peak_gb:>10.2f}{row.written_gb:>13.2f}")
    print(f"loading ours adds {added_gb:.2f} GB of resident memory at its peak: {added_gb / size:.2f} of the model")
    if len(medians) == len(SIDES):
        ours, peer = medians["ours"], medians["litgpt"]
        print(
            f"ours against litgpt: {peer.wall_seconds / ours.wall_seconds:.2f}x faster, "
            f"{peer.cpu_seconds / ours.cpu_seconds:.2f}x less CPU, {ours.peak_gb / peer.peak_gb:.2f} of its peak memory"
        )


WORKERS: dict[str, Callable[..., None]] = {
    "write_model": write_model,
    "load_ours": load_ours,
    "load_litgpt": load_litgpt,
    "measure_added": measure_added,
}

if __name__ == "__main__":
    main()
