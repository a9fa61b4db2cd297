"""Adapters as models of one base: answers, shared weights, and folders that do not fit."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import torch

from litgpt import LLM, adapt
from litgpt.commands.serve import build_server
from litgpt.errors import UserError
from litgpt.infer.load import open_model
from litgpt.infer.server.app import Server
from litgpt.recipe.serve import Serve
from litgpt.recipe.tuner import LoRA, Tuner
from litgpt.store.adapters.folder import save_adapter_folder
from tests.infer.server.tiny_server import run_server, wait_until_idle, write_tiny_model

ADAPTERS: dict[str, Tuner] = {
    "query": LoRA(r=4, target_modules=["q", "v"]),
    "all": LoRA(r=2, dora=True, modules_to_save=["norm"]),
}


def write_adapter(folder: Path, base: Path, settings: Tuner, seed: int) -> Path:
    """Write an adapter with random values."""
    model = open_model(base, device=torch.device("cpu"))
    adapt.attach(model, settings)
    torch.manual_seed(seed)
    for parameter in adapt.get_adapter_parameters(model).values():
        parameter.data = torch.randn_like(parameter) * 0.3
    save_adapter_folder(
        folder, adapt.get_adapter_parameters(model), config=model.config, settings=settings, base=str(base)
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the base and its adapters, by the names that they are served by."""
    root = tmp_path_factory.mktemp("adapters")
    write_tiny_model(root / "tiny")
    pairs = enumerate(ADAPTERS.items())
    adapters = {name: write_adapter(root / name, root / "tiny", settings, seed) for seed, (name, settings) in pairs}
    return {"tiny": root / "tiny", **adapters}


def build_recipe(folders: dict[str, Path]) -> Serve:
    """The settings of a server of the base and its adapters."""
    adapters = {name: folders[name] for name in ADAPTERS}
    return Serve(checkpoint_dir=folders["tiny"], adapters=adapters, max_new_tokens=16)


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[tuple[str, Server]]:
    with run_server(build_recipe(folders)) as started:
        yield started


@pytest.mark.slow
def test_models_answer_at_a_time_as_each_does_alone(served: tuple[str, Server], folders: dict[str, Path]) -> None:
    client = openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)
    prompts = ["the dog", "a fox jumps", "dogs are kind"]

    def ask(name: str, prompt: str) -> str:
        return client.completions.create(model=name, prompt=prompt, temperature=0).choices[0].text

    with ThreadPoolExecutor(9) as pool:
        answers = {name: [pool.submit(ask, name, prompt) for prompt in prompts] for name in folders}
        texts = {name: [answer.result() for answer in row] for name, row in answers.items()}
    for name, folder in folders.items():
        llm = LLM.load(folder, distribute=None)
        alone = [llm.generate(prompt, max_new_tokens=16, temperature=0, chat_template=False) for prompt in prompts]
        assert texts[name] == alone
    assert len({str(row) for row in texts.values()}) == 3
    wait_until_idle(served[1])
    models = {model.id: getattr(model, "parent", None) for model in client.models.list()}
    assert models == {"tiny": None, "query": "tiny", "all": "tiny"}
    with pytest.raises(openai.NotFoundError, match="use 'tiny' or 'query' or 'all'"):
        ask("other", "the dog")


def test_adapters_share_the_weights_of_their_base(folders: dict[str, Path]) -> None:
    server = build_server(build_recipe(folders))
    base, *adapted = (model.model for model in server.models.values())
    own = {parameter.data_ptr() for parameter in base.parameters()}
    for model, name in zip(adapted, ADAPTERS, strict=True):
        others = {name for name, parameter in model.named_parameters() if parameter.data_ptr() not in own}
        loaded = open_model(folders[name], device=torch.device("cpu"))
        assert others == set(adapt.get_adapter_parameters(loaded))
    assert adapted[0].get_submodule("blocks.0.mlp.up") is base.get_submodule("blocks.0.mlp.up")


def test_an_adapter_of_another_type_shares_the_weights_too(folders: dict[str, Path]) -> None:
    server = build_server(replace(build_recipe(folders), precision="bf16-true"))
    base, query, _ = (model.model for model in server.models.values())
    assert {parameter.dtype for parameter in query.parameters()} == {torch.bfloat16}
    assert query.blocks[0].attention.q.weight is base.blocks[0].attention.q.weight


def test_a_model_with_another_base_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_tiny_model(tmp_path / "other" / "model", seed=2)
    with pytest.raises(UserError, match=r"adapters: other: .*model is not an adapter of .*tiny; serve it with its own"):
        build_server(Serve(checkpoint_dir=folders["tiny"], adapters={"other": tmp_path / "other" / "model"}))
    with pytest.raises(UserError, match=r"adapters: other: .*none is not a folder"):
        build_server(Serve(checkpoint_dir=folders["tiny"], adapters={"other": tmp_path / "none"}))
    with pytest.raises(UserError, match="adapters: tiny is the name of the model itself; set served_model_name"):
        Serve(checkpoint_dir=folders["tiny"], adapters={"tiny": folders["all"]})
    with pytest.raises(UserError, match=r"quantize: bnb.nf4 is not supported with adapters; leave it out"):
        Serve(checkpoint_dir=folders["tiny"], adapters={"all": folders["all"]}, quantize="bnb.nf4")
