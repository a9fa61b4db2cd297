"""Load the same published model folder with LitGPT, which converts it first, and with this package, in turn.

    python benchmarks/load.py --work /tmp/load-benchmark --rounds 3

Run it with the interpreter that this package is installed in; LitGPT gets an environment of its own in the work folder,
with the same torch. The model is a Llama of random weights in bfloat16, about 2 GB in one safetensors file, written
once. Prints for each side the median over the rounds of wall and CPU seconds and of the peak resident memory of its
processes, from the folder to the logits of a first token, in the type of the files (so that every weight was looked
at; with `--until loaded`, to the loaded model, which here is mapped into memory and read when it is used); what was
written to the disk; and the ratios. For this package also: how much resident memory was added, beside the size of the
model. Needs nothing but the standard library, pip, and a machine that does nothing else meanwhile.
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

from pretrain import environments, measured

SIDES = ("ours", "litgpt")
NAME = "tiny-llama-1.1b"  # the name of the folder, by which LitGPT knows the shape


class Result(NamedTuple):
    """What one way from a folder to a model in memory came to."""

    wall_seconds: float
    cpu_seconds: float
    peak_gb: float
    written_gb: float


def main() -> None:
    """Set the work folder up, run every side in turn, print the figures."""
    if len(sys.argv) > 1 and sys.argv[1] in WORKERS:
        WORKERS[sys.argv[1]](*sys.argv[2:])
        return
    options = read_options()
    work = options.work.resolve()
    pythons = environments(work, options.sides)
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
    show(results, size, added(pythons["ours"], source, work, options.threads))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, the model and results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="cores that each run may use")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--until", choices=("loaded", "logits"), default="logits", help="where a run ends")
    return parser.parse_args()


def run(command: list[object], work: Path, threads: int) -> tuple[float, float, float]:
    """Run a command on some cores: wall seconds, CPU seconds, peak resident memory in GB."""
    return measured([str(word) for word in command], work / "log.txt", threads)


def run_side(side: str, python: Path, source: Path, work: Path, threads: int, until: str) -> Result:
    """One way from a fresh copy of the folder to a model in memory; the copy is not counted."""
    folder = work / "runs" / side / NAME
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    before = bytes_in(folder)
    steps: list[list[object]] = [[python, __file__, f"load_{side}", folder, until]]
    if side == "litgpt":
        steps.insert(0, [python.with_name("litgpt"), "convert_to_litgpt", folder])
    walls, cpus, peaks = zip(*(run(step, work, threads) for step in steps), strict=True)
    written = (bytes_in(folder) - before) / 1e9
    shutil.rmtree(folder)
    return Result(round(sum(walls), 2), round(sum(cpus), 2), round(max(peaks), 3), round(written, 3))


def bytes_in(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def added(python: Path, source: Path, work: Path, threads: int) -> float:
    """The resident memory in GB that loading adds to a process that has imported all it needs."""
    run([python, __file__, "measure_added", source], work, threads)
    return float((work / "log.txt").read_text().split()[-1])


def write_model(folder: str) -> None:
    """Write a model folder of random weights, as transformers names them."""
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
    """Load a published folder as it stands."""
    model = open_ours(folder)
    if until == "logits":
        first_logits(model)


def first_logits(model: Callable[..., object]) -> None:
    """Look at every weight once."""
    import torch

    with torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.int64))


def open_ours(folder: str) -> Callable[..., object]:
    """Our model of a published folder, in the type of its files."""
    import torch

    from litgpt.infer.load import open_model

    return open_model(Path(folder), device=torch.device("cpu"))


def load_litgpt(folder: str, until: str) -> None:
    """Load a converted folder as LitGPT's commands do on a CPU: a model, then its file."""
    import torch

    from litgpt import GPT, Config

    torch.set_default_dtype(torch.bfloat16)
    model = GPT(Config.from_file(Path(folder) / "model_config.yaml"))
    state = torch.load(Path(folder) / "lit_model.pth", weights_only=True, mmap=True)
    model.load_state_dict(state.get("model", state))
    if until == "logits":
        first_logits(model)


def measure_added(folder: str) -> None:
    """Print the GB of resident memory that loading, and looking at every weight, adds at its peak."""
    import torch

    import litgpt.infer.load  # noqa: F401 - imported before the measure begins

    torch.ones(2) @ torch.ones(2)
    before, highest, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = open_ours(folder)
    first_logits(model)
    done.set()
    watcher.join()
    print(max(highest[0], resident()) - before)


def resident() -> float:
    """The resident memory of this process now, in GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e9


def show(results: dict[str, list[Result]], size: float, more: float) -> None:
    """Print the medians, and how often better ours is."""
    medians = {side: Result(*map(statistics.median, zip(*rows, strict=True))) for side, rows in results.items()}
    print(f"\na model of {size:.2f} GB{'':6}{'wall, s':>9}{'CPU, s':>9}{'peak, GB':>10}{'written, GB':>13}")
    for side, row in medians.items():
        print(f"{side:25}{row.wall_seconds:>9.1f}{row.cpu_seconds:>9.1f}{row.peak_gb:>10.2f}{row.written_gb:>13.2f}")
    print(f"loading ours adds {more:.2f} GB of resident memory at its peak: {more / size:.2f} of the model")
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
