"""`generate_full`, `generate_adapter` and `generate_adapter_v2`: the texts of `generate` with the finetuned model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litgpt import LLM, adapt
from litgpt.cli import main
from litgpt.commands.generate_finetuned import load_finetuned
from litgpt.recipe.generate import GenerateFull
from litgpt.recipe.tuner import Adapter, AdapterV2, Tuner
from litgpt.store.adapters.folder import save_adapter_folder
from litgpt.store.tokenizer_files import find_tokenizer_files
from tests.commands.tiny_models import write_tiny_models

Run = Callable[..., str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a finetuned model, the same without its tokenizer, and adapters of a base that is elsewhere."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_models(root, "base", "full")
    shutil.copytree(root / "full", root / "bare")
    for name in find_tokenizer_files(root / "bare"):
        (root / "bare" / name).unlink()
    for name, settings in {"adapter": Adapter(start_layer=0), "adapter-v2": AdapterV2(start_layer=0)}.items():
        write_adapter(root, name, settings)
    return root


def write_adapter(root: Path, name: str, settings: Tuner) -> None:
    llm = LLM.load(root / "base", distribute=None)
    adapt.attach(llm.model, settings)
    values = {key: torch.randn_like(value) for key, value in adapt.get_adapter_parameters(llm.model).items()}
    save_adapter_folder(root / name, values, config=llm.config, settings=settings, base=str(root / "moved"))


@pytest.fixture
def text(models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in the folder of the models, and returns what it prints."""
    monkeypatch.chdir(models)

    def run(*line: str, code: int = 0) -> str:
        flags = ["--temperature", "0", "--max_new_tokens", "9", "--prompt", "the fox"]
        assert main([*line, *flags]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return run


@pytest.mark.parametrize("path", ["full", "full/model.safetensors", "full/lit_model.pth", "bare"])
def test_texts_of_finetuned_weights(text: Run, path: str) -> None:
    expected = text("generate", "full")
    assert text("generate_full", "base", "--finetuned_path", path) == expected != text("generate", "base")


@pytest.mark.parametrize(("command", "path"), [("generate_adapter", "adapter"), ("generate_adapter_v2", "adapter-v2")])
def test_texts_of_adapters(text: Run, models: Path, command: str, path: str) -> None:
    error = text("generate", path, code=1)
    assert f"base_model_name_or_path: {models}/moved is not a folder" in error
    given = text(command, "base", "--adapter_path", f"{path}/lit_model.pth.adapter")
    expected = LLM.load(path, base="base", distribute=None).generate("the fox", max_new_tokens=9, temperature=0)
    assert given == f"the fox{expected}\n" != text("generate", "base")


def test_the_defaults_are_the_outputs_of_the_runs(
    text: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"generate_full": "full", "generate_adapter": "adapter", "generate_adapter_v2": "adapter-v2"}
    expected = [text(command, "base", f"--{key}", names[command]) for command, key in KEYS.items()]
    monkeypatch.chdir(tmp_path)
    for name in names.values():
        shutil.copytree(models / name, tmp_path / "out/finetune" / name / "final")
    assert [text(command, str(models / "base")) for command in names] == expected


KEYS = {"generate_full": "finetuned_path", "generate_adapter": "adapter_path", "generate_adapter_v2": "adapter_path"}


@pytest.mark.parametrize("command", KEYS)
def test_a_folder_that_is_missing_is_named(text: Run, command: str) -> None:
    error = text(command, "base", f"--{KEYS[command]}", "none", code=1)
    assert error.startswith(f"litgpt: error: {KEYS[command]}: none is not a folder")
    assert text(command, "none", code=1).startswith("litgpt: error: checkpoint_dir: none is not a folder")


def test_a_model_is_no_adapter(text: Run) -> None:
    error = text("generate_adapter", "base", "--adapter_path", "full", code=1)
    assert error.startswith(
        "litgpt: error: adapter_path: full holds no adapter alone; give the folder with its adapter_"
    )


def test_an_input_is_written_by_the_prompt_style(text: Run, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "full", tmp_path / "full")
    style = tmp_path / "full/prompt_style.yaml"
    line = ("generate_full", "base", "--finetuned_path", str(tmp_path / "full"), "--input", "a dog")
    assert "has no prompt style, which writes no input; add it to the prompt" in text(*line, code=1)
    style.write_text("class_path: litgpt.prompts.Default\n")
    assert "the prompt style Default, which writes no input" in text(*line, code=1)
    style.write_text("class_path: litgpt.prompts.Alpaca\n")
    llm = LLM.load(tmp_path / "full", distribute=None)
    assert llm.prompt_style is not None
    prompt = llm.prompt_style.apply("the fox", input="a dog")
    assert "### Input:\na dog" in prompt
    expected = llm.generate(prompt, max_new_tokens=9, temperature=0, chat_template=False)
    assert text(*line) == f"{expected}\n"
    recipe = GenerateFull(models / "base", "a dog", finetuned_path=tmp_path / "full")
    assert load_finetuned(recipe).prompt_tokens("the fox") == llm.prompt_tokens(prompt, chat_template=False)


def test_an_input_without_effect_is_named(text: Run) -> None:
    error = text("generate_full", "base", "--input", "x", "--chat_template", "false", code=2)
    assert "input: needs the folder's prompt style, not chat_template: false; leave one of them out" in error
