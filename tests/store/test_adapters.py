"""Adapter folders load in PEFT, those of PEFT load here, and those that do not fit are refused in one line."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from litgpt import adapt
from litgpt.adapt.layers import disable_adapters
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import BOFT, IA3, AdaLoRA, AdapterV2, Bone, FourierFT, Full, LoRA, ReFT, Tuner, VeRA
from litgpt.store.adapters.folder import ADAPTER_WEIGHTS, load_adapter_folder, save_adapter_folder
from tests.adapt.models import IDS, build_adapted, build_transformers_model, copy_base, perturb
from tests.store.models import random_model, small

FUSED = {"name": "Phi-3-mini-4k-instruct", "sliding_window_size": None}
STACKED = {"name": "gpt-oss-20b", "n_expert": 4}
TURNED = {"name": "Llama-4-Scout-17B-16E", "n_expert": 4, "moe_intermediate_size": 20}
RENAMED = {
    "name": "granite-3.0-1b-a400m-base",
    "n_expert": 4,
    "n_expert_per_token": 2,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
}
ONE_BY_ONE = {"name": "Mixtral-8x7B-v0.1", "n_expert": 4, "sliding_window_size": None}
EXPERTS = [f"mlp.experts.{name}" for name in ("gate", "up", "down")]
GPT2 = {"name": "gpt2", "n_query_groups": 4, "head_size": 8}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "bias": ({"bias": "all"}, {}),
    "pissa, rslora": ({"init": "pissa", "rslora": True}, {}),
    "dora": ({"dora": True}, {}),
    "saved": ({"modules_to_save": ["norm", "head", "norm_1"]}, {"tie_embeddings": False}),
    "saved, tied": ({"modules_to_save": ["embedding"]}, {"tie_embeddings": True}),
    "embedding": ({"target_modules": ["embedding", "head", "q"]}, {"tie_embeddings": False}),
    "embedding, tied": ({"target_modules": ["embedding", "q"]}, {"tie_embeddings": True}),
    "fused in part": ({"target_modules": ["q", "v", "up", "down"]}, FUSED),
    "fused, pissa": ({"target_modules": ["all-linear"], "init": "pissa"}, FUSED),
    "grouped, dora, bias": ({"dora": True, "bias": "all"}, {"name": "pythia-14m"}),
    "transposed": ({"target_modules": ["q", "k", "v", "down"]}, GPT2),
    "stacks": ({}, STACKED),
    "stacks, routers, bias": ({"target_modules": ["all-linear", "all-router"], "bias": "all"}, STACKED),
    "stacks alone": ({"target_modules": EXPERTS, "init": "pissa", "rslora": True}, STACKED),
    "stacks of squares": ({"target_modules": EXPERTS[2:]}, {**STACKED, "intermediate_size": 32}),
    "turned stacks": ({}, TURNED),
    "turned stacks alone": ({"target_modules": EXPERTS}, TURNED),
    "turned stacks of squares": ({"target_modules": EXPERTS}, {**TURNED, "moe_intermediate_size": 32}),
    "half a stack, routers": ({"target_modules": ["experts.up", "all-router"]}, TURNED),
    "stacks, renamed": ({"target_modules": ["all-linear", "all-router"]}, RENAMED),
    "experts, pissa, rslora": ({"init": "pissa", "rslora": True}, ONE_BY_ONE),
}


def whole(model: GPT) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in adapt.get_adapter_parameters(model).items()}


@pytest.mark.parametrize("case", CASES)
def test_ours_load_in_peft_and_back(case: str, tmp_path: Path) -> None:
    settings = LoRA(**{"r": 4, "alpha": 12, "dropout": 0.1, **CASES[case][0]})
    model = build_adapted(settings, **CASES[case][1]).float()
    perturb(model)
    save_adapter_folder(tmp_path / "adapter", whole(model), config=model.config, settings=settings, base="some/base")
    reference = peft.PeftModel.from_pretrained(build_transformers_model(model, tmp_path / "base"), tmp_path / "adapter")
    assert (reference.eval()(IDS).logits - model(IDS)).abs().max() < 1e-5
    loaded = load_adapter_folder(tmp_path / "adapter", model.config)
    assert loaded.settings == settings and loaded.base == "some/base"
    assert loaded.tensors.keys() == whole(model).keys()
    assert all(torch.equal(loaded.tensors[name], value) for name, value in whole(model).items())


STACKS = ["experts.gate_up_proj", "experts.down_proj"]
THEIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"target_modules": "all-linear"}, {}),
    "some": ({"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "use_dora": True}, {}),
    "bias": ({"target_modules": ["v_proj"], "bias": "all"}, {}),
    "saved": ({"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "model.norm"]}, {"tie_embeddings": False}),
    "patterns": (
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
        {},
    ),
    "embedding": ({"target_modules": ["embed_tokens", "v_proj"]}, {"tie_embeddings": False}),
    "fused": ({"target_modules": ["qkv_proj", "gate_up_proj"]}, FUSED),
    "grouped": ({"target_modules": "all-linear", "use_dora": True}, {"name": "pythia-14m"}),
    "transposed": ({"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}, GPT2),
    "stacks": ({"target_modules": "all-linear", "target_parameters": STACKS}, STACKED),
    "stacks, bias": ({"target_modules": [], "target_parameters": STACKS, "bias": "all"}, STACKED),
    "stacks, patterns": (
        {
            "target_modules": ["q_proj"],
            "target_parameters": [*STACKS, "router.weight"],
            "rank_pattern": {"router.weight": 2, "layers.0.mlp.experts.gate_up_proj": 7},
            "alpha_pattern": {"experts.down_proj": 3},
        },
        STACKED,
    ),
    "turned stacks": ({"target_modules": ["v_proj"], "target_parameters": STACKS, "use_rslora": True}, TURNED),
    "turned stacks of squares": (
        {"target_modules": [], "target_parameters": STACKS},
        {**TURNED, "moe_intermediate_size": 32},
    ),
    "one stack": ({"target_modules": [], "target_parameters": ["layers.1.feed_forward.experts.down_proj"]}, TURNED),
    "stacks, renamed": ({"target_modules": ["v_proj"], "target_parameters": [*STACKS, "router.weight"]}, RENAMED),
    "experts": ({"target_modules": ["v_proj"], "target_parameters": [*STACKS, "gate.weight"]}, ONE_BY_ONE),
}


@pytest.mark.parametrize("case", THEIRS)
def test_theirs_load_in_ours(case: str, tmp_path: Path) -> None:
    settings, changes = THEIRS[case]
    changes = dict(changes)
    base = random_model(small(changes.pop("name", "Qwen2.5-0.5B"), **changes))
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, **settings})
    reference = peft.get_peft_model(build_transformers_model(base, tmp_path / "base"), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = load_adapter_folder(tmp_path / "adapter", base.config)
    assert not torch.allclose(base(IDS), reference.eval()(IDS).logits, atol=1e-3)
    adapt.attach(base, adapter.settings)
    adapt.initialize_adapter(base, adapter.settings, 0)
    adapt.load_adapter(base, adapter.tensors)
    assert (reference(IDS).logits - base(IDS)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        IA3(),
        VeRA(r=3),
        BOFT(),
        FourierFT(n_frequency=9),
        Bone(r=3),
        AdaLoRA(init_r=3, target_r=2),
        AdapterV2(start_layer=1),
        ReFT(layers=[1]),
    ],
    ids=lambda one: type(one).__name__,
)
def test_other_tuners_come_back_to_the_bit(settings: Tuner, tmp_path: Path) -> None:
    model = build_adapted(settings).float()
    perturb(model)
    save_adapter_folder(tmp_path / "adapter", whole(model), config=model.config, settings=settings, base="some/base")
    loaded = load_adapter_folder(tmp_path / "adapter", model.config)
    assert loaded.settings == settings and loaded.base == "some/base"
    other = build_adapted(loaded.settings).float()
    assert not torch.equal(other(IDS), model(IDS))
    adapt.load_adapter(other, loaded.tensors)
    assert torch.equal(other(IDS), model(IDS))


FORMS: dict[str, tuple[Tuner, peft.PeftConfig]] = {
    "AdaLoRA": (
        AdaLoRA(init_r=5, target_r=3, alpha=9),
        peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=12, total_step=9, target_modules=["q_proj", "up_proj"]),
    ),
    "IA3": (
        IA3(target_modules=["k", "q", "down"]),
        peft.IA3Config(target_modules=["k_proj", "q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "VeRA": (VeRA(r=5, projection_seed=3), peft.VeraConfig(r=5, target_modules=["q_proj", "up_proj"], d_initial=0.2)),
    "BOFT": (BOFT(), peft.BOFTConfig(boft_block_size=4, boft_block_num=0, target_modules=["q_proj", "down_proj"])),
    "FourierFT": (
        FourierFT(n_frequency=20, scaling=50.0, frequency_seed=3),
        peft.FourierFTConfig(n_frequency=20, scaling=40.0, random_loc_seed=5, target_modules=["q_proj", "down_proj"]),
    ),
    "Bone": (Bone(r=5), peft.MissConfig(r=3, target_modules=["k_proj", "up_proj"])),
    "Bone, bat": (Bone(r=4, variant="bat"), peft.MissConfig(r=4, init_weights="bat", target_modules=["q_proj"])),
    "Bone, mini": (
        Bone(r=4, variant="mini", mini_r=2),
        peft.MissConfig(r=5, init_weights="mini", mini_r=4, target_modules=["q_proj"]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_tuners_load_in_peft(form: str, tmp_path: Path) -> None:
    settings, _ = FORMS[form]
    model = build_adapted(settings).float()
    perturb(model)
    save_adapter_folder(tmp_path / "adapter", whole(model), config=model.config, settings=settings)
    reference = peft.PeftModel.from_pretrained(build_transformers_model(model, tmp_path / "base"), tmp_path / "adapter")
    assert (reference.eval()(IDS).logits - model(IDS)).abs().max() < 1e-5
    with disable_adapters(model):
        assert (reference(IDS).logits - model(IDS)).abs().max() > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_other_tuners_of_peft_load_in_ours(form: str, tmp_path: Path) -> None:
    base = random_model(small("Qwen2.5-0.5B"))
    reference = peft.get_peft_model(build_transformers_model(base, tmp_path / "base"), FORMS[form][1])
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter_folder(tmp_path / "adapter", base.config)
    adapt.attach(base, adapter.settings)
    adapt.initialize_adapter(base, adapter.settings, 0)
    adapt.load_adapter(base, adapter.tensors)
    assert (reference.eval()(IDS).logits - base(IDS)).abs().max() < 1e-5


@torch.no_grad()
def test_a_folder_of_bone_is_one_of_miss_with_other_names(tmp_path: Path) -> None:
    model = build_adapted(Bone(r=5)).float()
    perturb(model)
    save_adapter_folder(tmp_path / "adapter", whole(model), config=model.config, settings=Bone(r=5))
    file, config = tmp_path / "adapter" / ADAPTER_WEIGHTS, tmp_path / "adapter" / "adapter_config.json"
    tensors = {name.replace("miss_block", "bone_block"): value for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    older = json.loads(config.read_text()) | {"peft_type": "BONE"}
    config.write_text(json.dumps({key: older[key] for key in older if key not in ("mini_r", "miss_dropout")}))
    loaded = load_adapter_folder(tmp_path / "adapter", model.config)
    assert isinstance(loaded.settings, Bone) and (loaded.settings.r, loaded.settings.variant) == (5, "bone")
    assert all(torch.equal(loaded.tensors[name], value) for name, value in whole(model).items())
    config.write_text(json.dumps(older | {"init_weights": False}))
    with pytest.raises(UserError, match="init_weights: False is not one of True, bat, mini; merge it with PEFT"):
        load_adapter_folder(tmp_path / "adapter", model.config)


def test_other_tuners_in_fused_layers_keep_our_names(tmp_path: Path) -> None:
    settings = IA3()
    model = build_adapted(settings, **FUSED).float()
    perturb(model)
    save_adapter_folder(tmp_path / "adapter", whole(model), config=model.config, settings=settings)
    loaded = load_adapter_folder(tmp_path / "adapter", model.config)
    assert loaded.settings == settings
    assert all(torch.equal(loaded.tensors[name], value) for name, value in whole(model).items())


def test_full_training_has_no_adapter(tmp_path: Path) -> None:
    model = build_adapted(Full())
    with pytest.raises(UserError, match="Full adds no adapter; save the model itself"):
        save_adapter_folder(tmp_path / "adapter", whole(model), config=model.config, settings=Full())


def save_adapter(folder: Path, **changes: Any) -> GPT:
    settings = LoRA(r=4)
    model = build_adapted(settings).float()
    save_adapter_folder(folder, whole(model), config=model.config, settings=settings, base="some/base")
    if changes:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return model


def saved_stacks(folder: Path, **changes: Any) -> GPT:
    settings = LoRA(r=4, dropout=0.0, target_modules=EXPERTS)
    model = build_adapted(settings, **TURNED).float()
    perturb(model)
    save_adapter_folder(folder, whole(model), config=model.config, settings=settings)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return model


def test_stacks_that_are_not_turned_are_known_by_their_shapes(tmp_path: Path) -> None:
    model = saved_stacks(tmp_path / "adapter")
    file = tmp_path / "adapter" / ADAPTER_WEIGHTS
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name].unflatten(0, (4, -1)), tensors[other].unflatten(1, (-1, 4))
        tensors[name], tensors[other] = b.permute(2, 1, 0).flatten(0, 1), a.permute(2, 1, 0).flatten(1)
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata)
    loaded = load_adapter_folder(tmp_path / "adapter", model.config)
    assert all(torch.equal(loaded.tensors[name], value) for name, value in whole(model).items())


def test_stacks_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    for number, (names, message) in enumerate(
        {
            ("experts.gate_up_proj_bias",): "experts.gate_up_proj_bias is not supported; use .*experts.gate_up_proj",
            ("experts.down_proj",): r"base_layer.weight: no tensor of this name in the model",
        }.items()
    ):
        saved_stacks(tmp_path / str(number), target_parameters=names)
        with pytest.raises(UserError, match=message) as error:
            load_adapter_folder(tmp_path / str(number), small(**STACKED if number == 0 else TURNED))
        assert "\n" not in str(error.value)
    model = saved_stacks(tmp_path / "other")
    with pytest.raises(UserError, match=r"A \[32, 40\] and B \[32, 32\] are not pairs of 3 experts"):
        load_adapter_folder(tmp_path / "other", type(model.config)(**{**model.config.to_dict(), "n_expert": 3}))


def test_an_adapter_of_another_base_is_refused_in_one_line(tmp_path: Path) -> None:
    config = save_adapter(tmp_path / "adapter").config
    for changes, message in (
        ({"n_embd": 64}, r"trained on some/base\): .* is \[4, 32\], but the model's .* is \[.*64\]; load its own base"),
        ({"n_layer": 1}, r"model.layers.1.*: no tensor of this name in the model; it has model.layers.0"),
        ({"intermediate_size": 40}, "the model's blocks.0.mlp"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_adapter_folder(tmp_path / "adapter", type(config)(**{**config.to_dict(), **changes}))
        assert "\n" not in str(error.value)


def test_damaged_and_foreign_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    model = save_adapter(tmp_path / "kind", peft_type="LOHA")
    with pytest.raises(UserError, match="peft_type: 'LOHA' is not one of LORA, ADALORA, IA3, "):
        load_adapter_folder(tmp_path / "kind", model.config)
    with pytest.raises(UserError, match="no such file"):
        load_adapter_folder(tmp_path / "nowhere", model.config)
    with pytest.raises(UserError, match="already exists"):
        save_adapter(tmp_path / "kind")
    save_adapter(tmp_path / "cut")
    data = (tmp_path / "cut" / ADAPTER_WEIGHTS).read_bytes()
    (tmp_path / "cut" / ADAPTER_WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_adapter_folder(tmp_path / "cut", model.config)


def test_names_and_shapes_are_held_against_the_settings() -> None:
    model = build_adapted(LoRA(r=4))
    for tensors, message in (
        ({}, "the adapter lacks blocks.0.attention.k.lora_a"),
        (whole(model) | {"head.lora_a": torch.zeros(1)}, "the adapter has head.lora_a"),
        (whole(build_adapted(LoRA(r=5))), r"lora_a is \[5, 32\], the model's \[4, 32\]"),
    ):
        with pytest.raises(UserError, match=message):
            adapt.check_adapter(model, tensors)


@pytest.mark.parametrize(("target", "changes"), [("q", FUSED), ("experts.down", STACKED), ("router", TURNED)])
def test_what_of_dora_has_no_form_in_peft(target: str, changes: dict[str, Any], tmp_path: Path) -> None:
    settings = LoRA(target_modules=[target], dora=True)
    model = build_adapted(settings, **changes)
    with pytest.raises(UserError, match="lora_magnitude: not supported in PEFT's format"):
        save_adapter_folder(tmp_path / "adapter", whole(model), config=model.config, settings=settings)
    assert not (tmp_path / "adapter").exists()
    assert copy_base(model)
