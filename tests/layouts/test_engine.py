"""Generation with a model that is split over ranks: the same texts and log-probabilities as with one process."""

from dataclasses import replace
from functools import partial

import pytest

from litgpt.infer.engine import Engine
from litgpt.infer.requests import Request
from litgpt.infer.sampling import Sampling
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.parallel.apply import split_model
from litgpt.parallel.forward import run_split_model
from litgpt.parallel.mesh import Mesh
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.parallel import ParallelArgs
from tests.layouts.layouts import SHAPES
from tests.layouts.pool import POOL

LAYOUTS = {
    "tensor": ParallelArgs(tensor=2, sequence=False),
    "pipeline": ParallelArgs(pipeline=2),
    "both": ParallelArgs(tensor=2, pipeline=2, sequence=False),
}
LATENT = replace(SHAPES["dense"], latent_attention=SHAPES["latent"].latent_attention, n_query_groups=None, bias=False)
CONFIGS = {**{name: SHAPES[name] for name in ("dense", "gemma")}, "latent": LATENT}
PROMPTS = [tuple(range(3, 3 + length)) for length in (20, 4, 23)]
Texts = list[list[tuple[int, float | None]]]


def generate(config: Config, settings: ParallelArgs | None, ranks: int) -> Texts:
    """Tokens and log-probabilities of greedy and of sampled texts."""
    model = GPT(config).double().eval()
    initialize(model, 3)
    for parameter in model.parameters():
        parameter.data *= 2  # so that the next token depends on the text
    forward = None
    if settings is not None:
        mesh = Mesh(settings.resolve_dims(ranks), "cpu")
        split_model(model, mesh, settings, PRECISIONS["64-true"])
        forward = partial(run_split_model, model)
    engine = Engine(model, prefill_chunk=16, forward=forward)
    samplings = (Sampling(0), Sampling(temperature=1.5))
    requests = [Request(prompt, 8, sampling, seed=1, logprobs=0) for prompt in PROMPTS for sampling in samplings]
    texts = [[(token.token, token.logprob) for token in sequence.tokens] for sequence in engine.run(requests)]
    if config.latent_attention is not None:  # one vector for all heads
        assert {latents.shape[1] for slab in engine.cache.slabs for latents, _ in slab.layers.values()} == {1}
    return texts


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *[(shape, layout) for shape in ("dense", "gemma") for layout in ("tensor", "pipeline")],
        ("latent", "tensor"),
        *[pytest.param(shape, "both", marks=pytest.mark.slow) for shape in CONFIGS],
    ],
)
def test_texts_of_split_models_are_those_of_one_process(shape: str, layout: str) -> None:
    settings, config = LAYOUTS[layout], CONFIGS[shape]
    expected = generate(config, None, 1)
    assert len({token for text in expected for token, _ in text}) > 8
    ranks = settings.tensor * settings.pipeline
    for texts in POOL.run(generate, config, settings, ranks, ranks=ranks):
        for text, other in zip(texts, expected, strict=True):
            assert [token for token, _ in text] == [token for token, _ in other]
            assert [value for _, value in text] == pytest.approx([value for _, value in other], abs=1e-6)
