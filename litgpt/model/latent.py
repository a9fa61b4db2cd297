"""Multi-head latent attention (DeepSeek-V2, Liu et al. 2024, section 2.1): keys and values from one vector per token.

Axes: B batch (N texts of a cache), H heads, T tokens (query), U tokens (key), S numbers of a head, D model width, L
numbers of the latent vector, C numbers in the cache of a token.
"""

from typing import Any

import torch
from torch import Tensor, nn

from litgpt.model.attention import Keys, KVCacheLayer, apply_attention, attend
from litgpt.model.attention_inputs import AttentionInputs
from litgpt.model.config import Config
from litgpt.model.layers import build_norm
from litgpt.model.rotary import apply_rotary, compute_yarn_mscale


class LatentAttention(nn.Module):
    """Self-attention over (B, T, D); a part of queries and keys is rotated by position, the keys' shared by all heads.

    The cache holds the latent vector and the rotated key of each token, C = L + S numbers; or keys and values of every
    head, like that of `Attention`, if `kv_up` is not a plain matrix.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        assert config.latent_attention is not None
        sizes = config.latent_attention
        self.nope_size, self.rope_size, self.value_size = (
            sizes[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        self.latent_size = sizes["kv_lora_rank"]
        head_size = self.nope_size + self.rope_size
        self.scale = (config.attention_scores_scalar or head_size) ** -0.5 * compute_score_factor(config)
        self.window = "local" if config.is_local(layer) else "global"
        self.rope, self.interleave = config.rope_of(layer), config.rope_interleave
        bias, eps = config.attn_bias, sizes["norm_eps"]
        q_width, q_rank = config.n_head * head_size, sizes["q_lora_rank"]
        if q_rank is None:
            self.q = nn.Linear(config.n_embd, q_width, bias=config.bias)
        else:
            self.q_down = nn.Linear(config.n_embd, q_rank, bias=bias)
            self.norm_q = build_norm(config, q_rank, eps=eps)
            self.q_up = nn.Linear(q_rank, q_width, bias=config.bias)
        self.kv_down = nn.Linear(config.n_embd, self.latent_size + self.rope_size, bias=bias)
        self.norm_kv = build_norm(config, self.latent_size, eps=eps)
        self.kv_up = nn.Linear(self.latent_size, config.n_head * (self.nope_size + self.value_size), bias=config.bias)
        out_bias = config.bias if config.attn_out_bias is None else config.attn_out_bias
        self.out = nn.Linear(config.n_head * self.value_size, config.n_embd, bias=out_bias)

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs, cache: KVCacheLayer | None = None) -> Tensor:
        """Attend to the tokens that `inputs` allow, those in the cache included; (B, T, D)."""
        q_BTD = self.q_down(x_BTD) if hasattr(self, "q_down") else x_BTD
        latent_BTL, k_rope_BTS = self.kv_down(x_BTD).split([self.latent_size, self.rope_size], dim=-1)
        if cache is None:
            output = self.core_attention(*self.project_qkv(q_BTD, latent_BTL, k_rope_BTS, inputs), inputs)
        elif is_plain_matrix(self.kv_up):
            q, k_rope = self._project_rotated(q_BTD, k_rope_BTS, inputs)
            new_B1TC = torch.cat([self.norm_kv(latent_BTL).unsqueeze(1), k_rope], dim=-1)
            output = cache.attend(self, q, new_B1TC, new_B1TC[..., :0], inputs)
        else:
            output = cache.attend(self, *self.project_qkv(q_BTD, latent_BTL, k_rope_BTS, inputs), inputs)
        return self.out(output.transpose(1, 2).flatten(2))

    def project_qkv(
        self, q_BTD: Tensor, latent_BTL: Tensor, k_rope_BTS: Tensor, inputs: AttentionInputs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project the latent vectors to queries, keys and values of all heads, each (B, H, T, S)."""
        q, k_rope = self._project_rotated(q_BTD, k_rope_BTS, inputs)
        return q, *self._expand(self.norm_kv(latent_BTL), k_rope)

    def _project_rotated(self, q_BTD: Tensor, k_rope_BTS: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, S), and the rotated part of the keys, (B, 1, T, S)."""
        q_BTD = self.q_up(self.norm_q(q_BTD)) if hasattr(self, "q_up") else self.q(q_BTD)
        q_nope, q_rope = split_heads(q_BTD, [self.nope_size, self.rope_size])
        q_rope, k_rope = self._apply_rotary(q_rope, k_rope_BTS.unsqueeze(1), inputs)
        return torch.cat([q_nope, q_rope], dim=-1), k_rope

    def _expand(self, latent_BUL: Tensor, k_rope_B1US: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, (B, H, U, S), from normalized latent vectors and rotated keys."""
        k_BHUS, v_BHUS = split_heads(self.kv_up(latent_BUL), [self.nope_size, self.value_size])
        return torch.cat([k_BHUS, k_rope_B1US.expand(-1, k_BHUS.shape[1], -1, -1)], dim=-1), v_BHUS

    def attend_cached(
        self, q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, inputs: AttentionInputs, cache: KVCacheLayer
    ) -> Tensor:
        """As in `CachedAttention`; to latent vectors with rotated keys, (B, 1, T, C), if there are no values."""
        keys, values = cache.append(k_BKTS, v_BKTS)
        if v_BKTS.shape[-1]:
            return self.core_attention(q_BHTS, keys, values, inputs)
        settings = {"window": self.window, "scale": self.scale, "attend_one": self.attend_latents}
        return apply_attention(inputs, q_BHTS, keys, values, **settings)

    def attend_latents(
        self, q_NHTS: Tensor, latents_N1UC: Tensor, _empty: Tensor, *, mask: Tensor | None, **settings: Any
    ) -> Tensor:
        """Attention to cached tokens, (N, H, T, S of the values), expanded or absorbed, which is cheaper."""
        tokens, cached = q_NHTS.shape[2], latents_N1UC.shape[2]
        if tokens < cached and self.is_absorption_cheaper(tokens, cached):
            return self._attend_absorbed(q_NHTS, latents_N1UC, mask, **settings)
        latents, k_rope = latents_N1UC.split([self.latent_size, self.rope_size], dim=-1)
        return attend(q_NHTS, *self._expand(latents.squeeze(1), k_rope), mask=mask, **settings)

    def is_absorption_cheaper(self, tokens: int, cached: int) -> bool:
        """Whether `tokens` queries attend to `cached` tokens with fewer products if `kv_up` is absorbed."""
        up = self.latent_size * (self.nope_size + self.value_size)
        scores = tokens * cached
        expanded = cached * up + scores * (self.nope_size + self.rope_size + self.value_size)
        return tokens * up + scores * 2 * (self.latent_size + self.rope_size) < expanded

    def _attend_absorbed(self, q_NHTS: Tensor, latents_N1UC: Tensor, mask: Tensor | None, **settings: Any) -> Tensor:
        """Attention with `kv_up` absorbed into queries and outputs (section 2.1.2), one key for all heads."""
        heads, tokens = q_NHTS.shape[1:3]
        q_nope, q_rope = q_NHTS.split([self.nope_size, self.rope_size], dim=-1)
        weight_HSL = self.kv_up.weight.unflatten(0, (heads, -1))
        k_HSL, v_HSL = weight_HSL.split([self.nope_size, self.value_size], dim=1)
        q = torch.cat([torch.einsum("nhts,hsl->nhtl", q_nope, k_HSL), q_rope], dim=-1)
        if mask is not None:
            mask = mask.expand(-1, heads, -1, -1).flatten(1, 2).unsqueeze(1)
        # the rotated keys are values too, and their sums discarded: a copy without them would take longer
        output = attend(q.flatten(1, 2).unsqueeze(1), latents_N1UC, latents_N1UC, mask=mask, **settings)
        output_NHTL = output.squeeze(1).unflatten(1, (heads, tokens))[..., : self.latent_size]
        return torch.einsum("nhtl,hsl->nhts", output_NHTL, v_HSL)

    def core_attention(self, q_BHTS: Tensor, k_BHUS: Keys, v_BHUS: Keys, inputs: AttentionInputs) -> Tensor:
        """Attention without its projections, (B, H, T, S of the values)."""
        return apply_attention(inputs, q_BHTS, k_BHUS, v_BHUS, window=self.window, scale=self.scale)

    def _apply_rotary(self, q: Tensor, k: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            return q, k
        cos, sin = inputs.angles[self.rope]
        q, k = (apply_rotary(x, cos, sin, interleave=self.interleave) for x in (q, k))
        return q, k


def is_plain_matrix(layer: nn.Linear) -> bool:
    """Whether a layer is a product with its weight and nothing else: no bias, adapter, quantization or shards."""
    return type(layer) is nn.Linear and layer.bias is None and type(layer.weight) in (Tensor, nn.Parameter)


def split_heads(x_BTD: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """(B, T, D) as heads (B, H, T, S), each split into parts of these sizes."""
    return x_BTD.unflatten(-1, (-1, sum(sizes))).transpose(1, 2).split(sizes, dim=-1)


def compute_score_factor(config: Config) -> float:
    """The factor of yarn with `mscale_all_dim` on scores, which keeps their spread in longer contexts."""
    rope = config.rope_adjustments or {}
    return compute_yarn_mscale(rope["factor"], rope["mscale_all_dim"]) ** 2 if rope.get("mscale_all_dim") else 1.0
