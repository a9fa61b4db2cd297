"""Command lines: help, exit codes, one-line errors, and what they import."""

import errno
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from litgpt import cli
from litgpt.messages import print_message
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.find_command import FIELD_COMMANDS
from litgpt.recipe.keys import list_keys


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(litgpt, name):
    for topic in ([], ["all"]):
        outcome = litgpt(*name.split(), "--help", *topic)
        assert outcome.code == 0 and outcome.recipe is None and outcome.err == ""
        assert outcome.out.startswith(f"usage: litgpt {name} ") and "\nexample:\n  litgpt " in outcome.out
        assert not any(word in outcome.out for word in ("Annotated", "Ge(", "<class", "REQUIRED", "<object"))
        assert max(map(len, outcome.out.splitlines())) <= 80
    positionals = COMMANDS[name].positionals
    for key in list_keys(COMMANDS[name].import_recipe()):
        assert find_line(outcome.out, key.upper() if key in positionals else f"--{key}") or f"\n{key}:" in outcome.out


def find_line(text: str, start: str) -> str | None:
    """The line of a help text that begins with a key; None if there is none."""
    return next((line for line in text.splitlines() if line.strip().split(" ")[0] == start), None)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_parse(litgpt, name):
    words = shlex.split(COMMANDS[name].example.partition(" > ")[0])
    assert words[: 1 + len(name.split())] == ["litgpt", *name.split()]
    assert litgpt(*words[1:]).recipe is not None


def test_help_begins_with_the_keys_of_a_first_run(litgpt):
    text = litgpt("finetune", "--help").out
    assert len(text.splitlines()) < 100
    for key, default in {
        "CHECKPOINT_DIR": "required",
        "--train.epochs": "default 5",
        "--train.global_batch_size": "default 16",
        "--optimizer.lr": "default 0.001",
        "--out_dir": "default out/finetune/lora",
    }.items():
        assert default in " ".join(text[text.index(f"\n  {key} ") :].split("[")[1].split("]")[0].split())
    rest = text[text.index("more keys, by group:") :]
    assert "  parallel    data_replicate, data_shard" in rest and "lr_warmup_steps" in rest
    assert "--help GROUP" in rest and "--tuner.help" in rest


def test_help_of_one_group(litgpt):
    text = litgpt("pretrain", "--help", "train").out
    assert text.startswith("train:\n  --train.save_interval ") and "--eval.interval" not in text
    for line in (["--train.help"], ["--help=train"], ["x", "--data", "--help", "train"]):
        assert litgpt("pretrain", *line).out == text
    assert litgpt("pretrain", "--help", "data").out == litgpt("pretrain", "--data.help").out
    text = litgpt("pretrain", "--help", "optimizer").out
    assert text.startswith("optimizer:\n  --optimizer.lr ") and "\nclasses of optimizer:\n  AdamW " in text
    assert "trane is not a group of keys; use --help all, or general, tokenizer, train, " in (
        litgpt("pretrain", "--help", "trane").error_line()
    )


def test_help_lists_the_commands(litgpt):
    for argv in ([], ["--help"], ["-h"]):
        outcome = litgpt(*argv)
        assert outcome.code == 0
        assert all(f"\n  {name}" in outcome.out for name in COMMANDS)
        assert max(map(len, outcome.out.splitlines())) <= 80
    assert "did you mean pretrain?" in litgpt("pretrian", "x").error_line()
    assert "did you mean data prepare or data inspect?" in litgpt("data").error_line()
    assert "'--nothing' is not a command" in litgpt("--nothing").error_line()


def test_all_commands_of_litgpt_are_here():
    names = "download chat finetune finetune_lora finetune_full finetune_adapter finetune_adapter_v2 pretrain generate "
    names += "generate_full generate_adapter generate_adapter_v2 generate_sequentially generate_speculatively "
    names += (
        "generate_tp convert_to_litgpt convert_from_litgpt convert_pretrained_checkpoint merge_lora evaluate serve "
    )
    assert set(f"{names}validate".split()) <= set(COMMANDS)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["sft", "--model", "x"], "'sft' is not a command; did you mean finetune?"),
        (["pt"], "'pt' is not a command; did you mean pretrain?"),
        (["train", "x"], "'train' is not a command; did you mean pretrain or finetune?"),
        (["finetune", "lora", "x"], "'finetune lora' is not a command; did you mean finetune_lora?"),
        (["finetune", "adapter", "v2"], "'finetune adapter v2' is not a command; did you mean finetune_adapter_v2?"),
        (["zzz"], "'zzz' is not a command; the commands are pretrain, "),
        (["chatt", "x"], "'chatt' is not a command; did you mean chat?"),
        (["pretrane"], "'pretrane' is not a command; did you mean pretrain?"),
    ],
)
def test_hints_for_commands(litgpt, words, hint):
    assert hint in litgpt(*words).error_line()
    assert all(name in COMMANDS for names in FIELD_COMMANDS.values() for name in names)


def test_a_folder_is_not_taken_for_a_part_of_the_command(litgpt, tmp_path, monkeypatch):
    (tmp_path / "lora").mkdir()
    monkeypatch.chdir(tmp_path)
    assert litgpt("finetune", "lora").recipe.checkpoint_dir == Path("lora")


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["pretrain", "--help"],
        ["pretrain", "x", "--data", "TextFiles", "--data.train_data_path", "a", "--print_config"],
        ["pretrain", "--data.help"],
        ["finetune", "--help", "all"],
    ],
)
def test_help_and_recipes_import_neither_torch_nor_lightning(argv):
    code = (
        "import sys; from litgpt import cli; assert cli.main(sys.argv[1:]) == 0; "
        "sys.exit(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_main_help_does_not_import_the_parser():
    code = "import sys; from litgpt import cli; cli.main(['--help']); sys.exit('jsonargparse' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_as_a_process(tmp_path):
    def run(*argv):
        return subprocess.run([sys.executable, "-m", "litgpt", *argv], capture_output=True, text=True, cwd=tmp_path)

    assert run("--version").stdout.strip().count(".") == 2
    wrong = run("pretrain", "x", "--sed", "1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "litgpt: error: sed is not a key; did you mean seed?\n"


def test_names_of_models(capsys):
    from litgpt import cli

    assert cli.main(["pretrain", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Available values:" and "pythia-14m" in lines and len(lines) > 20


def test_an_error_while_running_is_one_line_with_exit_code_1(monkeypatch, capsys):
    from litgpt import cli
    from litgpt.errors import UserError

    def fail(_recipe):
        raise UserError("checkpoints/x: no such\nfolder")

    real = cli.import_object
    monkeypatch.setattr(cli, "import_object", lambda path: fail if path.endswith(":run") else real(path))
    assert cli.main(["report", "out/x"]) == 1
    assert capsys.readouterr().err == "litgpt: error: checkpoints/x: no such folder\n"

    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_object", lambda path: interrupted if path.endswith(":run") else real(path))
    assert cli.main(["report", "out/x"]) == 130
    assert capsys.readouterr().err == "litgpt: interrupted\n"
    with monkeypatch.context() as patch:
        patch.setattr(cli, "split_arguments", interrupted)
        assert cli.main(["report", "out/x"]) == 130
        assert capsys.readouterr().err == "litgpt: interrupted\n"

    def bug(_recipe):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "import_object", lambda path: bug if path.endswith(":run") else real(path))
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "out/x"])


def test_a_relative_out_dir_is_moved_to_the_artifacts_folder(litgpt, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_ARTIFACTS_DIR", str(tmp_path))
    assert litgpt("pretrain", "x", "--out_dir", "a/b").recipe.out_dir == tmp_path / "a/b"
    assert litgpt("pretrain", "x", "--out_dir", "/a/b").recipe.out_dir == Path("/a/b")
    assert "out_dir: a/b" in litgpt("pretrain", "x", "--out_dir", "a/b", "--print_config").out


def test_schema_prints_json(capsys):
    from litgpt import cli

    assert cli.main(["schema", "pretrain"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Pretrain"
    assert cli.main(["schema", "pretrian"]) == 1
    assert "did you mean pretrain?" in capsys.readouterr().err


def test_import_paths_of_litgpt():
    import litgpt
    from litgpt.args import EvalArgs, LogArgs, TrainArgs
    from litgpt.config import Config, name_to_config

    assert litgpt.Config is Config and litgpt.GPT.__name__ == "GPT"
    assert name_to_config["pythia-14m"]["n_layer"] == 6
    assert (TrainArgs().global_batch_size, EvalArgs().interval, LogArgs().save_logs) == (64, 600, True)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = litgpt.Nothing


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "litgpt", "schema", "pretrain"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_a_full_disk_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(_name: str, _recipe: object, *, dry_run: bool) -> None:  # noqa: ARG001
        raise OSError(errno.ENOSPC, "No space left on device", "out/metrics.csv")

    monkeypatch.setattr(cli, "run_command", fill)
    assert cli.main(["report", "out"]) == 1
    assert capsys.readouterr().err.startswith("litgpt: error: out/metrics.csv: No space left on device; free disk")


def test_processes_of_torchrun_leave_an_error_to_the_first_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends them when the first one exits; without it, every one still says what is wrong."""
    waits: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    for rank, expected in (("0", []), ("1", [cli.OTHERS_WAIT])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.main(["pretrain", "--seeed", "1"]) == 2
        assert capsys.readouterr().err.startswith("litgpt: error: seeed")
        assert waits == expected


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("generate m --prompt TEXT", "prompt"),
        ("generate m --sys_prompt TEXT", "sys_prompt"),
        ("generate m --stop TEXT", "stop"),
        ("generate TEXT", "checkpoint_dir"),
        ("finetune m --eval.sample_prompt TEXT", "eval.sample_prompt"),
        ("finetune m --data Conversations --data.sources [a.jsonl] --data.system TEXT", "data.system"),
        ("pretrain pythia-14m --out_dir TEXT", "out_dir"),
        ("pretrain pythia-14m --model_config.name TEXT", "model_config.name"),
        ("data inspect --data JSON --data.json_path TEXT", "data.json_path"),
    ],
)
def test_a_text_that_is_not_utf8_is_named(line: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = b"a\xffb".decode(errors="surrogateescape")  # as Python reads such a byte on the command line
    assert cli.main(line.replace("TEXT", text).split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error == f"litgpt: error: {key}: 'a\\udcffb' is not UTF-8 at character 2; give it in UTF-8"


def test_a_text_of_a_file_that_is_not_utf8_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text('model_name: pythia-14m\neval: {sample_prompt: "a\\ud800"}\n')
    assert cli.main(["pretrain", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "eval.sample_prompt: 'a\\ud800' is not UTF-8 at character 2" in capsys.readouterr().err
    group = tmp_path / "group.yaml"
    lines = [('key: "a\\ud800"', str(group), f"{group}: eval.key: "), ("", '{"key": "a\\ud800"}', "eval.key: ")]
    for content, value, named in lines:
        group.write_text(content)
        assert cli.main(["pretrain", "pythia-14m", "--eval", value]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error == f"litgpt: error: {named}'a\\ud800' is not UTF-8 at character 2; give it in UTF-8"
    group.write_bytes(b"max_iters: \xff")
    assert cli.main(["pretrain", "pythia-14m", "--eval", str(group)]) == 2
    assert f"{group}:1: not UTF-8 (byte 0xff)" in capsys.readouterr().err


def test_what_every_process_would_say_the_first_one_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = cli.import_object

    def run(_recipe: object) -> None:
        print_message("no validation", "of 3 rows")

    monkeypatch.setattr(cli, "import_object", lambda path: run if path.endswith(":run") else real(path))
    for rank, expected in (("0", "no validation\nof 3 rows\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.main(["report", "out/x"]) == 0
        assert capsys.readouterr().err == expected
