"""LLaMA-Adapter: trained prompts that attention attends to through a gate initialized to zero (Zhang et al. 2023).

Axes: B batch, H query heads, K key-value heads, T tokens, L prompt length, S head size, D model width.
"""

import torch
from torch import Tensor

from litgpt.adapt.ia3 import attach_scales_and_shifts
from litgpt.adapt.layers import AdaptedLayer, InitValues, add_parameter, own_parameter
from litgpt.errors import UserError
from litgpt.model.attention import Attention, attend
from litgpt.model.attention_inputs import AttentionInputs
from litgpt.model.gpt import GPT
from litgpt.model.init import seeded_generator
from litgpt.model.surgery import add_mixin
from litgpt.recipe.tuner import Adapter, AdapterV2


class PrefixAttention(AdaptedLayer):
    """Attention whose heads also attend to `prompt` (L, D), weighted by each head's `prompt_gate` (H,).

    Keys and values of the prompt are computed with the projections of the layer, without positional embeddings.
    """

    head_size: int
    scale: float
    merge_error = "a prompt cannot be expressed in the base's weights"

    def core_attention(
        self, q_BHTS: Tensor, k_BKUS: Tensor, v_BKUS: Tensor, inputs: AttentionInputs, sinks: Tensor | None
    ) -> Tensor:
        """The attention output over the tokens plus the gated attention output over the prompt."""
        output = super().core_attention(q_BHTS, k_BKUS, v_BKUS, inputs, sinks)  # type: ignore[misc]
        if not self.adapter_on:
            return output
        prompt_LD = own_parameter(self, "prompt").to(q_BHTS.dtype)
        keys, values = (layer(prompt_LD).unflatten(-1, (-1, self.head_size)) for layer in (self.k, self.v))  # type: ignore[operator]
        keys, values = (x.transpose(0, 1)[None].to(q_BHTS.dtype) for x in (keys, values))
        keys, values = (x.expand(q_BHTS.shape[0], -1, -1, -1) for x in (keys, values))
        prompt_output = attend(q_BHTS, keys, values, mask=None, causal=False, scale=self.scale)
        return output + (own_parameter(self, "prompt_gate")[:, None, None] * prompt_output).to(output.dtype)

    def init_values(self, _settings: Adapter, seed: str) -> InitValues:
        """Prompts are normal, gates zero."""
        prompt = torch.empty(own_parameter(self, "prompt").shape)
        yield "prompt", prompt.normal_(generator=seeded_generator(f"{seed}/prompt"))
        yield "prompt_gate", torch.zeros(own_parameter(self, "prompt_gate").shape)


def attach_llama_adapter(model: GPT, settings: Adapter) -> None:
    """Add a prompt to every block from `start_layer` on; Adapter v2 also scales and shifts all linear layers.

    Raises:
        UserError: if no block is left, or attention is latent, which has no keys to compute from a prompt.
    """
    config = model.config
    if settings.start_layer >= config.n_layer:
        raise UserError(
            f"tuner.start_layer: {settings.start_layer} leaves none of {config.n_layer} blocks; set at most "
            f"{config.n_layer - 1}"
        )
    for block in model.blocks[settings.start_layer : config.n_layer]:
        attention = block.attention
        if not isinstance(attention, Attention):
            raise UserError("tuner: Adapter is not supported with latent attention; use LoRA")
        weight = own_parameter(attention.q, "weight")
        add_parameter(attention, "prompt", (settings.prompt_length, config.n_embd), weight)
        add_parameter(attention, "prompt_gate", (config.n_head,), weight)
        add_mixin(attention, PrefixAttention)
    if isinstance(settings, AdapterV2):
        attach_scales_and_shifts(model)
