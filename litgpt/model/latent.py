"""Attention whose keys and values come out of one small vector a token (DeepSeek-V2, Liu et al. 2024, section 2.1).

Axes: B batch, H heads, T tokens, S numbers of a head, D model width, L numbers of the latent vector.
"""

import torch
from torch import Tensor, nn

from litgpt.model.attention import LayerCache, Shared, attend_as
from litgpt.model.config import Config
from litgpt.model.layers import norm
from litgpt.model.rotary import rotate, yarn_magnitude


class LatentAttention(nn.Module):
    """Self-attention over (B, T, D); part of each query and key tells positions, and all heads share that part of keys.

    The cache holds keys and values of every head, as that of other attention does.
    """

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        assert config.latent_attention is not None
        sizes = config.latent_attention
        self.plain, self.turned, self.value = (
            sizes[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        self.latent = sizes["kv_lora_rank"]
        self.scale = (config.attention_scores_scalar or self.plain + self.turned) ** -0.5 * score_factor(config)
        self.window = "local" if config.is_local(layer) else "global"
        self.rope, self.interleave = config.rope_of(layer), config.rope_interleave
        bias, eps = config.attn_bias, sizes["norm_eps"]
        q_width, rank = config.n_head * (self.plain + self.turned), sizes["q_lora_rank"]
        if rank is None:
            self.q = nn.Linear(config.n_embd, q_width, bias=config.bias)
        else:
            self.q_down = nn.Linear(config.n_embd, rank, bias=bias)
            self.norm_q = norm(config, rank, eps=eps)
            self.q_up = nn.Linear(rank, q_width, bias=config.bias)
        self.kv_down = nn.Linear(config.n_embd, self.latent + self.turned, bias=bias)
        self.norm_kv = norm(config, self.latent, eps=eps)
        self.kv_up = nn.Linear(self.latent, config.n_head * (self.plain + self.value), bias=config.bias)
        out_bias = config.bias if config.attn_out_bias is None else config.attn_out_bias
        self.out = nn.Linear(config.n_head * self.value, config.n_embd, bias=out_bias)

    def forward(self, x_BTD: Tensor, shared: Shared, cache: LayerCache | None = None) -> Tensor:
        """Attend to the tokens that `shared` lets each see, those in the cache included."""
        q_BTD = self.q_down(x_BTD) if hasattr(self, "q_down") else x_BTD
        latent_BTL, place_BTS = self.kv_down(x_BTD).split([self.latent, self.turned], dim=-1)
        q, k, v = self.raised(q_BTD, latent_BTL, place_BTS, shared)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out(self.attended(q, k, v, shared).transpose(1, 2).flatten(2))

    def raised(
        self, q_BTD: Tensor, latent_BTL: Tensor, place_BTS: Tensor, shared: Shared
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads out of the latent vectors, each (B, H, T, S)."""
        q_BTD = self.q_up(self.norm_q(q_BTD)) if hasattr(self, "q_up") else self.q(q_BTD)
        k_BHTS, v_BHTS = heads(self.kv_up(self.norm_kv(latent_BTL)), [self.plain, self.value])
        q_plain, q_turned = heads(q_BTD, [self.plain, self.turned])
        q_turned, k_turned = self._place(q_turned, place_BTS.unsqueeze(1), shared)
        q = torch.cat([q_plain, q_turned], dim=-1)
        return q, torch.cat([k_BHTS, k_turned.expand(-1, k_BHTS.shape[1], -1, -1)], dim=-1), v_BHTS

    def attended(self, q_BHTS: Tensor, k_BHUS: Tensor, v_BHUS: Tensor, shared: Shared) -> Tensor:
        """(B, H, T, S of the values), what each query finds."""
        return attend_as(shared, q_BHTS, k_BHUS, v_BHUS, window=self.window, scale=self.scale)

    def _place(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            return q, k
        cos, sin = shared.angles[self.rope]
        return rotate(q, cos, sin, interleave=self.interleave), rotate(k, cos, sin, interleave=self.interleave)


def heads(x_BTD: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """(B, T, D) as heads (B, H, T, S), each cut into parts of these sizes."""
    return x_BTD.unflatten(-1, (-1, sum(sizes))).transpose(1, 2).split(sizes, dim=-1)


def score_factor(config: Config) -> float:
    """What yarn with `mscale_all_dim` multiplies scores by, so that they keep their spread in longer contexts."""
    rope = config.rope_adjustments or {}
    return yarn_magnitude(rope["factor"], rope["mscale_all_dim"]) ** 2 if rope.get("mscale_all_dim") else 1.0
