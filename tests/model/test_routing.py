"""Routers in training against loops over tokens in float64: outputs, gradients, counts and dropped tokens."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.model.config import Config
from litgpt.model.moe import MoE
from litgpt.model.routing import Routing
from litgpt.recipe.moe import MoEArgs
from tests.model.test_moe import CORRECTED, GROUPED, SHAPE, drawn, one_expert

B, T, E, K = 3, 8, 8, 3
SCALE = 0.25
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "before": {"router_softmax": "before_top_k", "norm_topk_prob": True},
    "sigmoid": CORRECTED,
    "groups": {**CORRECTED, **GROUPED},
    "sqrtsoftplus": {**CORRECTED, "router_score": "sqrtsoftplus"},
}
SETTINGS: dict[str, MoEArgs] = {
    "nothing": MoEArgs(),
    "aux": MoEArgs(aux_loss_coeff=0.3),
    "seq": MoEArgs(aux_loss_coeff=0.3, router_load_balancing_type="seq_aux_loss"),
    "z": MoEArgs(z_loss_coeff=0.2),
    "both": MoEArgs(aux_loss_coeff=0.3, z_loss_coeff=0.2, router_dtype="fp64"),
    "probs": MoEArgs(expert_capacity_factor=0.7, aux_loss_coeff=0.3),
    "position": MoEArgs(expert_capacity_factor=0.7, token_drop_policy="position"),
    "padded": MoEArgs(expert_capacity_factor=0.7, pad_expert_input_to_capacity=True, z_loss_coeff=0.2),
    "padded more": MoEArgs(expert_capacity_factor=1.6, pad_expert_input_to_capacity=True, token_drop_policy="position"),
}


def select(config: Config, scores: Tensor, correction: Tensor | None) -> list[int]:
    """The experts of a token, by comparing all."""
    ranked = (scores if correction is None else scores + correction).tolist()
    allowed = set(range(E))
    if config.n_expert_groups:
        size = E // config.n_expert_groups
        members = [list(range(g * size, (g + 1) * size)) for g in range(config.n_expert_groups)]
        best = [sum(sorted(ranked[e] for e in group)[-config.n_topk_scores_per_group :]) for group in members]
        order = sorted(range(len(members)), key=lambda g: -best[g])[: config.n_topk_groups]
        allowed = {e for g in order for e in members[g]}
    return sorted(allowed, key=lambda e: -ranked[e])[:K]


def score(config: Config, logits: Tensor) -> Tensor:
    if config.router_score == "softmax":
        return logits.exp() / logits.exp().sum()
    return 1 / (1 + (-logits).exp()) if config.router_score == "sigmoid" else (1 + logits.exp()).log().sqrt()


def brute_force(moe: MoE, x: Tensor, settings: MoEArgs, is_token: Tensor) -> dict[str, Any]:
    """The output, the losses with their coefficients and the statistics of a block, one token after the other."""
    config, router = moe.router.config, moe.router
    pairs, losses, counts, entropy = [], [], [0] * E, 0.0
    sums: dict[int, Any] = {}
    for token in range(B * T):
        if not is_token.flatten()[token]:
            continue
        logits = x.flatten(0, 1)[token] @ router.weight.T
        scores = score(config, logits)
        chosen = select(config, scores.detach(), router.correction)
        weights = [scores[e] for e in chosen]
        if config.router_score == "softmax" or config.norm_topk_prob:
            weights = [weight / sum(weights) for weight in weights]
        pairs += [(token, e, w * config.routed_scaling_factor) for e, w in zip(chosen, weights, strict=True)]
        shares = scores / scores.sum()
        losses.append(settings.z_loss_coeff * logits.exp().sum().log() ** 2)
        group = token // T if settings.router_load_balancing_type == "seq_aux_loss" else 0
        tokens, share_sum, highest = sums.get(group, (0, 0, [0] * E))
        for e in select(replace_groups(config), scores.detach(), None):
            highest[e] += 1
        sums[group] = (tokens + 1, share_sum + shares, highest)
        for e in chosen:
            counts[e] += 1
        entropy -= float((shares * shares.log()).sum().detach())
    for tokens, share_sum, highest in sums.values():  # each loss weighs as much as its tokens
        loss = E / (K * tokens**2) * sum(n * s for n, s in zip(highest, share_sum, strict=True))
        losses.append(settings.aux_loss_coeff * tokens * loss)
    kept = drop(pairs, settings)
    rows: list[Any] = [torch.zeros_like(x[0, 0]) for _ in range(B * T)]
    for token, e, weight in kept:
        rows[token] = rows[token] + weight * one_expert(moe.experts, config, e, x.flatten(0, 1)[token])
    return {
        "output": torch.stack(rows).view_as(x),
        "loss": sum(losses) * SCALE,
        "counts": counts,
        "dropped": len(pairs) - len(kept),
        "entropy": entropy,
    }


def replace_groups(config: Config) -> Config:
    return Config(**{**config.to_dict(), "n_expert_groups": None, "router_score": config.router_score})


def drop(pairs: list[Any], settings: MoEArgs) -> list[Any]:
    if settings.expert_capacity_factor is None:
        return pairs
    capacity = math.ceil(B * T * K / E * settings.expert_capacity_factor)
    kept = []
    for expert in range(E):
        mine = [pair for pair in pairs if pair[1] == expert]
        if settings.token_drop_policy == "probs":
            mine.sort(key=lambda pair: -float(pair[2].detach()))
        kept += mine[:capacity]
    return kept


def build(router: str) -> tuple[MoE, Tensor]:
    moe = drawn(MoE(Config(**{**SHAPE, **ROUTERS[router]}))).double()
    x = torch.randn(B, T, SHAPE["n_embd"], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return moe, x.requires_grad_()


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    ("router", "name"),
    [*itertools.product(("softmax", "groups"), SETTINGS), *((router, "both") for router in ROUTERS)],
)
def test_routers_in_training_equal_a_loop_over_tokens(router: str, name: str, padding: bool) -> None:
    moe, x = build(router)
    settings = SETTINGS[name]
    is_token = torch.ones(B, T, dtype=torch.bool)
    if padding:
        is_token[1, 5:], is_token[2, 2:] = False, False
    routing = Routing(settings, rows=B, scale=SCALE, is_token_BP=is_token if padding else None)
    expected = brute_force(moe, x, settings, is_token)
    actual = moe(x, routing)
    exact = {"atol": 1e-12, "rtol": 1e-10}
    torch.testing.assert_close(actual[is_token], expected["output"][is_token], **exact)
    draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=x.dtype)
    output_grad = draw * is_token[..., None]
    trained = [value for value in moe.parameters() if value.requires_grad]
    total = (expected["output"] * output_grad).sum() + expected["loss"]
    gradients = torch.autograd.grad(actual, [x, *trained], output_grad)
    for gradient, correct in zip(gradients, torch.autograd.grad(total, [x, *trained]), strict=True):
        torch.testing.assert_close(gradient, correct, **exact)
    record = routing.records[0]
    assert record[:E].tolist() == expected["counts"] and record[E] == expected["dropped"]
    assert float(record[E + 1]) == pytest.approx(expected["entropy"])
    if settings.expert_capacity_factor == 0.7 and not padding:
        assert expected["dropped"] > 0


def test_the_loss_itself_does_not_change() -> None:
    moe, x = build("softmax")
    settings = MoEArgs(aux_loss_coeff=0.3, z_loss_coeff=0.2)
    plain, trained = moe(x), moe(x, Routing(settings, rows=B, scale=SCALE))
    assert torch.equal(plain, trained)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_the_balance_loss_of_a_balanced_layer_is_one(kind: Any) -> None:
    moe = MoE(Config(**{**SHAPE, "n_expert_per_token": 1})).double()
    x = torch.eye(E, SHAPE["n_embd"], dtype=torch.float64).repeat(B, 1, 1) * 3
    with torch.no_grad():
        moe.router.weight.zero_()[:, :E] = torch.eye(E)
    settings = MoEArgs(aux_loss_coeff=1.0, router_load_balancing_type=kind)
    routing = Routing(settings, rows=B, scale=1.0)
    moe(x, routing)
    assert routing.records[0][:E].tolist() == [B] * E
    assert float(routing.records[0][E + 2]) / (B * T) == pytest.approx(1)


def test_a_global_loss_counts_the_micro_batches_before() -> None:
    moe, x = build("softmax")
    settings = MoEArgs(aux_loss_coeff=0.3, router_load_balancing_type="global_aux_loss")
    first = Routing(settings, rows=B, scale=SCALE)
    moe(x.flip(0) * 0.5, first)
    second = Routing(settings, rows=B, scale=SCALE, earlier=first)
    (actual,) = torch.autograd.grad(moe(x, second), moe.router.weight, torch.zeros_like(x))
    load = first.records[0][:E] + second.records[0][:E]
    shares = (x.flatten(0, 1) @ moe.router.weight.T).softmax(-1).sum(0)
    loss = SCALE * 0.3 * E / load.sum() * (load * shares).sum()  # per token, as often as the micro-batch has tokens
    torch.testing.assert_close(actual, torch.autograd.grad(loss, moe.router.weight)[0])


@pytest.mark.parametrize("name", ["aux", "probs", "padded"])
def test_recomputation_counts_once(name: str) -> None:
    moe, x = build("sigmoid")
    trained = [value for value in moe.parameters() if value.requires_grad]
    results = []
    for recompute in (False, True):
        routing = Routing(SETTINGS[name], rows=B, scale=SCALE)
        run = torch.utils.checkpoint.checkpoint if recompute else lambda function, *args, **_: function(*args)
        gradients = torch.autograd.grad(run(moe, x, routing, use_reentrant=False).square().sum(), trained)
        results.append([*gradients, routing.records[0], routing.loads.get(0, torch.zeros(1))])
    assert all(map(torch.equal, *results))


def sinkhorn(logits: Tensor) -> Tensor:
    """Rows scaled to 1 / T and columns to 1 / E in turn, until the factors of columns no longer change."""
    cost, columns, error = logits.exp(), torch.ones(E, dtype=torch.float64), 1.0
    while error > 1e-4:
        rows = 1 / (len(cost) * (cost * columns).sum(1))
        before, columns = columns, 1 / (E * (cost * rows[:, None]).sum(0))
        error = float((columns - before).abs().mean())
    return cost * columns * rows[:, None]


@pytest.mark.parametrize("padding", [False, True])
def test_sinkhorn_assigns_evenly_and_weighs_by_scores(padding: bool) -> None:
    moe, x = build("before")
    with torch.no_grad():
        x[..., 0] += 3  # so that all tokens prefer the same experts
    is_token = torch.ones(B, T, dtype=torch.bool)
    if padding:
        is_token[1, 5:] = False
    routing = Routing(
        MoEArgs(router_load_balancing_type="sinkhorn"), rows=B, scale=1.0, is_token_BP=is_token if padding else None
    )
    weights, experts = moe.router(x.flatten(0, 1), routing)
    rows = is_token.flatten()
    logits = (x.flatten(0, 1) @ moe.router.weight.T)[rows]
    expected = sinkhorn(logits.detach()).topk(K).indices
    assert torch.equal(experts[rows], expected)
    scores = logits.softmax(-1).gather(1, expected)
    torch.testing.assert_close(weights[rows], scores / scores.sum(1, keepdim=True))
    plain = torch.bincount(moe.router(x.flatten(0, 1))[1][rows].flatten(), minlength=E)
    assert 1.5 * routing.records[0][:E].std() < plain.double().std()


def test_a_large_capacity_changes_nothing() -> None:
    moe, x = build("softmax")
    for padded in (False, True):
        settings = MoEArgs(expert_capacity_factor=float(E), pad_expert_input_to_capacity=padded)
        torch.testing.assert_close(moe(x, Routing(settings, rows=B, scale=1.0)), moe(x), atol=1e-14, rtol=1e-14)
