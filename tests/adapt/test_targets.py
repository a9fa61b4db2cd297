"""The layers that settings name, by our names and by published ones."""

import pytest

from litgpt.adapt.targets import find_targets, get_module_aliases
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.recipe.tuner import LoRA
from tests.adapt.models import build_adapted
from tests.store.models import small

LAYERS = range(2)


def targets(name: str, *suffixes: str, pattern: str | None = None, **changes: object) -> list[str]:
    model = GPT(small(name, **changes))
    return find_targets(model, get_module_aliases(model), suffixes, pattern)


def in_blocks(*names: str) -> list[str]:
    return [f"blocks.{layer}.{name}" for layer in LAYERS for name in names]


EXPERTS = ["mlp.experts.gate", "mlp.experts.up", "mlp.experts.down"]
GATED = ["attention.q", "attention.k", "attention.v", "attention.out", "mlp.gate", "mlp.up", "mlp.down"]


@pytest.mark.parametrize(
    ("name", "suffixes", "expected"),
    [
        ("Llama-2-7b-hf", ["all-linear"], in_blocks(*GATED)),
        ("Llama-2-7b-hf", ["q", "v_proj"], in_blocks("attention.q", "attention.v")),
        ("Llama-2-7b-hf", ["self_attn.o_proj"], in_blocks("attention.out")),
        ("Llama-2-7b-hf", ["blocks.1.mlp.up"], ["blocks.1.mlp.up"]),
        ("Llama-2-7b-hf", ["lm_head", "attention.q"], [*in_blocks("attention.q"), "head"]),
        ("Llama-2-7b-hf", ["mlp", "blocks.1.attention"], [*in_blocks(*GATED[4:])[:3], *in_blocks(*GATED)[7:]]),
        ("Mixtral-8x7B-v0.1", ["all-linear"], in_blocks(*GATED[:4], *EXPERTS)),
        ("Mixtral-8x7B-v0.1", ["all-router"], in_blocks("mlp.router")),
        ("Mixtral-8x7B-v0.1", ["w2", "block_sparse_moe.gate"], in_blocks("mlp.router", "mlp.experts.down")),
        ("Mixtral-8x7B-v0.1", ["gate"], in_blocks("mlp.experts.gate")),
        ("Mixtral-8x7B-v0.1", ["mlp"], in_blocks(*EXPERTS)),
        ("pythia-14m", ["mlp"], in_blocks("mlp.up", "mlp.down")),
        ("pythia-14m", ["query_key_value"], in_blocks("attention.q", "attention.k", "attention.v")),
        ("pythia-14m", ["dense_h_to_4h"], in_blocks("mlp.up")),
        ("pythia-14m", ["all-linear"], in_blocks(*GATED[:4], "mlp.up", "mlp.down")),
    ],
)
def test_suffixes(name: str, suffixes: list[str], expected: list[str]) -> None:
    assert targets(name, *suffixes) == expected


def test_regex_matches_whole_names_and_overrides_suffixes() -> None:
    name = "Llama-2-7b-hf"
    assert targets(name, "q", pattern=r".*\.mlp\.up") == in_blocks("mlp.up")
    assert targets(name, pattern=r"model\.layers\.1\..*_proj") == [f"blocks.1.{part}" for part in GATED]
    with pytest.raises(UserError, match=r"tuner.target_regex: 'mlp' matches nothing in this model"):
        targets(name, pattern="mlp")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_porj"]}, "tuner.target_modules: 'q_porj' matches nothing in this model; .* q_proj"),
        ({"target_modules": ["all-router"]}, "all-router, but this model has no experts; use all-linear"),
        ({"target_modules": ["norm_1"]}, "norm_1 is not a matrix; name it in modules_to_save"),
        ({"target_regex": "[", "target_modules": []}, "tuner.target_regex: .* is not a regular expression"),
        ({"modules_to_save": ["q"]}, "is also in target_modules"),
        ({"modules_to_save": ["norms"]}, "tuner.modules_to_save: 'norms' matches nothing in this model"),
        ({"r": 33, "init": "pissa"}, "tuner.r: 33 is more than the 32"),
        ({"r": 0}, "tuner.r: 0 is not valid"),
        ({"alpha": 0}, "tuner.alpha: 0 is not valid"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_adapted(LoRA(**settings))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
