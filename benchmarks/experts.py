"""Compare forward and backward of one MoE block: LitGPT's, transformers' and this package's, and its products alone.

    python benchmarks/experts.py --work /tmp/pretrain-benchmark --rounds 5

The block has 32 experts with top-4 routing, for 4,096 tokens, in several sizes. All sides get the same weights and
tokens, and their outputs and gradients are compared: LitGPT's loop over experts, and transformers' implementations that
run on any device (`eager` is a loop over experts). `products` are only the matrix products of the block, on inputs that
are ready: three of each projection (output, gradient of the input, gradient of the weights), grouped by expert, and
three of the router in float32; they take turns with this package's block in one process, since their ratio is small
beside what a busy machine adds to a process. Run it with the interpreter that this package is installed in; the peers
get their own environments in the work folder, which is shared with `pretrain.py`. Prints the median and the least wall
and CPU seconds of a pass for each size and side, relative to this package, the ratio of block and products, and the
load of the machine. Wall seconds require an idle machine; CPU seconds (preferably with `--threads 1`) are less
sensitive.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pretrain import SIDES, create_environments

EXPERTS, CHOSEN, TOKENS = 32, 4, 4096
SIZES = ((64, 32), (128, 32), (256, 64), (512, 256), (1024, 512))  # model width and inner width of an expert
DTYPES = {"float32": 4, "bfloat16": 2}  # bytes of a value


def main() -> None:
    """Time every side and size in turn, and print the results."""
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
        return
    options = read_options()
    pythons = create_environments(options.work.resolve(), list(SIDES))
    for dtype in options.dtypes:
        for width, inner in options.sizes:
            compare_size(pythons, width, inner, dtype, options)


def compare_size(pythons: dict[str, Path], width: int, inner: int, dtype: str, options: argparse.Namespace) -> None:
    """Time all sides in turn for one size and type, and print the results."""
    copied = 2 * 3 * inner * width * TOKENS * CHOSEN * DTYPES[dtype] / 1e9  # expert weights of each row, and gradients
    processes = [sides for sides in PROCESSES if sides != ("batched_mm",) or copied <= options.memory]
    if len(processes) < len(PROCESSES):
        print(f"width {width}, inner {inner}, {dtype}: batched_mm is left out; it copies {copied:.0f} GB of weights")
    rounds_by_side: dict[str, list[dict[str, Any]]] = {side: [] for sides in processes for side in sides}
    for _ in range(options.rounds):
        for sides in processes:
            python = pythons[ENVIRONMENTS.get(sides[0], sides[0])]
            for side, result in run_sides(python, sides, width, inner, dtype, options).items():
                rounds_by_side[side].append(result)
    compare_norms({side: rounds[-1] for side, rounds in rounds_by_side.items() if "output" in rounds[-1]})
    for clock in ("wall", "cpu"):
        for name, reduce in (("median", statistics.median), ("min", min)):
            print_results(
                f"width {width}, inner {inner}, {dtype}, load {os.getloadavg()[0]:.1f}, {name} {clock}",
                {side: reduce(result[clock][name] for result in rounds) for side, rounds in rounds_by_side.items()},
            )


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments")
    parser.add_argument("--rounds", type=int, default=3, help="processes per side, alternating between sides")
    parser.add_argument(
        "--repeats", type=int, default=15, help="timed passes of a side per process, after one warmup pass"
    )
    parser.add_argument("--threads", type=int, default=2, help="cores that each process may use")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    parser.add_argument("--memory", type=float, default=8, help="GB that copies of weights by batched_mm may take")
    parser.add_argument(
        "--sizes", nargs="+", type=parse_size, default=SIZES, help="model x expert width, such as 512x256"
    )
    return parser.parse_args()


def parse_size(text: str) -> tuple[int, int]:
    """Parse a size such as `512x256`."""
    width, inner = text.split("x")
    return int(width), int(inner)


def run_sides(
    python: Path, sides: Sequence[str], width: int, inner: int, dtype: str, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Measure sides, which take turns, in a new process, which ignores PYTHONPATH."""
    command = [python, "-E", __file__, "measure", ",".join(sides), width, inner, options.repeats, options.device, dtype]
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        [str(word) for word in command], check=True, text=True, stdout=subprocess.PIPE, env={**os.environ, **threads}
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare_norms(sums: dict[str, dict[str, Any]]) -> None:
    """Check that the norms of outputs and gradients agree between all sides."""
    for key in ("output", "input", "router", "experts"):
        expected = sums["ours"][key]
        for side, norms in sums.items():
            assert abs(norms[key] - expected) <= 2e-2 * abs(expected), f"{side} {key}: {norms[key]}, ours {expected}"


def print_results(label: str, seconds: dict[str, float]) -> None:
    """Print one line of results."""
    ours = seconds["ours"]
    ratios = ", ".join(f"{side} {time / ours:.2f}x" for side, time in seconds.items() if side != "ours")
    times = ", ".join(f"{side} {time:.3f} s" for side, time in seconds.items())
    print(
        f"{label}: {times}; relative to ours: {ratios}; block / products {ours / seconds['products']:.2f}", flush=True
    )


def measure(sides: str, width: str, inner: str, repeats: str, device: str, dtype: str) -> None:
    """Time the blocks of sides in turn, and print times and norms of output and gradients of each as JSON."""
    import torch

    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return tensor.to(device, getattr(torch, dtype))

    model, hidden = int(width), int(inner)
    weights = [draw(EXPERTS, model), *(draw(EXPERTS, hidden, model) for _ in "gu"), draw(EXPERTS, model, hidden)]
    x, grad_output = draw(1, TOKENS, model) * model**0.5, draw(1, TOKENS, model)
    blocks = {side: BLOCKS[side](model, hidden, *weights) for side in sides.split(",")}
    clocks = {side: {"wall": [], "cpu": []} for side in blocks}
    norms = {}
    for _ in range(int(repeats) + 1):
        for side, (block, parameters) in blocks.items():
            wall, cpu, norms[side] = run_pass(block, x, grad_output, parameters, device)
            clocks[side]["wall"].append(wall)
            clocks[side]["cpu"].append(cpu)
    times = {
        side: {name: {"median": statistics.median(spent[1:]), "min": min(spent[1:])} for name, spent in clock.items()}
        for side, clock in clocks.items()
    }
    print(json.dumps({side: times[side] | norms[side] for side in blocks}))


def run_pass(
    block: Any, x: Any, grad_output: Any, parameters: list[Any], device: str
) -> tuple[float, float, dict[str, float]]:
    """Wall and CPU seconds of forward and backward, and norms of output and gradients, if there are any."""
    x = x.detach().requires_grad_()
    for parameter in parameters:
        parameter.grad = None
    wall, cpu = read_clock(device), time.process_time()
    y = block(x)
    if y.requires_grad:
        y.backward(grad_output)
    wall, cpu = read_clock(device) - wall, time.process_time() - cpu
    if x.grad is None:
        return wall, cpu, {}
    inputs = {"output": y.detach(), "input": x.grad, "router": parameters[0].grad}
    norms = {key: tensor.float().norm().item() for key, tensor in inputs.items()}
    norms["experts"] = sum(parameter.grad.float().square().sum().item() for parameter in parameters[1:]) ** 0.5
    return wall, cpu, norms


def read_clock(device: str) -> float:
    """Return the time after all work on the device has finished."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def build_ours(model: int, hidden: int, router: Any, gate: Any, up: Any, down: Any) -> tuple[Any, list[Any]]:
    """Build the block of this package; return it and its parameters, with the router first."""
    from litgpt.host_allocator import keep_freed_memory
    from litgpt.model.config import Config
    from litgpt.model.moe import MoE

    keep_freed_memory()  # as a training run does
    block = MoE(Config(**config_fields(model, hidden))).to(router)
    state = {"router.weight": router, "experts.gate": gate, "experts.up": up, "experts.down": down}
    block.load_state_dict(state)
    return block, list(block.parameters())


def build_litgpt(model: int, hidden: int, router: Any, gate: Any, up: Any, down: Any) -> tuple[Any, list[Any]]:
    """Build the block of LitGPT."""
    import litgpt.model as peer
    from litgpt.config import Config

    block = peer.LLaMAMoE(Config(**config_fields(model, hidden))).to(router)
    state = {"gate.weight": router}
    for name, stack in (("fc_1", gate), ("fc_2", up), ("proj", down)):
        state |= {f"experts.{number}.{name}.weight": weight for number, weight in enumerate(stack)}
    block.load_state_dict(state)
    return block, list(block.parameters())


def build_transformers(
    model: int, hidden: int, router: Any, gate: Any, up: Any, down: Any, *, implementation: str
) -> tuple[Any, list[Any]]:
    """Build the Mixtral block of transformers with one of its implementations of experts."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=model, intermediate_size=hidden, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN,
        experts_implementation=implementation,
    )  # fmt: skip
    assert config._experts_implementation == implementation
    block = MixtralSparseMoeBlock(config).to(router)
    fused = torch.cat([gate, up], dim=1)
    block.load_state_dict({"gate.weight": router, "experts.gate_up_proj": fused, "experts.down_proj": down})
    return block, list(block.parameters())


def build_products(model: int, hidden: int, router: Any, gate: Any, up: Any, down: Any) -> tuple[Any, list[Any]]:
    """Build a function of the matrix products of a block, forward and backward, for tokens that are spread evenly."""
    import torch
    import torch.nn.functional as F

    rows = TOKENS * CHOSEN
    ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32, device=router.device) * (rows // EXPERTS)
    wide, narrow = router.new_ones(rows, model), router.new_ones(rows, hidden)
    tokens, logits = (torch.ones(TOKENS, size, device=router.device) for size in (model, EXPERTS))
    scores = router.float()

    @torch.no_grad()
    def multiply(_x: Any) -> Any:
        logits @ scores, tokens @ scores.T, logits.T @ tokens
        for weight, x, grad in ((gate, wide, narrow), (up, wide, narrow), (down, narrow, wide)):
            F.grouped_mm(x, weight.mT, offs=ends)
            F.grouped_mm(grad, weight, offs=ends)
            y = F.grouped_mm(grad.mT, x, offs=ends)
        return y

    return multiply, []


def config_fields(model: int, hidden: int) -> dict[str, Any]:
    """Return the config fields of the block, which both packages share."""
    return {
        "n_layer": 1, "n_embd": model, "n_head": 4, "bias": False, "mlp_class_name": "LLaMAMoE",
        "intermediate_size": hidden, "moe_intermediate_size": hidden, "n_expert": EXPERTS, "n_expert_per_token": CHOSEN,
    }  # fmt: skip


BLOCKS: dict[str, Callable[..., tuple[Any, list[Any]]]] = {
    "ours": build_ours,
    "products": build_products,
    "litgpt": build_litgpt,
    **{kind: partial(build_transformers, implementation=kind) for kind in ("eager", "grouped_mm", "batched_mm")},
}
PROCESSES = (("ours", "products"), *((side,) for side in BLOCKS if side not in ("ours", "products")))
"""The sides that share a process."""
ENVIRONMENTS = {
    **dict.fromkeys(("eager", "grouped_mm", "batched_mm"), "transformers"),
}

if __name__ == "__main__":
    main()
