"""Compare generation, also compiled, with LitGPT, transformers (also its continuous batching) and llama.cpp.

    python benchmarks/decode.py --work /tmp/pretrain-benchmark --model SmolLM2-135M-Instruct --rounds 1

The model is a Hugging Face folder. All sides generate greedily after the same prompts, of random tokens. The time of
one token is that of the prompts (prefill); the additional time of more tokens is that of decoding. Run it with the
interpreter that this package is installed in; the peers get their own environments in the work folder, which is shared
with `pretrain.py`. llama.cpp's Python package is compiled on installation, which takes minutes, has no batches, and
reads a GGUF file that this package writes. Prints tokens per second for each side, the ratio to this package, and the
share of the memory's bandwidth that reading the weights once a step takes. Requires an idle machine.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pretrain

SIDES = ("ours", "compiled", "litgpt", "transformers", "continuous", "llama_cpp")
ENVIRONMENTS = {"compiled": "ours", "continuous": "transformers"}
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "q8_0"}  # and the type of the GGUF file
WEIGHT_ONLY = {  # the sides that have it on a CPU
    "int8": ("ours", "compiled", "transformers", "llama_cpp"),
    "int4": ("ours", "compiled"),
}
Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[list[int]]]


def main() -> None:
    """Run all sides in turn, and print the results."""
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])
        return
    options = read_options()
    work = options.work.resolve()
    pretrain.PACKAGES["llama_cpp"] = ("llama-cpp-python",)
    pretrain.PACKAGES["transformers"] += ("torchao",)
    pythons = pretrain.create_environments(work, [ENVIRONMENTS.get(side, side) for side in options.sides])
    limit = measure_read_bandwidth(options.threads)
    for dtype in options.dtypes:
        results: dict[str, dict[str, dict[str, float]]] = {}
        for _ in range(options.rounds):
            for side in options.sides:
                if side not in WEIGHT_ONLY.get(dtype, SIDES):
                    continue
                python = pythons[ENVIRONMENTS.get(side, side)]
                for case, speeds in run_side(python, side, dtype, work, options).items():
                    best = results.setdefault(case, {}).setdefault(side, speeds)
                    results[case][side] = {key: max(best[key], speed) for key, speed in speeds.items()}
        for case, sides in results.items():
            print_case(f"{dtype}, {case}", sides, limit, count_bytes(options.model, dtype))


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments and copies of the model")
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder with a LitGPT name")
    parser.add_argument("--rounds", type=int, default=1, help="processes per side, alternating between sides")
    parser.add_argument("--threads", type=int, default=2, help="cores that each process may use")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate after each prompt")
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 8, 32))
    parser.add_argument("--prompts", nargs="+", type=int, default=(32, 1024), help="lengths of the prompts")
    parser.add_argument("--dtypes", nargs="+", choices=(*DTYPES, "int4"), default=("float32", "bfloat16"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    return parser.parse_args()


def run_side(
    python: Path, side: str, dtype: str, work: Path, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Measure one side in a new process: tokens per second of prefill and decoding, by case."""
    folder = prepare_model(side, dtype, python, work, options.model.resolve())
    cases = [f"{batch}x{length}" for length in options.prompts for batch in options.batches]
    command = [python, __file__, "measure", side, dtype, folder, options.threads, options.tokens, *cases]
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        [str(word) for word in command], check=True, text=True, stdout=subprocess.PIPE, env={**os.environ, **threads}
    )
    return json.loads(done.stdout.splitlines()[-1])


def prepare_model(side: str, dtype: str, python: Path, work: Path, model: Path) -> Path:
    """The folder or file that a side reads."""
    if side == "litgpt":
        folder = work / "litgpt-model" / model.name
        if not folder.exists():
            shutil.copytree(model, folder)
            subprocess.run([python.with_name("litgpt"), "convert_to_litgpt", folder], check=True)
        return folder
    if side == "llama_cpp":
        folder = work / "gguf" / dtype
        if not folder.exists():
            command = [sys.executable, "-m", "litgpt", "convert_from_litgpt", model, folder, "--format", "gguf"]
            subprocess.run([*command, "--dtype", DTYPES[dtype]], check=True)
        return next(folder.glob("*.gguf"))
    return model


def measure_read_bandwidth(threads: int) -> float:
    """The rate at which this machine reads memory, in GB/s."""
    import limit
    import torch

    values = torch.ones(256, 1024, 1024)
    return values.nbytes / 1e9 / limit.measure_seconds(values.sum, threads)


def count_bytes(model: Path, dtype: str) -> float:
    """The size of the weights in this type, in GB."""
    from safetensors import safe_open

    elements = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            elements += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.offset_keys())
    return elements / 1e9 * {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.56}[dtype]


def print_case(label: str, sides: dict[str, dict[str, float]], limit: float, size: float) -> None:
    """Print tokens per second of every side for one type, batch and length of prompts."""
    batch = int(label.split(", ")[1].split("x")[0])
    for phase in ("prefill", "decode"):
        ours = sides["ours"][phase]
        ratios = [f"{side} {speeds[phase]:.1f} ({ours / speeds[phase]:.2f}x)" for side, speeds in sides.items()]
        print(f"{label}, {phase}, tokens/s (ours is faster by): {', '.join(ratios)}", flush=True)
    share = sides["ours"]["decode"] / batch * size / limit
    print(f"{label}: reading the weights once a step takes {share:.0%} of {limit:.1f} GB/s", flush=True)


def measure(side: str, dtype: str, folder: str, threads: str, tokens: str, *cases: str) -> None:
    """Time one side for every case, and print tokens per second as JSON."""
    import torch

    torch.set_num_threads(int(threads))
    generate = BUILDERS[side](Path(folder), dtype)
    speeds = {}
    generate([[5, 6, 7]], 2)
    for case in cases:
        batch, length = map(int, case.split("x"))
        prompts = torch.randint(100, 40_000, (batch, length), generator=torch.Generator().manual_seed(length)).tolist()
        seconds: dict[int, float] = {}
        for _ in range(2):  # kernels are prepared in the first
            for count in (1, 1 + int(tokens)):
                for prompt in prompts:
                    prompt[0] += 1  # no side may use what it has computed before
                start = time.perf_counter()
                texts = generate(prompts, count)
                seconds[count] = min(seconds.get(count, float("inf")), time.perf_counter() - start)
                assert [len(text) for text in texts] == [count] * batch
        first, total = seconds.values()
        speeds[case] = {"prefill": batch * length / first, "decode": batch * int(tokens) / (total - first)}
    print(json.dumps(speeds))


def find_dtype(name: str) -> Any:
    """The dtype of the values; weights in 8 and 4 bits are multiplied with bfloat16."""
    import torch

    return torch.bfloat16 if name in WEIGHT_ONLY else getattr(torch, name)


def build_ours(folder: Path, dtype: str, *, compile: bool = False) -> Generate:
    """The engine of this package."""
    import torch

    from litgpt.adapt.quantization import quantize_for_inference
    from litgpt.infer.engine import Engine
    from litgpt.infer.load import open_model
    from litgpt.infer.requests import Request
    from litgpt.infer.sampling import Sampling

    model = open_model(folder, device=torch.device("cpu"), dtype=find_dtype(dtype))
    if dtype in WEIGHT_ONLY:
        quantize_for_inference(model, dtype, torch.device("cpu"))
    engine = Engine(model, compile=compile)

    def generate(prompts: Prompts, count: int) -> list[list[int]]:
        sequences = engine.run([Request(tuple(prompt), count, Sampling(temperature=0)) for prompt in prompts])
        return [[token.token for token in sequence.tokens] for sequence in sequences]

    return generate


def build_litgpt(folder: Path, dtype: str) -> Generate:
    """LitGPT's batched generation, for prompts of equal length."""
    import torch
    from litgpt.generate.base import batched_generate_fn

    from litgpt import GPT, Config  # type: ignore[attr-defined]

    model = GPT(Config.from_file(folder / "model_config.yaml")).to(getattr(torch, dtype)).eval()
    model.load_state_dict(torch.load(folder / "lit_model.pth", mmap=True, weights_only=True))

    @torch.inference_mode()
    def generate(prompts: Prompts, count: int) -> list[list[int]]:
        total = len(prompts[0]) + count
        model.max_seq_length = total
        model.set_kv_cache(batch_size=len(prompts), dtype=getattr(torch, dtype))
        settings: dict[str, Any] = {"sample_args": {"temperature": 0.0}, "include_prompt": False, "include_eos": False}
        steps = list(batched_generate_fn(model, torch.tensor(prompts), total, **settings))
        return [[int(step[row]) for step in steps] for row in range(len(prompts))]

    return generate


def build_transformers(folder: Path, dtype: str) -> Generate:
    """`model.generate` of transformers."""
    import torch
    import transformers

    settings: dict[str, Any] = {"dtype": find_dtype(dtype)}
    if dtype == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        settings["quantization_config"] = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()

    def generate(prompts: Prompts, count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        limits: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **limits)
        return output[:, ids.shape[1] :].tolist()

    return generate


def build_continuous(folder: Path, dtype: str) -> Generate:
    """Continuous batching of transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="paged|sdpa"
    ).eval()

    def generate(prompts: Prompts, count: int) -> list[list[int]]:
        config = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
        outputs = model.generate_batch(prompts, config)
        return [output.generated_tokens for output in outputs.values()]

    return generate


def build_llama_cpp(file: Path, _dtype: str) -> Generate:
    """llama.cpp, one text after the other, in the type of the file."""
    import torch
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(str(file), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompts: Prompts, count: int) -> list[list[int]]:
        texts = []
        for prompt in prompts:
            model.reset()
            tokens = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
            texts.append([next(tokens) for _ in range(count)])
        return texts

    return generate


BUILDERS: dict[str, Callable[[Path, str], Generate]] = {
    "ours": build_ours,
    "compiled": partial(build_ours, compile=True),
    "litgpt": build_litgpt,
    "transformers": build_transformers,
    "continuous": build_continuous,
    "llama_cpp": build_llama_cpp,
}

if __name__ == "__main__":
    main()
