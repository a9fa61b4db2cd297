"""Forward and backward of one MoE block: LitGPT's loop over experts, transformers' eager loop, and this package.

    python benchmarks/experts.py --work /tmp/pretrain-benchmark --rounds 5

32 experts, 4 of them for each of 4,096 tokens, in several sizes. All sides get the same weights and tokens, and must
come to the same output and gradients before their times count. Run it with the interpreter that this package is
installed in; the peers get environments of their own in the work folder, which `pretrain.py` shares. Prints, for each
size, the median wall and CPU seconds of a pass of each side, and how many times as long as this package the others
take. Wall seconds need a machine that does nothing else meanwhile; CPU seconds (best with `--threads 1`) less so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pretrain import SIDES, environments

EXPERTS, CHOSEN, TOKENS = 32, 4, 4096
SIZES = ((64, 32), (128, 32), (256, 64), (512, 256), (1024, 512))  # model width and inner width of an expert


def main() -> None:
    """Time every side and size in turn and print the figures."""
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
        return
    options = read_options()
    pythons = environments(options.work.resolve(), list(SIDES))
    for width, inner in options.sizes:
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                found[side].append(run(pythons[side], side, width, inner, options))
        check({side: rounds[-1] for side, rounds in found.items()})
        for clock in ("wall", "cpu"):
            show(
                f"width {width}, inner {inner}, {clock}",
                {side: statistics.median(one[clock] for one in rounds) for side, rounds in found.items()},
            )


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side, one side after the other")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of a process, after one that is not")
    parser.add_argument("--threads", type=int, default=2, help="cores that each process may use")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--sizes", nargs="+", type=size, default=SIZES, help="such as 512x256: model x inner width")
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    """Two widths out of `512x256`."""
    width, inner = text.split("x")
    return int(width), int(inner)


def run(python: Path, side: str, width: int, inner: int, options: argparse.Namespace) -> dict[str, float]:
    """What one process of one side measures."""
    command = [python, __file__, "measure", side, width, inner, options.repeats, options.device, options.dtype]
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        [str(word) for word in command], check=True, text=True, stdout=subprocess.PIPE, env={**os.environ, **threads}
    )
    return json.loads(done.stdout.splitlines()[-1])


def check(sums: dict[str, dict[str, float]]) -> None:
    """Hold the norms of outputs and gradients of all sides against each other."""
    for key in ("output", "input", "router", "experts"):
        wanted = sums["ours"][key]
        for side, found in sums.items():
            assert abs(found[key] - wanted) <= 2e-2 * abs(wanted), f"{side} {key}: {found[key]}, ours {wanted}"


def show(what: str, seconds: dict[str, float]) -> None:
    """One line of figures."""
    ours = seconds["ours"]
    ratios = ", ".join(f"{side} {time / ours:.2f}x" for side, time in seconds.items() if side != "ours")
    times = ", ".join(f"{side} {time:.3f} s" for side, time in seconds.items())
    print(f"{what}: {times}; as long as ours: {ratios}", flush=True)


def measure(side: str, width: str, inner: str, repeats: str, device: str, dtype: str) -> None:
    """Time one side's block, and print that and what its output and gradients come to, as JSON."""
    import torch

    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return tensor.to(device, getattr(torch, dtype))

    model, hidden = int(width), int(inner)
    weights = [drawn(EXPERTS, model), *(drawn(EXPERTS, hidden, model) for _ in "gu"), drawn(EXPERTS, model, hidden)]
    x = (drawn(1, TOKENS, model) * model**0.5).requires_grad_()
    slope = drawn(1, TOKENS, model)
    block, parameters = BLOCKS[side](model, hidden, *weights)
    walls, cpus = [], []
    for _ in range(int(repeats) + 1):
        for parameter in (x, *parameters):
            parameter.grad = None
        wall, cpu = now(device), time.process_time()
        y = block(x)
        y.backward(slope)
        walls.append(now(device) - wall)
        cpus.append(time.process_time() - cpu)
    assert x.grad is not None
    inputs = {"output": y.detach(), "input": x.grad, "router": parameters[0].grad}
    norms = {key: tensor.float().norm().item() for key, tensor in inputs.items()}
    norms["experts"] = sum(parameter.grad.float().square().sum().item() for parameter in parameters[1:]) ** 0.5
    print(json.dumps({"wall": statistics.median(walls[1:]), "cpu": statistics.median(cpus[1:]), **norms}))


def now(device: str) -> float:
    """The clock once the device has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def ours(model: int, hidden: int, router: Any, gate: Any, up: Any, down: Any) -> tuple[Any, list[Any]]:
    """This package's block, and its parameters, the router's first."""
    from litgpt.model.config import Config
    from litgpt.model.moe import MoE

    block = MoE(Config(**shape(model, hidden))).to(router)
    given = {"router.weight": router, "experts.gate": gate, "experts.up": up, "experts.down": down}
    block.load_state_dict(given)
    return block, list(block.parameters())


def litgpt(model: int, hidden: int, router: Any, gate: Any, up: Any, down: Any) -> tuple[Any, list[Any]]:
    """LitGPT's block."""
    import litgpt.model as peer
    from litgpt.config import Config

    block = peer.LLaMAMoE(Config(**shape(model, hidden))).to(router)
    given = {"gate.weight": router}
    for name, stack in (("fc_1", gate), ("fc_2", up), ("proj", down)):
        given |= {f"experts.{number}.{name}.weight": one for number, one in enumerate(stack)}
    block.load_state_dict(given)
    return block, list(block.parameters())


def transformers(model: int, hidden: int, router: Any, gate: Any, up: Any, down: Any) -> tuple[Any, list[Any]]:
    """transformers' block of Mixtral with its eager loop."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=model, intermediate_size=hidden, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN,
        experts_implementation="eager",
    )  # fmt: skip
    assert config._experts_implementation == "eager"
    block = MixtralSparseMoeBlock(config).to(router)
    fused = torch.cat([gate, up], dim=1)
    block.load_state_dict({"gate.weight": router, "experts.gate_up_proj": fused, "experts.down_proj": down})
    return block, list(block.parameters())


def shape(model: int, hidden: int) -> dict[str, Any]:
    """The settings of a shape, which both packages call alike."""
    return {
        "n_layer": 1, "n_embd": model, "n_head": 4, "bias": False, "mlp_class_name": "LLaMAMoE",
        "intermediate_size": hidden, "moe_intermediate_size": hidden, "n_expert": EXPERTS, "n_expert_per_token": CHOSEN,
    }  # fmt: skip


BLOCKS = {"ours": ours, "litgpt": litgpt, "transformers": transformers}

if __name__ == "__main__":
    main()
