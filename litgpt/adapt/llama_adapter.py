"""LLaMA-Adapter: trained prompts that attention sees through a gate that starts shut (Zhang et al. 2023).

Axes: B batch, H query heads, K key-value heads, T tokens, L prompt length, S head size, D model width.
"""

import torch
from torch import Tensor

from litgpt.adapt.ia3 import attach_scales_and_shifts
from litgpt.adapt.layers import Adapted, InitValues, add, generator, stored
from litgpt.errors import UserError
from litgpt.model.attention import Attention, attend
from litgpt.model.attention_inputs import AttentionInputs
from litgpt.model.gpt import GPT
from litgpt.model.surgery import add_mixin
from litgpt.recipe.tuner import Adapter, AdapterV2


class PrefixAttention(Adapted):
    """An attention whose heads also attend to `prompt` (L, D), each as much as its `prompt_gate` (H,) lets it.

    Keys and values of the prompt are those of the layer, without positions.
    """

    head_size: int
    scale: float

    def core_attention(
        self, q_BHTS: Tensor, k_BKUS: Tensor, v_BKUS: Tensor, inputs: AttentionInputs, sinks: Tensor | None
    ) -> Tensor:
        """What the heads find among the tokens, plus what they find in the prompt."""
        found = super().core_attention(q_BHTS, k_BKUS, v_BKUS, inputs, sinks)  # type: ignore[misc]
        if not self.adapter_on:
            return found
        prompt_LD = stored(self, "prompt").to(q_BHTS.dtype)
        keys, values = (layer(prompt_LD).unflatten(-1, (-1, self.head_size)) for layer in (self.k, self.v))  # type: ignore[operator]
        keys, values = (part.transpose(0, 1)[None].to(q_BHTS.dtype) for part in (keys, values))
        keys, values = (part.expand(q_BHTS.shape[0], -1, -1, -1) for part in (keys, values))
        seen = attend(q_BHTS, keys, values, mask=None, causal=False, scale=self.scale)
        return found + (stored(self, "prompt_gate")[:, None, None] * seen).to(found.dtype)

    def refusal(self) -> str:
        """Its prompt is no part of any weight."""
        return "its prompt has no place in the base's shape"

    def init_values(self, settings: Adapter, seed: str) -> InitValues:
        yield from super().init_values(settings, seed)
        yield "prompt", torch.empty(stored(self, "prompt").shape).normal_(generator=generator(f"{seed}/prompt"))
        yield "prompt_gate", torch.zeros(stored(self, "prompt_gate").shape)


def attach(model: GPT, settings: Adapter) -> None:
    """Give every block from `start_layer` on a prompt; Adapter v2 also scales and shifts all linear layers.

    Raises:
        UserError: if no block is left, or attention is latent and so has no keys to make of a prompt.
    """
    config = model.config
    if settings.start_layer >= config.n_layer:
        raise UserError(
            f"tuner.start_layer: {settings.start_layer} leaves none of {config.n_layer} blocks; give at most "
            f"{config.n_layer - 1}"
        )
    for block in model.blocks[settings.start_layer :]:
        attention = block.attention
        if not isinstance(attention, Attention):
            raise UserError("tuner: Adapter has no prompts for latent attention; LoRA would do")
        weight = stored(attention.q, "weight")
        add(attention, "prompt", (settings.prompt_length, config.n_embd), weight)
        add(attention, "prompt_gate", (config.n_head,), weight)
        add_mixin(attention, PrefixAttention)
    if isinstance(settings, AdapterV2):
        attach_scales_and_shifts(model)
