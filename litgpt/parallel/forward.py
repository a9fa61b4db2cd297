"""The forward pass of a model that is split over ranks, for generation: logits are the same on all ranks.

Axes: T tokens, R rows of logits, V vocabulary.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from litgpt.model.attention import KVCache
from litgpt.model.attention_inputs import AttentionInputs
from litgpt.model.gpt import GPT, Head
from litgpt.parallel.pipeline import Pipeline, Stage


def run_stage(stage: Stage | GPT, ids_BT: Tensor, inputs: AttentionInputs, head: Head, cache: KVCache) -> Tensor:
    """Run a stage of a pipeline, or a whole model."""
    return stage(ids_BT, inputs=inputs, head=head, cache=cache)


def run_split_model(model: GPT, ids_BT: Tensor, *, inputs: AttentionInputs, head: Head, cache: KVCache) -> Tensor:
    """Logits (R, V) of a model with tensor or pipeline parallelism; all ranks call this together.

    Args:
        ids_BT: the same on all ranks, as `inputs`.
        head: computes logits (R, V), of this rank's shard of the vocabulary.
    """
    pipeline: Pipeline | None = getattr(model, "pipeline", None)
    tokens = getattr(model, "local_tokens", None)
    run = partial(run_stage, ids_BT=ids_BT, inputs=inputs, head=head, cache=cache)
    logits_RV = run(model) if pipeline is None else pipeline.evaluate(ids_BT.shape, run)
    if logits_RV is not None and tokens is not None and tokens.vocabulary is not None:
        logits_RV = tokens.vocabulary.gather_logits(logits_RV)
    return logits_RV if pipeline is None else broadcast_logits(pipeline, logits_RV, ids_BT.device)


def broadcast_logits(pipeline: Pipeline, logits_RV: Tensor | None, device: torch.device) -> Tensor:
    """The logits that the last stage has computed."""
    pipeline.wait_sends()
    source, dtype = pipeline.owners[-1], pipeline.dtype
    shape = torch.tensor([0, 0] if logits_RV is None else logits_RV.shape, device=device)
    dist.broadcast(shape, group=pipeline.group, group_src=source)
    if logits_RV is None:
        logits_RV = torch.empty(shape.tolist(), dtype=dtype, device=device)
    logits_RV = logits_RV.to(dtype).contiguous()
    dist.broadcast(logits_RV, group=pipeline.group, group_src=source)
    return logits_RV
