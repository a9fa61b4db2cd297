"""Mixture of experts: grouped products against one expert at a time, routers against every choice tried in turn."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.model.moe import Experts, MoE, Router, grouped_linear, padded_mm

SHAPE: dict[str, Any] = {
    "n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": 64, "block_size": 64, "intermediate_size": 48,
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMoE", "bias": False, "parallel_residual": False,
    "n_expert": 8, "n_expert_per_token": 3, "moe_intermediate_size": 16,
}  # fmt: skip
CORRECTED = {"router_score": "sigmoid", "router_correction": True, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
GROUPED = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax-after": {},
    "softmax-before": {"router_softmax": "before_top_k"},
    "softmax-before-normed": {"router_softmax": "before_top_k", "norm_topk_prob": True},
    "sigmoid": {"router_score": "sigmoid"},
    "biased": {"router_bias": True},
    "corrected": CORRECTED,
    "corrected-groups": {**CORRECTED, **GROUPED},
    "best-of-group": {
        **GROUPED,
        "router_score": "softmax",
        "router_softmax": "before_top_k",
        "n_topk_scores_per_group": 1,
    },
    "softmax-corrected": {"router_softmax": "before_top_k", "router_correction": True, "norm_topk_prob": True},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"expert_bias": True},
    "clamped": {"activation": "clamped_swiglu", "expert_bias": True},
    "shared": {"n_shared_expert": 2},
    "shared-gated": {"shared_expert_size": 20, "shared_expert_gate": True},
    "weighed-input": {"router_weights": "input", "router_score": "sigmoid", "shared_expert_size": 16},
    "odd-sizes": {"n_embd": 36, "head_size": 8, "moe_intermediate_size": 7},
    "groups": {**CORRECTED, **GROUPED},
}


def drawn(module: torch.nn.Module, scale: float = 0.4) -> Any:
    """The module with every parameter random."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, scale, generator=generator)
    return module


def tokens(width: int = 32, rows: int = 2) -> Tensor:
    return torch.randn(rows, 12, width, generator=torch.Generator().manual_seed(5))


def one_by_one(moe: MoE, config: Config, x_BTD: Tensor) -> Tensor:
    """What the block computes, every token through each of its experts alone."""
    x_ND = x_BTD.flatten(0, 1)
    weights, chosen = moe.router(x_ND)
    outputs = []
    for token, token_weights, numbers in zip(x_ND, weights, chosen, strict=True):
        total = torch.zeros_like(token)
        for weight, number in zip(token_weights, numbers, strict=True):
            early, late = (weight, 1) if config.router_weights == "input" else (1, weight)
            total = total + late * one_expert(moe.experts, config, int(number), token * early)
        outputs.append(total)
    y_BTD = torch.stack(outputs).view_as(x_BTD)
    if moe.shared is None:
        return y_BTD
    shared = moe.shared.down(F.silu(moe.shared.gate(x_BTD)) * moe.shared.up(x_BTD))
    return y_BTD + (shared if moe.shared_gate is None else shared * moe.shared_gate(x_BTD).sigmoid())


def one_expert(experts: Experts, config: Config, number: int, x: Tensor) -> Tensor:
    biases = (experts.gate_bias, experts.up_bias, experts.down_bias)
    gate_bias, up_bias, down_bias = (None if bias is None else bias[number] for bias in biases)
    gate, up = F.linear(x, experts.gate[number], gate_bias), F.linear(x, experts.up[number], up_bias)
    if config.activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    else:
        inner = F.silu(gate) * up
    return F.linear(inner, experts.down[number], down_bias)


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 2), (torch.float64, 2), (torch.float32, 8)])
@pytest.mark.parametrize("name", BLOCKS)
def test_grouped_experts_equal_one_at_a_time(name: str, dtype: torch.dtype, rows: int) -> None:
    config = Config(**{**SHAPE, **BLOCKS[name]})
    moe = drawn(MoE(config)).to(dtype)
    x = tokens(config.n_embd, rows).to(dtype).requires_grad_()
    expected, actual = one_by_one(moe, config, x), moe(x)
    exact = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(actual, expected, **exact)
    output_grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=dtype)
    trained = [(key, value) for key, value in moe.named_parameters() if value.requires_grad]
    inputs = [x, *(value for _, value in trained)]
    for (key, _), actual_grad, expected_grad in zip(
        [("x", x), *trained],
        torch.autograd.grad(actual, inputs, output_grad),
        torch.autograd.grad(expected, inputs, output_grad),
        strict=True,
    ):
        torch.testing.assert_close(actual_grad, expected_grad, **exact, msg=lambda text, key=key: f"{key}: {text}")


def test_clamped_experts_are_clamped() -> None:
    config = Config(**{**SHAPE, **BLOCKS["clamped"]})
    moe = drawn(MoE(config), 3.0)
    torch.testing.assert_close(moe(tokens()), one_by_one(moe, config, tokens()), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("width", [32, 36])
def test_experts_without_tokens_have_gradients_of_zero(width: int) -> None:
    config = Config(**{**SHAPE, "n_embd": width, "n_expert_per_token": 1, "router_bias": True, "expert_bias": True})
    moe = drawn(MoE(config))
    with torch.no_grad():
        moe.router.bias.copy_(torch.tensor([0.0, 0, 0, 1e4, 0, 0, 0, 0]))
    moe(tokens(width)).square().sum().backward()
    for name, parameter in moe.experts.named_parameters():
        norms = parameter.grad.flatten(1).norm(dim=1)
        assert norms[3] > 0 and not norms[[0, 1, 2, 4, 5, 6, 7]].any(), name


@pytest.mark.parametrize("multiply", [F.grouped_mm, padded_mm])
@pytest.mark.parametrize("counts", [[5, 0, 3], [0, 0, 8], [0, 0, 0]])
def test_groups_of_any_length(multiply: Any, counts: list[int]) -> None:
    x, weight = torch.randn(sum(counts), 8), torch.randn(3, 8, 12)
    expected = torch.cat([part @ matrix for part, matrix in zip(x.split(counts), weight, strict=True)])
    actual = multiply(x, weight, offs=torch.tensor(counts).cumsum(0).int())
    torch.testing.assert_close(actual, expected)


def test_weights_that_are_views_of_a_published_tensor() -> None:
    published = torch.randn(3, 32, 16)
    x, ends = torch.randn(6, 32), torch.tensor([2, 2, 6], dtype=torch.int32)
    actual = grouped_linear(x, published[:, :, ::2].mT, None, ends)
    torch.testing.assert_close(actual, torch.cat([x[:2] @ published[0, :, ::2], x[2:] @ published[2, :, ::2]]))


def best_choice(config: Config, scores: Tensor) -> set[int]:
    """The experts with the highest sum, out of all sets that the limits on groups allow, by brute force."""
    experts = range(config.n_expert)
    if config.n_expert_groups:
        size, best = config.n_expert // config.n_expert_groups, config.n_topk_scores_per_group
        sums = [scores[g * size : (g + 1) * size].topk(best).values.sum() for g in range(config.n_expert_groups)]
        sets = itertools.combinations(range(config.n_expert_groups), config.n_topk_groups)
        best_groups = max(sets, key=lambda groups: sum(sums[g] for g in groups))
        experts = [e for e in experts if e // size in best_groups]
    sets = itertools.combinations(experts, config.n_expert_per_token)
    return set(max(sets, key=lambda chosen: sum(scores[e] for e in chosen)))


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_against_all_choices(name: str) -> None:
    config = Config(**{**SHAPE, **ROUTERS[name]})
    router = drawn(Router(config))
    x = tokens().flatten(0, 1)
    weights, chosen = router(x)
    logits = x @ router.weight.T + (0 if router.bias is None else router.bias)
    scores = logits.sigmoid() if config.router_score == "sigmoid" else logits.softmax(-1)
    ranked = scores if router.correction is None else scores + router.correction
    for token, numbers in enumerate(chosen):
        assert set(numbers.tolist()) == best_choice(config, ranked[token])
        selected = scores[token, numbers]
        if config.norm_topk_prob or (config.router_score == "softmax" and config.router_softmax == "after_top_k"):
            selected = selected / selected.sum()
        torch.testing.assert_close(weights[token], selected * config.routed_scaling_factor)


def test_the_correction_chooses_but_does_not_weigh_or_learn() -> None:
    config = Config(**{**SHAPE, **CORRECTED, "norm_topk_prob": False})
    router = drawn(Router(config))
    x = tokens().flatten(0, 1)
    with torch.no_grad():
        router.correction.zero_()
        router.correction[5] = 100
    weights, chosen = router(x)
    place = (chosen == 5).nonzero()
    assert len(place) == len(x)
    torch.testing.assert_close(weights[chosen == 5], 2.5 * (x @ router.weight[5]).sigmoid())
    weights.sum().backward()
    assert (
        router.correction.grad is None and router.correction.dtype == torch.float32 and router.weight.grad is not None
    )


def test_routing_is_in_float32_under_autocast() -> None:
    router = drawn(Router(Config(**SHAPE)))
    x = tokens().flatten(0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        weights, chosen = router(x)
    exact = router(x)
    assert weights.dtype == torch.float32 and torch.equal(weights, exact[0]) and torch.equal(chosen, exact[1])


def small(**changes: Any) -> GPT:
    model = GPT(Config(**{**SHAPE, **changes}))
    initialize(model, 3)
    return model


def ids() -> Tensor:
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", BLOCKS)
def test_half_precision_stays_close(name: str) -> None:
    config = Config(**{**SHAPE, **BLOCKS[name]})
    moe, x = drawn(MoE(config), 0.2), tokens(config.n_embd)
    exact = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = moe(x)
        mixed.float().sum().backward()
    assert mixed.dtype == torch.bfloat16 and all(p.grad is not None for p in moe.parameters() if p.requires_grad)
    assert (mixed - exact).abs().mean() < 0.02 * exact.std()
    if name != "groups":  # whose choice may turn with the last bit of the input
        pure = copy.deepcopy(moe).bfloat16()(x.bfloat16())
        assert pure.dtype == torch.bfloat16 and (pure - exact).abs().median() < 0.03 * exact.std()


@pytest.mark.parametrize("name", BLOCKS)
def test_recomputed_gradients_are_the_same(name: str) -> None:
    moe = drawn(MoE(Config(**{**SHAPE, **BLOCKS[name]})))
    x = tokens(moe.router.weight.shape[1])
    inputs = [value for value in moe.parameters() if value.requires_grad]
    expected = torch.autograd.grad(moe(x).square().sum(), inputs)
    again = torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False)
    for first, second in zip(expected, torch.autograd.grad(again.square().sum(), inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["weighed-input", "groups"])
def test_blocks_compile_in_bfloat16_without_breaks_and_in_float32(name: str) -> None:
    model = small(**BLOCKS[name], n_layer=1)
    expected = model(ids())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(ids())
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(model(ids()), expected)
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(ids()), mixed)


def test_layers_with_and_without_experts() -> None:
    model = small(n_layer=4, first_k_dense_replace=1, moe_layers=[1, 1, 0, 1])
    assert [isinstance(block.mlp, MoE) for block in model.blocks] == [False, True, False, True]
    assert model.blocks[0].mlp.up.weight.shape == (48, 32) and model.blocks[1].mlp.experts.up.shape == (8, 16, 32)


@pytest.mark.parametrize("name", BLOCKS)
def test_meta_build_gives_the_same_model(name: str) -> None:
    with torch.device("meta"):
        model = GPT(small(**BLOCKS[name]).config)
    model.to_empty(device="cpu")
    initialize(model, 3)
    torch.testing.assert_close(model(ids()), small(**BLOCKS[name])(ids()), atol=0, rtol=0)


def test_float64_gradients_of_rows_add_up_to_the_batch() -> None:
    model = small(**BLOCKS["groups"], expert_bias=True, shared_expert_size=16).double()
    trained = [value for value in model.parameters() if value.requires_grad]
    whole = torch.autograd.grad(model(ids()).logsumexp(-1).sum(), trained)
    parts = [torch.autograd.grad(model(row[None]).logsumexp(-1).sum(), trained) for row in ids()]
    for expected, *actual in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(actual), expected, atol=1e-12, rtol=1e-12)


def test_a_change_of_type_leaves_the_correction_exact() -> None:
    router = drawn(Router(Config(**{**SHAPE, **CORRECTED})))
    before = router.correction.clone()
    for dtype in (torch.bfloat16, torch.float64):
        router.to(dtype)
        assert router.weight.dtype == dtype and torch.equal(router.correction, before)
        assert not router.correction.requires_grad


def test_groups_alone_mean_the_router_that_litgpt_has_for_them() -> None:
    config = Config(**{**SHAPE, **GROUPED})
    assert config.router_score == "sigmoid" and config.router_correction
    assert Config(**{**SHAPE, **GROUPED, "router_score": "softmax"}).router_correction is False
    with pytest.raises(UserError, match="n_topk_scores_per_group: 2 of 1 in a group"):
        Config(**{**SHAPE, **GROUPED, "n_expert_groups": 8, "n_topk_groups": 4})
