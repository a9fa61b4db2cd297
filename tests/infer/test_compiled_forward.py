"""A compiled forward pass: the texts of the uncompiled one, two graphs, the weights as they are, and clear refusals."""

import copy
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.utils import counters

from litgpt.errors import UserError
from litgpt.infer.engine import Engine
from litgpt.infer.requests import Request
from litgpt.infer.sampling import Sampling
from litgpt.model.attention import Attention
from tests.model.test_attention import KINDS, small
from tests.model.test_latent import SHAPES
from tests.model.test_latent import small as small_latent

GREEDY = Sampling(temperature=0)
PROMPTS = [tuple(range(5, 45)), tuple(range(7, 30)), (9, 8, 7), (9, 8, 7, 6)]


def list_ids(engine: Engine) -> list[list[int]]:
    """Texts of one prompt, and of several that share passes."""
    texts = engine.run([Request(PROMPTS[0], 6, GREEDY)]) + engine.run([Request(ids, 12, GREEDY) for ids in PROMPTS])
    return [[token.token for token in text.tokens] for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alternating", "latent"])
def test_texts_equal_those_without_compilation_with_two_graphs(kind: str) -> None:
    torch.compiler.reset()
    model = small_latent(**SHAPES[next(iter(SHAPES))]) if kind == "latent" else small(**KINDS[kind])
    expected = list_ids(Engine(copy.deepcopy(model), prefill_chunk=16))
    counters.clear()
    engine = Engine(model, prefill_chunk=16, compile=True)
    assert list_ids(engine) == expected
    assert counters["stats"]["unique_graphs"] == 2  # of one token and of several
    assert not counters["graph_break"]


@pytest.mark.slow
def test_one_text_in_bfloat16_is_multiplied_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    model = small(**KINDS["alternating"]).bfloat16()
    request = Request(PROMPTS[1], 4, GREEDY, logprobs=1)
    expected = Engine(copy.deepcopy(model)).run([request])[0].tokens
    kernels: set[tuple[int, bool]] = set()
    attend = Attention.attend_cached

    def record_kernels(self: Attention, q_BHTS: Tensor, *rest: Any) -> Tensor:
        kernels.add((q_BHTS.shape[2], torch._C._get_mkldnn_enabled()))
        return attend(self, q_BHTS, *rest)

    monkeypatch.setattr(Attention, "attend_cached", record_kernels)
    actual = Engine(model, compile=True).run([request])[0].tokens
    assert kernels == {(len(PROMPTS[1]), True), (1, False)} and torch._C._get_mkldnn_enabled()
    assert [token.token for token in actual] == [token.token for token in expected]
    assert [token.logprob for token in actual] == pytest.approx([token.logprob for token in expected], abs=0.02)


@pytest.mark.slow
def test_changed_weights_are_compiled_again() -> None:
    torch.compiler.reset()
    model = small()
    engine = Engine(model, compile=True)
    before = list_ids(engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected = list_ids(Engine(copy.deepcopy(model)))
    assert list_ids(engine) == expected != before


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_named_in_one_line() -> None:
    torch.compiler.reset()
    changed = {"cpp.cxx": (None, "no-such-compiler")}
    # patched by torch itself: pytest's monkeypatch leaves an alias among these settings deleted
    with (
        torch._inductor.config.patch(changed),
        torch.compiler.config.patch(force_disable_caches=True),
        pytest.raises(UserError, match=r"^compile: true is not possible on this machine .*InvalidCxx.*false$"),
    ):
        list_ids(Engine(small(), compile=True))


def test_a_model_of_experts_is_refused_in_one_line() -> None:
    experts: dict[str, Any] = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2}
    model = small(**experts, moe_intermediate_size=16)
    with pytest.raises(UserError, match=r"compile: true is not supported for this model .*; set compile: false"):
        list_ids(Engine(model, compile=True))
