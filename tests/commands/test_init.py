"""`litgpt init`: every task, model and machine gives a commented recipe that its command accepts."""

import io
from pathlib import Path

import pytest
import yaml

from litgpt import cli
from litgpt.commands import init
from litgpt.recipe.starting_recipe import load_starting_recipes


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, and no terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())


def write(*flags: str) -> str:
    """Write a recipe and return its text."""
    assert cli.main(["init", *flags, "--dataset", "rows.jsonl"]) == 0
    return Path("recipe.yaml").read_text()


@pytest.mark.parametrize("gpus", [0, 3])
@pytest.mark.parametrize("task", load_starting_recipes())
def test_a_recipe_of_each_task_parses_and_is_commented(litgpt, task, gpus):
    text = write("--task", task, "--model", "pythia-14m", "--gpus", str(gpus))
    assert text.startswith("# ") and text.splitlines()[0].endswith(("GPU memory.", "the CPU."))
    outcome = litgpt(task, "--config", "recipe.yaml")
    assert outcome.code == 0, outcome.err
    recipe, train = outcome.recipe, outcome.recipe.train
    assert train.global_batch_size % (train.micro_batch_size * recipe.devices) == 0 and recipe.devices == max(1, gpus)
    assert ("preference" in yaml.safe_load(text)) == (task in ("dpo", "kto"))
    lines = text.splitlines()
    for number, line in enumerate(lines):
        is_group = line.strip().endswith(":") or "class_path:" in line
        assert line.lstrip().startswith("#") or not line or is_group or lines[number - 1].lstrip().startswith("# "), (
            line
        )


@pytest.mark.parametrize(
    ("task", "memory", "gpus", "settings"),
    [
        ("finetune", 80, 1, {"precision": "bf16-true"}),
        ("finetune", 24, 1, {"precision": "bf16-true", "recompute": {"granularity": "full"}}),
        ("finetune", 8, 1, {"precision": "bf16-true", "quantize": "bnb.nf4", "recompute": {"granularity": "full"}}),
        ("finetune_full", 90, 1, {"precision": "bf16-true", "recompute": {"granularity": "full"}}),
        ("finetune_full", 80, 8, {"precision": "bf16-mixed"}),
    ],
)
def test_the_memory_of_the_gpus_decides_what_saves_memory(task, memory, gpus, settings):
    """Llama 3.1 8B: 8.03 billion parameters, so 16 GB in bfloat16 and 128 GB with AdamW in float32."""
    flags = ["--task", task, "--model", "Llama-3.1-8B", "--gpus", str(gpus), "--gpu_memory", str(memory)]
    tree = yaml.safe_load(write(*flags))
    keys = ("precision", "quantize", "recompute")
    assert {key: tree[key] for key in keys if key in tree} == settings


def test_what_does_not_fit_and_what_is_unknown_is_refused_in_one_line(capsys):
    for flags, message in {
        ("--task=finetune_full", "--model=Llama-3.1-8B", "--gpus=1", "--gpu_memory=24"): "set gpus: 4, or a smaller",
        ("--task=dpo", "--model=pythia-14n", "--gpus=1"): "model 'pythia-14n' is not known; did you mean pythia-14m",
        ("--model=pythia-14m",): "task: missing; set it, as in --task finetune",
        ("--task=finetune", "--model=pythia-14m"): "gpus: missing; set it, as in --gpus 1",
    }.items():
        assert cli.main(["init", *flags, "--dataset=d"]) == 1
        assert message in capsys.readouterr().err
    Path("recipe.yaml").touch()
    assert cli.main(["init"]) == 1
    assert "output: recipe.yaml exists; set another path" in capsys.readouterr().err


def test_questions_on_a_terminal(monkeypatch, capsys):
    questions, answers = [], iter(["", "pythia-14m", "rows.jsonl", "0", "sft", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or next(answers))
    assert cli.main(["init"]) == 0
    assert [question.split()[0] for question in questions] == ["Task", "Model", "Data", "Number"]
    assert yaml.safe_load(Path("recipe.yaml").read_text())["data"]["init_args"]["sources"] == ["rows.jsonl"]
    assert cli.main(["init", "other.yaml"]) == 1
    assert "task: sft is not valid; use another such as finetune" in capsys.readouterr().err
    assert cli.main(["init", "other.yaml", "--task=kto", "--model=pythia-14m"]) == 1
    assert "dataset: missing" in capsys.readouterr().err


def test_a_model_folder_is_a_model():
    settings = init.Init(task="finetune", model=str(Path("m")), dataset="d", gpus=0)
    Path("m").mkdir()
    Path("m/model_config.yaml").write_text(yaml.safe_dump(init.Config.from_name("pythia-14m").to_dict()))
    config, keys, download = init.find_model(settings)
    assert (config.n_layer, keys, download) == (6, {"checkpoint_dir": "m"}, "")
