"""`litgpt generate_tp` and `generate_sequentially`: the texts of a model that is split over devices."""

import os
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from litgpt.api import LLM
from litgpt.errors import UserError
from litgpt.generation import load_llm, write_texts
from litgpt.infer.engine import Engine
from litgpt.infer.kept_engine import KeptEngine
from litgpt.infer.load import WEIGHT_DTYPES, convert_model, select_dtype
from litgpt.messages import print_message
from litgpt.parallel.apply import split_model
from litgpt.parallel.forward import run_split_model
from litgpt.parallel.heartbeat import report_lost_ranks
from litgpt.parallel.model_sizes import check_tensor_sizes
from litgpt.parallel.precision import Precision
from litgpt.parallel.processes import count_processes, start_processes
from litgpt.parallel.strategy import MeshStrategy, exit_process, is_rank_zero
from litgpt.recipe.generate import GenerateSplit
from litgpt.recipe.parallel import ParallelArgs


def run(recipe: GenerateSplit) -> None:
    """Start the processes, which generate the same samples together; the first one writes them."""
    with report_lost_ranks(), ExitStack() as stack:
        if not is_rank_zero():
            recipe = replace(recipe, output=None)
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        write_texts(recipe, partial(load_split, recipe))
    exit_process(0)


def load_split(recipe: GenerateSplit) -> LLM:
    """Start the processes, and load each one's part of the model."""
    if (devices := count_processes(recipe.devices)) == 1:
        return load_llm(recipe.checkpoint_dir, recipe)
    start = time.perf_counter()
    llm = LLM.load(recipe.checkpoint_dir, distribute=None)
    settings = recipe.lay_out(devices)
    check_split(recipe, llm, settings)
    fabric = start_processes(settings.resolve_dims(devices))
    mesh = cast(MeshStrategy, fabric.strategy).mesh
    assert mesh is not None
    wanted = WEIGHT_DTYPES[recipe.precision] if recipe.precision else select_dtype(fabric.device)
    dtype = wanted or llm.model.embedding.weight.dtype
    if settings.tensor > 1:  # whose parameters become DTensors, which cannot change their type
        convert_model(llm.model, torch.device("cpu"), dtype)
    split_model(llm.model, mesh, settings, Precision(dtype))
    llm.distribute(fabric.device.type, precision=recipe.precision, quantize=recipe.quantize)
    llm.kept_engine = KeptEngine(build=partial(Engine, forward=partial(run_split_model, llm.model)))
    print_message(f"Time to load the model: {time.perf_counter() - start:.2f} seconds.")
    return llm


def check_split(recipe: GenerateSplit, llm: LLM, settings: ParallelArgs) -> None:
    """Check that a model can be split over several devices.

    Raises:
        UserError: naming the setting that does not fit.
    """
    config, devices = llm.config, settings.tensor * settings.pipeline
    where = f"not supported with devices: {devices}"
    for kind, paths in recipe.media.items():
        raise UserError(f"{kind}: {paths[0]} is {where}; use litgpt generate")
    for key, is_set in (("split_sounds", recipe.split_sounds), ("video_sounds", recipe.video_sounds)):
        if is_set:
            raise UserError(f"{key}: true is {where}; set false")
    if recipe.compile:
        raise UserError(f"compile: true is {where}; set false")
    if settings.pipeline > (layers := config.n_layer):
        raise UserError(f"devices: {devices} is more than the model's {layers} layers; set {layers}")
    if settings.tensor == 1:
        return
    cure = "or use litgpt generate_sequentially"
    if recipe.quantize:
        raise UserError(f"quantize: {recipe.quantize} is {where} of generate_tp; set null, {cure}")
    if llm.adapted:
        raise UserError(
            f"checkpoint_dir: {llm.checkpoint_dir} has an adapter, which is {where} of generate_tp; merge it (litgpt "
            f"merge_lora), {cure}"
        )
    if config.n_expert:
        raise UserError(f"devices: {devices} is not supported by generate_tp for a model with experts; set 1, {cure}")
    check_tensor_sizes(config, devices, sequence=False, key="devices")
