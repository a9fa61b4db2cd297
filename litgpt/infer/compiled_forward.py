"""The forward pass of generation as one compiled graph, with the cache and attention to it outside of the graph.

Embedding, norms and products are compiled by `torch.compile`, which freezes the weights on a CPU: it reorders
them for oneDNN. An operator stands in the graph for the attention of each layer, and runs as without compilation:
which tokens are there to attend to changes with every pass, and the graph would be compiled again for each.

Axes: B batch (1), H heads, K key-value heads, T tokens, S head size, D model width.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt.errors import UserError
from litgpt.infer.onednn import has_half_matrices, without_onednn
from litgpt.model.attention import CachedAttention, KVCache
from litgpt.model.attention_inputs import AttentionInputs
from litgpt.model.gpt import GPT, Head


class AttentionPass(NamedTuple):
    """What the attention of all layers needs in a forward pass besides queries, keys and values."""

    modules: Sequence[CachedAttention]
    inputs: AttentionInputs
    cache: KVCache


current_pass: ContextVar[AttentionPass] = ContextVar("current_pass")
library = torch.library.Library("litgpt", "DEF")
library.define("attend_cached(Tensor q, Tensor k, Tensor v, int layer, int value_size) -> Tensor")


def run_attention(q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, layer: int, _value_size: int) -> Tensor:
    """Append to the cache of the current pass and attend to it, (B, H, T, S of the values)."""
    modules, inputs, cache = current_pass.get()
    return modules[layer].attend_cached(q_BHTS, k_BKTS, v_BKTS, inputs, cache.layers[layer]).contiguous()


def describe_attention(q_BHTS: Tensor, _k: Tensor, _v: Tensor, _layer: int, value_size: int) -> Tensor:
    """The shape and type of the output of `run_attention`."""
    return q_BHTS.new_empty(*q_BHTS.shape[:3], value_size)


library.impl("attend_cached", run_attention, "CompositeExplicitAutograd")
torch.library.register_fake("litgpt::attend_cached", describe_attention, lib=library)


class GraphLayer:
    """Stands for the cache of one layer in the graph."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def attend(self, attention: CachedAttention, q: Tensor, k: Tensor, v: Tensor, _inputs: AttentionInputs) -> Tensor:
        """An operator of the graph, (B, H, T, S of the values)."""
        return torch.ops.litgpt.attend_cached(q, k, v, self.layer, attention.value_size)


class GraphCache:
    """Stands for the cache in the graph."""

    length = 0

    def __init__(self, layers: int) -> None:
        self.layers = [GraphLayer(layer) for layer in range(layers)]

    def advance(self, tokens: int) -> None:
        """Nothing to count."""


def keep_input_guards(guards: Sequence[Any]) -> list[bool]:
    """Which conditions of a graph are checked at each call: those on its inputs, but not the thousands on modules."""
    return [guard.guard_type in ("TENSOR_MATCH", "SHAPE_ENV") and not guard.is_global for guard in guards]


def keep_hidden(hidden_BTD: Tensor, *_: object) -> Tensor:
    """A head that ends the graph before the head."""
    return hidden_BTD


class CompiledForward:
    """Calls the blocks of a model as one compiled graph; for inference on one device.

    There is a graph for one token and one for several, and the first call of each compiles it, which takes half a
    minute for a small model on a CPU. The model must not change afterwards: its weights are part of the graph. One
    token in bfloat16 on a CPU is multiplied with the plain weights by torch's own kernel, as without compilation.
    """

    def __init__(self, model: GPT) -> None:
        import torch._inductor.config

        self.model = model
        self.modules = [block.attention for block in model.local_blocks[: model.config.n_layer]]
        self._cache: Any = GraphCache(model.config.n_layer)
        is_cpu = next(model.parameters()).device.type == "cpu"
        self._frozen = partial(torch._inductor.config.patch, {"freezing": is_cpu, "cpp.enable_concat_linear": is_cpu})
        self._has_half_rows = has_half_matrices(model)
        # conditions on modules are not checked, so nothing that is compiled for a module may be run for another one
        settings: dict[str, Any] = {"isolate_recompiles": True, "options": {"guard_filter_fn": keep_input_guards}}
        self._graph = torch.compile(self._run_blocks, dynamic=True, fullgraph=True, **settings)

    def __call__(
        self,
        ids_BT: Tensor,
        *,
        inputs: AttentionInputs,
        head: Head,
        cache: KVCache,
        hidden_BTD: Tensor | None = None,
    ) -> Any:
        """As the model: what `head` returns. Embeddings that are given, as those of images, run without compilation.

        Raises:
            UserError: if a part of the model cannot be compiled, or the machine has no compiler.
        """
        from torch._dynamo.exc import TorchDynamoException, Unsupported

        if hidden_BTD is not None:
            return self.model(ids_BT, inputs=inputs, head=head, cache=cache, hidden_BTD=hidden_BTD)
        token = current_pass.set(AttentionPass(self.modules, inputs, cache))
        try:
            with without_onednn() if self._has_half_rows and ids_BT.numel() == 1 else self._frozen():
                output_BTD = self._graph(ids_BT, inputs.positions, inputs.angles, inputs.temperature)
        except TorchDynamoException as error:
            why = "supported for this model" if isinstance(error, Unsupported) else "possible on this machine"
            raise UserError(f"compile: true is not {why} ({str(error).splitlines()[0]}); set compile: false") from error
        finally:
            current_pass.reset(token)
        model = self.model
        return head(output_BTD, model.output_weight, model.output_bias, model.config.final_logit_softcapping)

    def _run_blocks(
        self,
        ids_BT: Tensor,
        positions: Tensor,
        angles: Mapping[str, tuple[Tensor, Tensor]],
        temperature: Tensor | None,
    ) -> Tensor:
        """Hidden states (B, T, D) after the last block and norm."""
        inputs = AttentionInputs(positions, None, angles, {}, temperature=temperature)
        return self.model(ids_BT, inputs=inputs, head=keep_hidden, cache=self._cache)
