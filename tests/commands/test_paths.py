"""The paths of every command: outputs are checked before the command runs, and models have LitGPT's short names."""

from pathlib import Path
from typing import Any

import pytest

from litgpt.cli import main
from litgpt.recipe import keys
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.paths import PATH_KEYS, PathKeys

INPUTS = {"checkpoint_dir", "pretrained_checkpoint_dir", "initial_adapter_dir", "resume", "input"}
INPUTS |= {"prompts", "image", "video", "audio", "text", "include_path", "finetuned_path", "adapter_path"}
INPUTS |= {"codec_dir", "draft_model_checkpoint_dir", "target_model_checkpoint_dir"}
"""Keys of paths that a command reads, in their own ways: `find_folder` resolves short names of the folders."""

LINES: dict[str, list[str]] = {
    "pretrain": ["pythia-14m", "--data", "TextFiles", "--data.train_data_path", "texts"],
    "finetune": ["m", "--data", "JSON", "--data.json_path", "rows.json"],
    "download": ["org/name"],
    "convert_from_litgpt": ["m"],
    "convert_pretrained_checkpoint": ["m"],
    "merge_lora": ["m"],
    "tokenizer train": ["texts"],
    "tokenizer extend": ["m", "codes"],
    "verify": ["m"],
    "report": ["run"],
    "generate": ["m", "--prompts", __file__],
    "generate_speculatively": ["m", "m", "--prompts", __file__],
    "evaluate": ["m", "--tasks", "arc_easy"],
    "data prepare": ["TextFiles", "--data.train_data_path", "texts"],
    "data inspect": ["Conversations", "--data.sources", "[rows.jsonl]"],
}
DATA_OUTPUTS = {
    "TextFiles": ("data.cache_dir", ["--data.train_data_path", "texts"]),
    "Conversations": ("data.cache_dir", ["--data.sources", "[rows.jsonl]"]),
    "PythonDocs": ("data.data_path", []),
    "TinyStories": ("data.data_path", []),
    "OpenWebText": ("data.data_path", []),
    "Alpaca": ("data.download_dir", []),
    "FLAN": ("data.download_dir", []),
}


def list_output_keys() -> list[tuple[str, str]]:
    return [
        (name, key)
        for name, outputs in PATH_KEYS.items()
        for key in (*outputs.folders, *outputs.files)
        if name in LINES
    ]


@pytest.mark.parametrize(("name", "key"), list_output_keys())
def test_an_output_is_checked_before_the_command_runs(litgpt: Any, tmp_path: Path, name: str, key: str) -> None:
    (tmp_path / "file").write_text("x")
    line, file = (["m"], "x.png") if key == "image_out" else (LINES[name], "x.json")
    outcome = litgpt(*name.split(), *line, f"--{key}", tmp_path / "file" / file)
    assert f"{key}: {tmp_path}/file/{file} cannot be written (Not a directory)" in outcome.error_line()


@pytest.mark.parametrize("data", DATA_OUTPUTS)
@pytest.mark.parametrize("name", ["data prepare", "pretrain"])
def test_the_folder_of_the_data_is_checked_too(litgpt: Any, tmp_path: Path, name: str, data: str) -> None:
    key, flags = DATA_OUTPUTS[data]
    (tmp_path / "file").write_text("x")
    words = ["pythia-14m", "--data", data] if name == "pretrain" else [data]
    outcome = litgpt(*name.split(), *words, *flags, f"--{key}", tmp_path / "file")
    assert outcome.error_line().startswith(f"{key}: {tmp_path}/file cannot be written")


def test_the_folder_of_the_default_data_is_checked_too(
    litgpt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text("x")
    outcome = litgpt("finetune_lora", "m", "--out_dir", "out")
    assert outcome.error_line().startswith("data.download_dir: data/alpaca cannot be written (Not a directory)")


def test_what_a_logger_writes_is_checked_too(litgpt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").mkdir()
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("WANDB_DIR", "file")
    line = ["pretrain", "pythia-14m", "--data", "PythonDocs", "--logger_name"]
    assert litgpt(*line, "wandb").error_line().startswith("WANDB_DIR: file cannot be written (")
    assert litgpt(*line, "mlflow").error_line().startswith("MLFLOW_TRACKING_URI: mlflow.db cannot be written (")
    assert litgpt(*line, "csv").code == 0


def test_remote_data_is_not_written(litgpt: Any) -> None:
    assert litgpt("data", "prepare", "OpenWebText", "--data.data_path", "s3://bucket/owt").code == 0


@pytest.mark.parametrize("line", [["pretrain", "list", "--out_dir"], ["download", "list", "--checkpoint_dir"]])
def test_a_list_of_names_needs_no_output(tmp_path: Path, line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main([*line, str(tmp_path / "file" / "x")]) == 0
    assert "pythia-14m" in capsys.readouterr().out


def test_every_path_of_a_recipe_is_known() -> None:
    inputs = {
        "report": {"out_dir"},
        "explain": {"file"},
        "plan": {"gpu_file", "layout_file", "page_file"},
        "board": {"folder"},
    }
    unknown = []
    for name, command in COMMANDS.items():
        read = INPUTS | inputs.get(name, set())
        known = {key for group in PATH_KEYS.get(name, PathKeys()) for key in group} | read
        for key, (hint, _) in keys.list_settings(command.import_recipe()).items():
            if Path in keys.list_types(hint) and key not in known:
                unknown.append(f"{name}: {key}")
    assert unknown == []


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, paths in PATH_KEYS.items() for key in paths.models])
def test_models_are_given_by_short_names(
    litgpt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints/EleutherAI/pythia-14m").mkdir(parents=True)
    others = {"pretrain": ["pythia-14m"], "data": ["PythonDocs"], "tokenizer": ["--codec_dir", "codes"]}
    words = others.get(name.split()[0], [])
    output = ["--output_dir", "new"] if "output_dir" in PATH_KEYS[name].folders else []
    recipe = litgpt(*name.split(), *words, f"--{key}", "EleutherAI/pythia-14m", *output).recipe
    assert getattr(recipe, key) == Path("checkpoints/EleutherAI/pythia-14m")


def test_a_path_that_fails_later_has_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_recipe: object) -> None:
        (tmp_path / "file").write_text("x")
        (tmp_path / "file" / "x").mkdir()

    monkeypatch.setattr("litgpt.commands.validate.run", fail)
    assert main(["validate", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"litgpt: error: {tmp_path}/file/x: Not a directory; ")
