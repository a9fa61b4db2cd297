"""The recipes of the package by name: `--config NAME`, `litgpt recipes` and `litgpt recipes show`."""

import shutil
from pathlib import Path

import pytest
import yaml

from litgpt.cli import main
from litgpt.data.read.row_sources import parse_source
from litgpt.recipe import config_hub
from litgpt.recipe.config_hub import find_hub_folder, list_hub_recipes


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["pretrain/tinyllama", "tinyllama", "tinyllama.yaml", "config_hub/pretrain/tinyllama.yaml"]
)
def test_a_recipe_is_found_by_its_name(litgpt, name):
    assert litgpt("pretrain", "--config", name).recipe.out_dir == Path("out/pretrain/tiny-llama")


def test_a_file_of_the_working_folder_wins(litgpt, empty):
    (empty / "quickstart.yaml").write_text("model_name: mine\ndata: PythonDocs\ntokenizer_dir: t\n")
    assert litgpt("pretrain", "--config", "quickstart").recipe.model_name == "mine"
    (empty / "tinyllama").mkdir()  # such as the output of a run
    assert litgpt("pretrain", "--config", "tinyllama").recipe.model_name == "tiny-llama-1.1b"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quickstrat", "quickstrat: no such file, and no recipe has that name; did you mean pretrain/quickstart?"),
        ("align/dpo-lroa.yaml", "did you mean align/dpo-lora, "),
        ("lora", "lora: the name of 19 recipes; use one such as finetune/falcon-7b/lora, finetune/"),
        ("zzz", "zzz: no such file, and no recipe has that name; `litgpt recipes` lists the recipes"),
        ("/nowhere/quickstart", "/nowhere/quickstart: no such file"),
    ],
)
def test_an_unknown_name_is_an_error_with_those_that_are_close(litgpt, name, message):
    assert message in litgpt("pretrain", "--config", name).error_line()


def test_recipes_are_listed_with_a_line_each_and_shown(capsys):
    recipes = list_hub_recipes()
    assert len({recipe.name for recipe in recipes}) == len(list(find_hub_folder().rglob("*.yaml"))) > 60
    for recipe in recipes:
        assert recipe.path.read_text().startswith("# ") and recipe.summary.endswith("."), recipe.name
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(line.split()[0], line.split("  ", 1)[1].strip()) for line in lines] == [
        (recipe.name, recipe.summary) for recipe in recipes
    ]
    assert main(["recipes", "align/"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert main(["recipes", "zzz"]) == 1
    assert (
        "prefix: no recipe begins with 'zzz'; use align, finetune, multimodal, pretrain, scale"
        in capsys.readouterr().err
    )
    assert main(["recipes", "show", "quickstart"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model_name"] == "quickstart"


def test_files_of_a_recipe_need_no_clone(empty):
    name = "config_hub/finetune/smollm2/self-cognition.jsonl"
    assert Path(parse_source(f"{name}#3").path) == find_hub_folder().parent / name and parse_source(f"{name}#3").sample
    assert parse_source("config_hub/../pyproject.toml").path == "config_hub/../pyproject.toml"
    (empty / name).parent.mkdir(parents=True)
    (empty / name).touch()
    assert parse_source(name).path == name


def test_recipes_of_an_installed_package_are_inside_of_it(empty, monkeypatch):
    module = empty / "site-packages/litgpt/recipe/config_hub.py"
    shutil.copytree(find_hub_folder(), module.parents[1] / "config_hub")
    find_hub_folder.cache_clear()
    monkeypatch.setattr(config_hub, "__file__", str(module))
    try:
        assert find_hub_folder() == module.parents[1] / "config_hub"
    finally:
        find_hub_folder.cache_clear()
