"""Every tuner starts as the base, trains all that it adds and no bit of the base, and merges or says why not."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F

from litgpt import adapt
from litgpt.adapt.boft import build_butterfly_order, build_rotation
from litgpt.adapt.layers import disable_adapters
from litgpt.errors import UserError
from litgpt.model.attention_inputs import build_attention_inputs
from litgpt.model.gpt import GPT
from litgpt.model.layers import RMSNorm
from litgpt.recipe.tuner import BOFT, IA3, AdaLoRA, Adapter, AdapterV2, Bone, FourierFT, LoRA, ReFT, Tuner, VeRA
from tests.adapt.models import (
    IDS,
    build_adapted,
    build_merged,
    build_transformers_model,
    compute_loss,
    copy_base,
    map_published_modules,
    perturb,
    train_steps,
)

BIASED: dict[str, Any] = {"name": "pythia-14m"}  # every linear layer but the head has a bias
TUNERS: dict[str, tuple[Tuner, dict[str, Any]]] = {
    "LoRA": (LoRA(dropout=0.0), {}),
    "AdaLoRA": (AdaLoRA(init_r=4, target_r=2, dropout=0.0), {}),
    "IA3": (IA3(), {}),
    "IA3, biases": (IA3(target_modules=["q", "up", "down"]), BIASED),
    "VeRA": (VeRA(r=8), {}),
    "BOFT": (BOFT(), {}),
    "BOFT, 3 factors": (BOFT(butterfly_factors=3, target_modules=["q", "up"]), {}),
    "FourierFT": (FourierFT(n_frequency=50, scaling=60.0, init="zero"), {}),
    "Bone": (Bone(r=5), {}),
    "Bone, mini": (Bone(r=4, variant="mini", mini_r=2), {}),
    "Bone, bat": (Bone(r=4, variant="bat"), {}),
    "Adapter": (Adapter(start_layer=1), {}),
    "AdapterV2": (AdapterV2(start_layer=0), {"tie_embeddings": False}),
    "ReFT": (ReFT(r=3), {}),
}
UNMERGEABLE = ("Adapter", "AdapterV2", "ReFT")


def build(case: str) -> GPT:
    settings, changes = TUNERS[case]
    return build_adapted(settings, **changes)


@pytest.mark.parametrize("case", TUNERS)
def test_starts_as_the_base_and_trains_all_that_it_adds_and_no_bit_of_the_base(case: str) -> None:
    model = build(case)
    with disable_adapters(model):
        before = model(IDS)
    assert torch.allclose(model(IDS), before, atol=1e-6)
    base, added = copy_base(model), adapt.get_adapter_parameters(model)
    trained = {name for name, value in added.items() if value.requires_grad}
    first = {name: value.detach().clone() for name, value in added.items()}
    losses = train_steps(model, lambda: model(IDS), 3)
    assert losses[-1] < losses[0]
    assert {name for name, value in added.items() if not torch.equal(value, first[name])} == trained
    assert all(torch.equal(value, base[name]) for name, value in copy_base(model).items())
    assert {name for name, value in model.named_parameters() if value.grad is not None} == trained
    with disable_adapters(model):
        assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("case", [case for case in TUNERS if case not in UNMERGEABLE])
def test_merged_equals_adapted(case: str) -> None:
    assert TUNERS[case][0].merges
    model = build(case)
    before = model(IDS)
    perturb(model)
    assert (model(IDS) - before).abs().max() > 1e-3
    assert (build_merged(model)(IDS) - model(IDS)).abs().max() < 1e-9


@pytest.mark.parametrize("case", UNMERGEABLE)
def test_changes_that_weights_cannot_express_are_not_merged(case: str) -> None:
    assert not TUNERS[case][0].merges
    reason = "cannot be expressed in the base's weights|has no bias to merge its shift into"
    with pytest.raises(UserError, match=rf"blocks.* cannot be merged: .* ({reason}); keep base and adapter separate"):
        next(adapt.merge_adapter(build(case)))


@pytest.mark.parametrize("case", TUNERS)
def test_autocast_computes_in_bfloat16(case: str) -> None:
    model = build(case).float()
    perturb(model)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(IDS)
    compute_loss(scores.float()).backward()
    assert scores.dtype == torch.bfloat16
    assert F.cosine_similarity(scores.flatten().float(), model(IDS).flatten(), dim=0) > 0.99
    gradients = [value.grad for value in adapt.get_adapter_parameters(model).values() if value.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)


IN_PEFT = {
    "scale_in": "ia3_l.default",
    "scale_out": "ia3_l.default",
    "boft_r": "boft_R.default",
    "boft_scale": "boft_s.default",
}
IN_PEFT |= {"fourier_spectrum": "fourierft_spectrum.default", "bone_block": "miss_block.default"}
IN_PEFT |= {"vera_scale_d": "vera_lambda_d.default", "vera_scale_b": "vera_lambda_b.default"}
IN_PEFT |= {f"lora_{key}": f"lora_{key.upper()}.default" for key in "aeb"}
PEFTS = {
    "AdaLoRA": peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=32, lora_dropout=0.0, total_step=9, target_modules="all-linear"
    ),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": peft.VeraConfig(r=8, target_modules="all-linear"),
    "BOFT": peft.BOFTConfig(boft_block_size=4, boft_block_num=0, target_modules="all-linear"),
    "FourierFT": peft.FourierFTConfig(n_frequency=50, scaling=60.0, init_weights=True, target_modules="all-linear"),
    "Bone": peft.MissConfig(r=5, target_modules="all-linear"),
    "Bone, mini": peft.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules="all-linear"),
    "Bone, bat": peft.MissConfig(r=4, init_weights="bat", target_modules="all-linear"),
}


@pytest.mark.parametrize("case", PEFTS)
def test_forward_gradients_and_steps_equal_peft(case: str, tmp_path: Path) -> None:
    model = build(case)
    reference = peft.get_peft_model(build_transformers_model(model, tmp_path / "base"), PEFTS[case]).double()
    modules, peft_parameters = map_published_modules(model), dict(reference.named_parameters())
    perturb(model)
    pairs = []
    for name, value in adapt.get_adapter_parameters(model).items():
        owner, _, key = name.rpartition(".")
        if value.requires_grad:
            pairs.append((value, peft_parameters.pop(f"base_model.model.{modules[owner]}.{IN_PEFT[key]}")))
    assert not [name for name, value in peft_parameters.items() if value.requires_grad]
    with torch.no_grad():
        for value, expected in pairs:
            expected.copy_(value.view_as(expected))
    assert (model(IDS) - reference(IDS).logits).abs().max() < 1e-5
    assert train_steps(model, lambda: model(IDS), 5) == pytest.approx(
        train_steps(reference, lambda: reference(IDS).logits, 5), abs=1e-5
    )
    for value, expected in pairs:
        assert torch.allclose(value.grad, expected.grad.view_as(value), atol=1e-5)  # type: ignore[arg-type]
        assert torch.allclose(value, expected.view_as(value), atol=1e-4)


def test_rotation_is_orthogonal_and_each_factor_doubles_the_mixed_inputs() -> None:
    for factors, reach in ((1, 4), (2, 8), (3, 16)):
        turn = build_rotation(torch.randn(factors, 8, 4, 4, dtype=torch.float64))
        assert torch.allclose(turn @ turn.mT, torch.eye(32, dtype=torch.float64), atol=1e-10)
        assert ((turn.abs() > 1e-12).sum(1) == reach).all()


def test_butterfly_order_equals_peft() -> None:
    from peft.tuners.boft.layer import BOFTLayer

    for number in range(3):
        expected = BOFTLayer.block_butterfly_perm(None, 32, 8 >> number, 2, 3)  # type: ignore[arg-type]
        assert torch.equal(build_butterfly_order(8, 4, number), expected)


def test_prompt_attention_has_its_own_softmax_and_gate() -> None:
    model = build_adapted(Adapter(start_layer=1, prompt_length=3), norm_qk=False)
    perturb(model)
    attention = model.blocks[1].attention
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    inputs = build_attention_inputs(model.config, torch.arange(5))
    with disable_adapters(model):
        plain_result = attention(x, inputs)
    q = attention.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
    q, _ = attention._apply_rotary(q, q, inputs)
    keys, values = (
        layer(attention.prompt).unflatten(-1, (2, 8)).repeat_interleave(2, dim=1)
        for layer in (attention.k, attention.v)
    )
    scores = torch.einsum("bhts,lhs->bhtl", q, keys) * 8**-0.5
    seen = torch.einsum("bhtl,lhs->bths", scores.softmax(-1), values)
    extra = (seen * attention.prompt_gate[:, None]).flatten(2) @ attention.out.weight.mT
    assert torch.allclose(attention(x, inputs), plain_result + extra, atol=1e-9)


def test_edits_follow_the_formula_only_in_the_listed_blocks() -> None:
    model = build_adapted(ReFT(r=3, layers=[1]))
    perturb(model)
    assert {name.split(".")[1] for name in adapt.get_adapter_parameters(model)} == {"1"}
    hidden: list[torch.Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    model(IDS)
    with disable_adapters(model):
        model(IDS)
    edited, h = hidden
    block = model.blocks[1]
    rows = torch.linalg.svd(block.reft_basis, full_matrices=False)[2]  # another basis of the same space
    projector = rows.mT @ rows
    inside = torch.linalg.qr(block.reft_basis.mT)[0]
    expected = h - h @ projector + (h @ block.reft_weight.mT + block.reft_bias) @ inside.mT
    assert torch.allclose(edited, expected, atol=1e-9)


def test_adapter_v2_trains_norms_scales_and_shifts() -> None:
    model = build("AdapterV2")
    names = {name for name, value in adapt.get_adapter_parameters(model).items() if value.requires_grad}
    norms = {f"{name}.weight_trained" for name, layer in model.named_modules() if isinstance(layer, RMSNorm)}
    assert norms == {name for name in names if name.endswith("_trained")} and len(norms) == 5
    assert {"head.scale_out", "head.shift", "blocks.0.mlp.up.shift", "blocks.0.attention.prompt"} <= names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Adapter(), "tuner.start_layer: 2 leaves none of 2 blocks; set at most 1"),
        (IA3(target_modules=["k"], feedforward_modules=["down"]), "down is not in target_modules"),
        (
            IA3(target_modules=["norm"], feedforward_modules=[]),
            "is not a linear layer of a block; only LoRA supports it",
        ),
        (ReFT(layers=[2]), "tuner.layers: 2 is not a block; set numbers from 0 to 1"),
        (ReFT(r=33), "tuner.r: 33 is more than the model's width; set at most 32"),
        (VeRA(target_modules=["qq"]), "tuner.target_modules: 'qq' matches nothing in this model"),
        (
            FourierFT(),
            "tuner.n_frequency: 2000 is more than the 1024 weights of blocks.0.attention.q; set at most 1024",
        ),
        (Bone(), "tuner.r: 64 is more than the 32 inputs of blocks.0.attention.q; set at most 32"),
        (Bone(r=3, variant="bat"), r"tuner.r: 3 does not divide blocks.0.attention.q \(32, 32\); set a common divisor"),
        (Bone(r=4, variant="mini", mini_r=3), "tuner.mini_r: 3 does not divide the 32 outputs of .*; set 1"),
        (BOFT(block_size=5), "tuner.block_size: 5 with 1 factors does not tile the 32 inputs of blocks.0.attention.q"),
    ],
)
def test_wrong_settings_are_one_line(settings: Tuner, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_adapted(settings)
    assert "\n" not in str(error.value)
