"""The reference of a run: its initial weights, another model, or another adapter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt import adapt
from litgpt.data.modules.preferences import Preferences
from litgpt.errors import UserError
from litgpt.infer.load import open_model, open_with_adapter
from litgpt.model.gpt import GPT
from litgpt.recipe.align import Align
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.tuner import IA3, Full, LLaMAPro, LoRA, Tuner
from litgpt.store.adapters.folder import load_adapter_folder, save_adapter_folder
from litgpt.store.load_model import load_config
from litgpt.store.save_model import save_model_folder
from litgpt.train.build_state import build_train_state
from litgpt.train.initial_weights import find_trained_names
from litgpt.train.reference import hash_parameters
from litgpt.train.run_spec import add_preference, build_finetune_spec
from litgpt.train.train_state import TrainState
from tests.store.models import random_model, small, weights

SHAPE = small("Qwen2.5-0.5B")  # with biases
IDS = torch.arange(12)[None]
CPU = torch.device("cpu")
SETTINGS = LoRA(r=4, dropout=0.3, target_modules=["q", "down"], bias="all")


def save_random_model(folder: Path, seed: int, **changes: Any) -> Path:
    config = small("Qwen2.5-0.5B", **changes)
    save_model_folder(folder, config=config, tensors=weights(random_model(config, seed=seed)))
    return folder


def save_random_adapter(folder: Path, seed: int, settings: Tuner = SETTINGS, **changes: Any) -> Path:
    """An adapter in PEFT's format, with other values than it starts with."""
    config = small("Qwen2.5-0.5B", **changes)
    model = random_model(config)
    adapt.attach(model, settings)
    generator = torch.Generator().manual_seed(seed)
    tensors = adapt.get_adapter_parameters(model)
    values = {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
    save_adapter_folder(folder, values, config=config, settings=settings, base="base")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, another model, and two adapters."""
    folder = tmp_path_factory.mktemp("models")
    save_random_model(folder / "base", 0)
    save_random_model(folder / "other", 1)
    save_random_adapter(folder / "adapter", 2)
    save_random_adapter(folder / "other adapter", 3)
    return folder


def build(folder: Path, reference: str | None = None, adapter: str | None = None, **changes: Any) -> TrainState:
    """The state of a run that aligns the base."""
    settings = {key: changes.pop(key) for key in ("sync_ref_model", "disable_dropout") if key in changes}
    preference = PreferenceArgs(reference=folder / reference if reference else None, **settings)
    recipe = Align(
        folder / "base",
        precision="32-true",
        compile=False,
        data=Preferences(sources=["pairs.jsonl"]),
        initial_adapter_dir=folder / adapter if adapter else None,
        preference=preference,
        **changes,
    )
    spec = build_finetune_spec(recipe, folder / "base", "base", adapter=recipe.initial_adapter_dir)
    spec = add_preference(spec, preference, preference.reference)
    return build_train_state(recipe, spec, None, CPU, resumed=False)


@torch.no_grad()
def compute_logits(model: GPT) -> Tensor:
    was_training = model.training
    logits = model.eval()(IDS)
    model.train(was_training)
    return logits


def compute_expected(folder: Path, name: str) -> Tensor:
    """The logits of a model, or of the base with an adapter."""
    if not name.endswith("adapter"):
        return compute_logits(open_model(folder / name, device=CPU))
    saved = load_adapter_folder(folder / name, load_config(folder / "base"))
    return compute_logits(open_with_adapter(saved, folder / "base", device=CPU))


LORA: dict[str, Any] = {"tuner": SETTINGS}
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "full": ({"tuner": Full()}, "base", "base"),
    "LoRA": (LORA, "base", "base"),
    "LoRA on a quantized base": ({**LORA, "quantize": "bnb.int8-training"}, "", ""),
    "LoRA from an adapter": ({"adapter": "adapter"}, "adapter", "adapter"),
    "full with a model": ({"tuner": Full(), "reference": "other"}, "base", "other"),
    "LoRA with a model": ({**LORA, "reference": "other"}, "base", "other"),
    "LoRA from an adapter with a model": ({"adapter": "adapter", "reference": "other"}, "adapter", "other"),
    "LoRA with an adapter": ({**LORA, "reference": "adapter"}, "base", "adapter"),
    "LoRA from an adapter with another": (
        {"adapter": "adapter", "reference": "other adapter"},
        "adapter",
        "other adapter",
    ),
    "LoRA from an adapter with its base": ({"adapter": "adapter", "reference": "base"}, "adapter", "base"),
    "LLaMAPro with a model": ({"tuner": LLaMAPro(new_blocks=1), "reference": "other"}, "base", "other"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_reference_computes_what_the_settings_name(folder: Path, case: str) -> None:
    settings, policy, reference = CASES[case]
    train_state = build(folder, **settings)
    model, first_hash = train_state.core, hash_parameters(train_state.core)
    first = compute_logits(model)
    assert train_state.reference is not None
    with train_state.reference.applied(model):
        compared = compute_logits(model)
    if policy:
        torch.testing.assert_close(first, compute_expected(folder, policy))
        torch.testing.assert_close(compared, compute_expected(folder, reference))
    assert torch.equal(first, compared) == (policy == reference)
    with torch.no_grad():
        for parameter in train_state.parameters():
            parameter.add_(0.1)
    with train_state.reference.applied(model):
        assert torch.equal(compute_logits(model), compared)
    with torch.no_grad():
        for name, parameter in build(folder, **settings).core.named_parameters():
            model.get_parameter(name).copy_(parameter)
    assert hash_parameters(model) == first_hash


def test_only_weights_that_differ_or_are_trained_are_held(folder: Path) -> None:
    added = {name for name in adapt_names(build(folder, **LORA))}
    held = {
        name: set(train_state.reference.values)
        for name in ("", "adapter", "other")
        if (train_state := build(folder, name or None, **LORA)).reference is not None
    }
    assert held[""] == held["adapter"] == added
    assert held["other"] == set(dict(build(folder, **LORA).core.named_parameters()))


def adapt_names(train_state: TrainState) -> set[str]:
    return set(adapt.get_adapter_parameters(train_state.core))


def test_the_corrections_of_routers_are_held_too() -> None:
    model = GPT(small("Mixtral-8x7B-v0.1", n_expert=4, router_correction=True, router_softmax="before_top_k"))
    names = set(dict(model.requires_grad_(False).named_parameters()))
    assert find_trained_names(model) == {f"blocks.{layer}.mlp.router.correction" for layer in (0, 1)} <= names


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({**LORA, "reference": "nothing"}, "nothing"),
    "a damaged adapter": ({**LORA, "reference": "damaged adapter"}, "adapter_model.safetensors"),
    "an adapter of another rank": (
        {**LORA, "reference": "wide adapter"},
        "is \\[8, 32\\], the model's \\[4, 32\\]; train with the rank .*, or merge",
    ),
    "an adapter of another scale": ({**LORA, "reference": "strong adapter"}, "with a scale of 16.*merge it"),
    "an adapter with other layers": ({**LORA, "reference": "short adapter"}, "lacks .*lora_a.*, or merge it"),
    "another kind of adapter": ({**LORA, "reference": "IA3 adapter"}, "is IA3, but the run trains LoRA.*merge it"),
    "an adapter without one to train": ({"tuner": Full(), "reference": "adapter"}, "tuner: Full trains none; merge it"),
    "an adapter of another base": ({**LORA, "reference": "narrow adapter"}, "adapter"),
    "a model of another shape": ({**LORA, "reference": "narrow"}, "has n_embd: 16, but the model 32"),
    "a model with another rotation": ({**LORA, "reference": "rotated"}, "rope_base"),
    "a moving reference of quantized weights": (
        {**LORA, "reference": "other", "quantize": "bnb.int8-training", "sync_ref_model": True},
        "preference.sync_ref_model: true is not supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_reference_that_does_not_match_is_refused_in_one_line(folder: Path, case: str) -> None:
    settings, message = REFUSED[case]
    narrow = {"n_embd": 16, "head_size": 4}
    name = settings["reference"]
    if name == "damaged adapter":
        path = save_random_adapter(folder / name, 4) / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:200])
    builders = {
        "wide adapter": lambda: save_random_adapter(folder / name, 4, replace(SETTINGS, r=8, alpha=64.0)),
        "strong adapter": lambda: save_random_adapter(folder / name, 4, replace(SETTINGS, alpha=64.0)),
        "short adapter": lambda: save_random_adapter(folder / name, 4, replace(SETTINGS, target_modules=["q"])),
        "IA3 adapter": lambda: save_random_adapter(folder / name, 4, IA3()),
        "narrow adapter": lambda: save_random_adapter(folder / name, 4, **narrow),
        "narrow": lambda: save_random_model(folder / name, 4, **narrow),
        "rotated": lambda: save_random_model(folder / name, 4, rope_base=5000),
    }
    if name in builders:
        builders[name]()
    with pytest.raises(UserError, match=message) as error:
        build(folder, **settings)
    assert "preference." in str(error.value) and "\n" not in str(error.value)


def test_dropout_is_off_unless_it_is_kept(folder: Path) -> None:
    changes = {"model_config": {"dropout": 0.5}}
    model = build(folder, **LORA, **changes).core
    torch.testing.assert_close(model.train()(IDS), compute_logits(model))
    model = build(folder, **LORA, **changes, disable_dropout=False).core
    assert not torch.allclose(model.train()(IDS), compute_logits(model))
