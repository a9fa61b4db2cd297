"""Command lines: what they come to, and how they say what is wrong."""

import errno
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from litgpt import cli
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.data import DATA_MODULES
from litgpt.recipe.optimizer import SGD, AdamW, AdamW8bit, Custom, Muon

EVERY_KEY = """
model_name: pythia-14m
model_config:
out_dir: out/mine
precision: bf16-mixed
initial_checkpoint_dir:
resume: false
data:
train:
  save_interval: 10
  log_interval: 2
  global_batch_size: 16
  micro_batch_size: 2
  lr_warmup_steps: 5
  lr_warmup_fraction:
  epochs:
  max_tokens: 3000
  max_steps:
  max_time:
  max_seq_length: 64
  tie_embeddings:
  max_norm: 1.0
  min_lr: 6e-5
eval:
  interval: 3
  max_new_tokens:
  max_iters: 7
  initial_validation: true
  final_validation: false
  evaluate_example: first
log:
  project: p
  run: r
  group:
  teamspace:
  metadata:
  log_model: false
  save_logs: true
  checkpoint_name:
optimizer:
  class_path: AdamW
  init_args:
    lr: 4e-4
    weight_decay: 0.1
    betas: [0.9, 0.95]
devices: auto
num_nodes: 1
tokenizer_dir: checkpoints/x
logger_name: csv
seed: 7
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A recipe file with every key that LitGPT's pretrain has."""
    path = tmp_path / "mine.yaml"
    path.write_text(EVERY_KEY)
    return str(path)


def one_line(outcome, code: int = 2) -> str:
    """The one line of an error, after a check that it is one and that nothing ran."""
    assert outcome.code == code
    assert outcome.recipe is None
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("litgpt: error: "), outcome.err
    return lines[0].removeprefix("litgpt: error: ")


def test_every_key_of_litgpt_parses(litgpt, config):
    recipe = litgpt("pretrain", "--config", config).recipe
    assert (recipe.model_name, recipe.out_dir, recipe.seed) == ("pythia-14m", Path("out/mine"), 7)
    assert recipe.model_config is None and recipe.data is None and recipe.initial_checkpoint_dir is None
    assert (recipe.train.max_tokens, recipe.train.min_lr, recipe.train.max_norm) == (3000, 6e-5, 1.0)
    assert (recipe.eval.interval, recipe.eval.initial_validation, recipe.log.project) == (3, True, "p")
    assert recipe.optimizer == AdamW(lr=4e-4, weight_decay=0.1, betas=(0.9, 0.95))


def test_pretraining_has_the_defaults_of_litgpt(litgpt):
    recipe = litgpt("pretrain", "pythia-14m").recipe
    train = recipe.train
    assert (train.global_batch_size, train.micro_batch_size, train.lr_warmup_steps) == (512, 4, 2000)
    assert (train.max_tokens, train.max_norm, train.min_lr) == (3 * 10**12, 1.0, 4e-5)
    assert (recipe.eval.interval, recipe.logger_name, recipe.seed) == (1000, "tensorboard", 42)
    assert litgpt("pretrain", "x", "--train.max_steps", "9").recipe.train.max_tokens is None


@pytest.mark.parametrize("spelling", ["1000000000", "1_000_000_000", "1e9", "1.0E+9", "1000000000.0"])
@pytest.mark.parametrize("key", ["train.max_tokens", "train.max_steps"])
def test_whole_numbers_have_many_spellings(litgpt, tmp_path, key, spelling):
    group, name = key.split(".")
    assert getattr(litgpt("pretrain", "x", f"--{key}", spelling).recipe.train, name) == 10**9
    (tmp_path / "t.yaml").write_text(f"model_name: x\n{group}:\n  {name}: {spelling}\n")
    value = getattr(litgpt("pretrain", "--config", tmp_path / "t.yaml").recipe.train, name)
    assert value == 10**9 and type(value) is int


@pytest.mark.parametrize("value", ["1.5", "1e-9", "nan", "inf", "1e999999999", "true", "[1]", "-3", "0", "", "many"])
def test_other_numbers_are_refused(litgpt, value):
    assert "train.max_steps" in one_line(litgpt("pretrain", "x", f"--train.max_steps={value}"))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_flags_win_over_files_in_either_order(litgpt, config, order):
    parts = [["--config", config], ["--train.lr_warmup_steps=200", "--optimizer.lr", "0.005", "--seed", "1"]]
    recipe = litgpt("pretrain", *parts[order[0]], *parts[order[1]]).recipe
    assert (recipe.train.lr_warmup_steps, recipe.optimizer.lr, recipe.seed) == (200, 0.005, 1)
    assert (recipe.optimizer.weight_decay, recipe.train.max_tokens) == (0.1, 3000)


def test_later_files_win_over_earlier_ones(litgpt, config, tmp_path):
    (tmp_path / "more.yaml").write_text("seed: 8\ntrain: {max_tokens: 10}\noptimizer: {init_args: {lr: 0.25}}\n")
    recipe = litgpt("pretrain", "--config", config, "--config", tmp_path / "more.yaml").recipe
    assert (recipe.seed, recipe.train.max_tokens, recipe.train.micro_batch_size) == (8, 10, 2)
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (0.25, (0.9, 0.95))


def test_the_line_names_the_model_over_the_file(litgpt, config):
    assert litgpt("pretrain", "pythia-70m", "--config", config).recipe.model_name == "pythia-70m"
    assert litgpt("pretrain", "--config", config, "--model_name", "a").recipe.model_name == "a"
    assert "model_name: missing" in one_line(litgpt("pretrain"))
    assert "one word too many" in one_line(litgpt("pretrain", "a", "b"))


def test_groups_come_from_files_of_their_own(litgpt, tmp_path):
    (tmp_path / "t.yaml").write_text("micro_batch_size: 8\nmax_steps: 3\n")
    (tmp_path / "e.yaml").write_text("interval: 5\n")
    (tmp_path / "l.yaml").write_text("run: mine\n")
    flags = ["--train.max_steps", "4", "--train", tmp_path / "t.yaml"]
    recipe = litgpt("pretrain", "x", *flags, "--eval", tmp_path / "e.yaml", "--log", tmp_path / "l.yaml").recipe
    assert (recipe.train.micro_batch_size, recipe.train.max_steps) == (8, 4)
    assert (recipe.eval.interval, recipe.log.run) == (5, "mine")
    (tmp_path / "t.yaml").write_text("micro_batch_sise: 8\n")
    line = one_line(litgpt("pretrain", "x", "--train", tmp_path / "t.yaml"))
    assert line == "train.micro_batch_sise is not a key; did you mean train.micro_batch_size?"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--optimizer", "AdamW", "--optimizer.lr", "0.1"], AdamW(lr=0.1)),
        (["--optimizer.init_args.lr", "0.1"], AdamW(lr=0.1)),
        (["--optimizer.lr=1e-1", "--optimizer", "SGD"], SGD(lr=0.1)),
        (["--optimizer", "torch.optim.SGD", "--optimizer.momentum", "0.5"], SGD(momentum=0.5)),
        (["--optimizer", '{"class_path": "Muon", "init_args": {"lr": 0.1}}'], Muon(lr=0.1)),
        (["--optimizer", "bitsandbytes.optim.AdamW8bit", "--optimizer.lr", "0.1"], AdamW8bit(lr=0.1)),
        (["--optimizer.betas", "[0.8, 0.9]"], AdamW(betas=(0.8, 0.9))),
        (["--optimizer", "Adagrad"], Custom(lr=0.01, path="torch.optim.Adagrad")),
        (
            ["--optimizer", "torch.optim.Adam", "--optimizer.lr", "4e-4", "--optimizer.eps", "1e-6"],
            Custom(lr=4e-4, path="torch.optim.Adam", arguments={"eps": 1e-6}),
        ),
    ],
)
def test_every_way_to_set_the_optimizer_takes_effect(litgpt, flags, expected):
    assert litgpt("pretrain", "x", *flags).recipe.optimizer == expected


@pytest.mark.parametrize(
    "text", ["optimizer: SGD", "optimizer: {class_path: SGD}", "optimizer: {class_path: torch.optim.SGD}"]
)
def test_another_optimizer_forgets_the_settings_of_the_first(litgpt, config, tmp_path, text):
    (tmp_path / "more.yaml").write_text(text)
    assert litgpt("pretrain", "--config", config, "--config", tmp_path / "more.yaml").recipe.optimizer == SGD()
    assert litgpt("pretrain", "--config", config, "--optimizer", "AdamW").recipe.optimizer.lr == 4e-4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train.lr_warmup_step", "3"], "train.lr_warmup_step is not a key; did you mean train.lr_warmup_steps?"),
        (["--trian.max_steps", "3"], "did you mean train.max_steps?"),
        (["--max_steps", "3"], "max_steps is not a key; did you mean train.max_steps?"),
        (["--optimizer.learning_rate", "3"], "optimizer.learning_rate is not a key"),
        (["--optimizer", "Adamw"], "did you mean AdamW?"),
        (["--optimizer", "torch.optim.Nothing"], "optimizer: there is no class torch.optim.Nothing"),
        (["--optimizer", "no.such.Thing"], "optimizer: 'no.such.Thing' cannot be imported"),
        (["--optimizer", "torch.optim.Adagrad", "--optimizer.lrr", "1"], "did you mean optimizer.lr?"),
        (["--data", "TextFile"], "did you mean TextFiles?"),
        (["--optimizer", "os.stat_result"], "optimizer: os.stat_result is no optimizer"),
        (["--data", "pathlib.Path"], "data: pathlib.Path is no DataModule"),
        (["--precision", "bf16"], "precision: 'bf16' will not do; give 32-true or bf16-mixed"),
        (["--resume", "true", "--initial_checkpoint_dir", "a"], "resume: True and initial_checkpoint_dir: a exclude"),
        (["--eval.max_new_tokens", "5"], "eval.max_new_tokens: 5 is not for pretraining"),
        (
            ["--train.lr_warmup_fraction", "0.1"],
            "train.lr_warmup_fraction: 0.1 and train.lr_warmup_steps: 2000 exclude",
        ),
        (
            ["--train.lr_warmup_fraction", "1.5"],
            "train.lr_warmup_fraction: '1.5' will not do; give a number from 0 to 1",
        ),
        (
            ["--train.micro_batch_size", "1000"],
            "train.micro_batch_size: 1000 is more than train.global_batch_size: 512",
        ),
        (["--train.min_lr", "0.5"], "train.min_lr: 0.5 is above the optimizer's lr: 0.001"),
        (["--optimizer.lr", "nan"], "optimizer.lr: 'nan' will not do; give a number from 0 to 1000"),
        (["--seed", "-1"], "seed: -1 will not do; give a whole number from 0 to 4294967295, such as 42"),
        (["--out_dir", ""], "out_dir: '' will not do; give a path, such as out/pretrain"),
        (["--devices", "0"], "devices: 0 will not do; give auto or a number from 1"),
        (["--devices", "3"], "is no multiple of micro_batch_size x data ranks = 4 x 3 = 12; 504 or 516 would do"),
        (["--devices", "4", "--parallel.data_replicate", "2", "--parallel.data_shard", "4"], "2 x 4 = 8"),
        (["--tokenizer.kind", "bpe", "--tokenizer_dir", "x"], "tokenizer: bpe and tokenizer_dir: x exclude"),
        (["--tokenizer.vocab_size", "100"], "tokenizer.vocab_size: 100 is too few for bpe; give 512 or more"),
        (["--tokenizer.kind", "words"], "tokenizer.kind: 'words' will not do; give bpe or bytes"),
        (["--train", "no.yaml"], "no.yaml: no such file"),
        (["--train.max_steps"], "--train.max_steps: needs a value"),
        (["--logger_name", "litlogger"], "logger_name: 'litlogger' will not do; give csv or tensorboard"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(litgpt, flags, said):
    assert said in one_line(litgpt("pretrain", "x", *flags))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seed: 1\nseed: 2\n", "bad.yaml:2: not valid YAML (key 'seed' is there twice)"),
        (b"seed: [1\n", "bad.yaml:2: not valid YAML"),
        (b"a: *b\n", "bad.yaml:1: not valid YAML (aliases are not read)"),
        (b"- seed\n", "bad.yaml: holds a list, not keys and values"),
        (b"seed: \xff\n", "bad.yaml: not text in UTF-8 (byte 6)"),
        (b"seed: \x00\n", "bad.yaml: not valid YAML"),
        (b"1: 2\n", "bad.yaml:1: not valid YAML (key 1 is not a word)"),
        (b"a: " + b"[" * 5000, "bad.yaml: nested too deeply"),
        (b"seed: 2024-13-45\n", "bad.yaml: not valid YAML (month must be in 1..12)"),
        (b"!!python/object/apply:os.system [ls]\n", "bad.yaml:1: not valid YAML"),
        (b"data: [1]\n", "data: [1] will not do"),
        (b"train: 7\n", "train: 7 will not do; give keys and values"),
        (b"optimizer: {class_path: 3}\n", "optimizer.class_path: 3 will not do"),
        (b"optimizer: {class_path: AdamW, init_args: 3}\n", "optimizer.init_args: 3 will not do"),
        (b"model_config: 5\n", "model_config: 5 will not do; give keys and values or null"),
    ],
)
def test_a_bad_file_is_said_in_one_line(litgpt, tmp_path, content, said):
    (tmp_path / "bad.yaml").write_bytes(content)
    assert said in one_line(litgpt("pretrain", "x", "--config", tmp_path / "bad.yaml"))


def test_a_missing_file_and_a_folder_are_said_in_one_line(litgpt, tmp_path):
    assert f"{tmp_path}/no.yaml: no such file" in one_line(litgpt("pretrain", "--config", tmp_path / "no.yaml"))
    assert f"{tmp_path}: cannot be read (Is a directory)" in one_line(litgpt("pretrain", "--config", tmp_path))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server over the test's folder; its address."""
    monkeypatch.setenv("NO_PROXY", "*")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_recipe_comes_from_a_url(litgpt, config, site, own_module):
    recipe = litgpt("pretrain", "--config", f"{site}/mine.yaml", "--seed", "1").recipe
    assert (recipe.seed, recipe.train.max_tokens) == (1, 3000)
    assert "404" in one_line(litgpt("pretrain", "--config", f"{site}/no.yaml"))
    chosen = litgpt("pretrain", "--config", f"{site}/mine.yaml", "--data", own_module, "--data.path", "a")
    assert chosen.recipe.data.path == "a"


@pytest.mark.parametrize(
    "text", ["data: {class_path: own_letters.Letters}", "optimizer: own.Thing", "optimizer: {class_path: os.system}"]
)
def test_a_recipe_from_a_url_names_no_foreign_class(litgpt, tmp_path, site, text):
    (tmp_path / "their.yaml").write_text(f"model_name: x\n{text}\n")
    assert "is refused because the recipe comes from a URL" in one_line(
        litgpt("pretrain", "--config", f"{site}/their.yaml")
    )


def test_data_of_the_users_own(litgpt, own_module, tmp_path):
    recipe = litgpt("pretrain", "x", "--data.path", "a", "--data", own_module, "--data.copies", "1e2").recipe
    assert (recipe.data.path, recipe.data.copies) == ("a", 100)
    (tmp_path / "d.yaml").write_text(f"model_name: x\ndata:\n  class_path: {own_module}\n  init_args: {{path: b}}\n")
    recipe = litgpt("pretrain", "--config", tmp_path / "d.yaml", "--data.share", "5e-1").recipe
    assert (recipe.data.path, recipe.data.share) == ("b", 0.5)
    assert "data.path: missing" in one_line(litgpt("pretrain", "x", "--data", own_module))
    assert "data.copies: 'a' will not do; give a whole number" in one_line(
        litgpt("pretrain", "x", "--data", own_module, "--data.path", "a", "--data.copies", "a")
    )
    line = one_line(litgpt("pretrain", "x", "--data", own_module, "--data.path", "a", "--data.copy", "1"))
    assert line == "data.copy is not a key; did you mean data.copies?"


@pytest.mark.parametrize("name", DATA_MODULES)
def test_help_for_each_data_module(litgpt, name):
    outcome = litgpt("pretrain", "--data.help", name)
    assert outcome.code == 0 and outcome.recipe is None
    assert "--data." in outcome.out


def test_help_for_choices(litgpt):
    listed = litgpt("pretrain", "--data.help").out
    assert all(f"  {name} " in listed for name in DATA_MODULES)
    assert len(listed.splitlines()) == len(DATA_MODULES)
    assert "--optimizer.momentum" in litgpt("pretrain", "--optimizer.help", "SGD").out
    assert "seed has no classes to choose from" in one_line(litgpt("pretrain", "--seed.help"))


def test_text_files_from_the_line(litgpt):
    recipe = litgpt("pretrain", "x", "--data", "TextFiles", "--data.train_data_path", "texts").recipe
    assert type(recipe.data).__name__ == "TextFiles" and str(recipe.data.train_data_path) == "texts"
    assert "data.train_data_path: missing" in one_line(litgpt("pretrain", "x", "--data", "litgpt.data.TextFiles"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(litgpt, name):
    outcome = litgpt(*name.split(), "--help")
    assert outcome.code == 0 and outcome.recipe is None and outcome.err == ""
    assert outcome.out.startswith(f"usage: litgpt {name}")
    assert "Annotated" not in outcome.out and "Ge(" not in outcome.out


def test_help_names_the_commands(litgpt):
    for argv in ([], ["--help"], ["-h"]):
        outcome = litgpt(*argv)
        assert outcome.code == 0
        assert all(f"  {name} " in outcome.out for name in COMMANDS)
    assert "did you mean pretrain?" in one_line(litgpt("pretrian", "x"))
    assert "did you mean data prepare or data inspect?" in one_line(litgpt("data"))
    assert "'--nothing' is not a command" in one_line(litgpt("--nothing"))


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["pretrain", "--help"],
        ["pretrain", "x", "--data", "TextFiles", "--data.train_data_path", "a", "--print_config"],
        ["pretrain", "--data.help"],
    ],
)
def test_help_and_recipes_import_neither_torch_nor_lightning(argv):
    code = (
        "import sys; from litgpt import cli; assert cli.main(sys.argv[1:]) == 0; "
        "sys.exit(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_top_of_the_help_imports_no_parser():
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


def test_an_error_while_running_is_one_line_with_another_code(monkeypatch, capsys):
    from litgpt import cli
    from litgpt.errors import UserError

    def fail(recipe):
        raise UserError("checkpoints/x: no such\nfolder")

    real = cli.import_object
    monkeypatch.setattr(cli, "import_object", lambda path: fail if path.endswith(":run") else real(path))
    assert cli.main(["report", "out/x"]) == 1
    assert capsys.readouterr().err == "litgpt: error: checkpoints/x: no such folder\n"

    def interrupted(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_object", lambda path: interrupted if path.endswith(":run") else real(path))
    assert cli.main(["report", "out/x"]) == 130
    assert capsys.readouterr().err == ""

    def bug(recipe):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "import_object", lambda path: bug if path.endswith(":run") else real(path))
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "out/x"])


def test_relative_output_goes_under_the_artifacts_folder(litgpt, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_ARTIFACTS_DIR", str(tmp_path))
    assert litgpt("pretrain", "x", "--out_dir", "a/b").recipe.out_dir == tmp_path / "a/b"
    assert litgpt("pretrain", "x", "--out_dir", "/a/b").recipe.out_dir == Path("/a/b")
    assert "out_dir: a/b" in litgpt("pretrain", "x", "--out_dir", "a/b", "--print_config").out


def test_the_shape_of_the_model_from_the_line(litgpt, tmp_path):
    (tmp_path / "m.yaml").write_text("model_name: x\nmodel_config: {n_layer: 4, bias: false}\n")
    flags = ["--model_config.n_layer", "2", "--model_config.norm_class_name", "RMSNorm", "--model_config.norm_eps=1e-6"]
    recipe = litgpt("pretrain", "--config", tmp_path / "m.yaml", *flags).recipe
    assert recipe.model_config == {"n_layer": 2, "bias": False, "norm_class_name": "RMSNorm", "norm_eps": 1e-6}


@pytest.mark.parametrize("value", [True, False, "auto", "out/step-00000004"])
def test_resume(litgpt, value):
    recipe = litgpt("pretrain", "x", "--resume", str(value).lower() if isinstance(value, bool) else value).recipe
    assert recipe.resume == (Path(value) if isinstance(value, str) and "/" in value else value)


@pytest.mark.parametrize("flags", ["", "skip_default", "skip_null", "skip_default,skip_null"])
def test_print_config_reads_back_the_same(litgpt, config, own_module, tmp_path, flags):
    line = ["--config", config, "--data", own_module, "--data.path", "a", "--optimizer", "Adagrad", "--compile", "true"]
    outcome = litgpt("pretrain", *line, f"--print_config={flags}" if flags else "--print_config")
    assert outcome.recipe is None and outcome.code == 0
    (tmp_path / "again.yaml").write_text(outcome.out)
    assert litgpt("pretrain", "--config", tmp_path / "again.yaml").recipe == litgpt("pretrain", *line).recipe
    assert ("num_nodes" in outcome.out) == ("skip_default" not in flags)
    assert "skip_null" not in flags or "null" not in outcome.out


def test_print_config_needs_no_model(litgpt):
    assert yaml.safe_load(litgpt("pretrain", "--print_config").out)["model_name"] is None
    assert "skip_all" in one_line(litgpt("pretrain", "--print_config=skip_all"))


def test_schema_prints_json(capsys):
    from litgpt import cli

    assert cli.main(["schema", "pretrain"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Pretrain"
    assert cli.main(["schema", "pretrian"]) == 1
    assert "did you mean pretrain?" in capsys.readouterr().err


def test_names_that_scripts_import():
    import litgpt
    from litgpt.args import EvalArgs, LogArgs, TrainArgs
    from litgpt.config import Config, name_to_config

    assert litgpt.Config is Config and litgpt.GPT.__name__ == "GPT"
    assert name_to_config["pythia-14m"]["n_layer"] == 6
    assert (TrainArgs().global_batch_size, EvalArgs().interval, LogArgs().save_logs) == (64, 600, True)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = litgpt.Nothing


def test_a_wrong_group_is_not_hidden_by_a_later_right_one(litgpt, tmp_path):
    (tmp_path / "a.yaml").write_text("train: 7\n")
    assert "train: 7 will not do" in one_line(
        litgpt("pretrain", "x", "--config", tmp_path / "a.yaml", "--train.max_steps", "3")
    )


def test_words_in_their_order(litgpt):
    recipe = litgpt("tokenizer", "train", "texts", "tokens", "--vocab_size", "1e3").recipe
    assert (recipe.input, recipe.output_dir, recipe.vocab_size) == (Path("texts"), Path("tokens"), 1000)
    recipe = litgpt("data", "prepare", "TextFiles", "--data.train_data_path", "texts").recipe
    assert recipe.data.train_data_path == Path("texts")
    assert "data: missing" in one_line(litgpt("data", "inspect", "--print_config"))
    recipe = litgpt("convert_pretrained_checkpoint", "out/x", "clean").recipe
    assert (recipe.checkpoint_dir, recipe.output_dir) == (Path("out/x"), Path("clean"))


def test_a_token_is_not_printed(litgpt):
    outcome = litgpt("download", "a/b", "--access_token", "hf_secret", "--print_config")
    assert outcome.code == 0 and "hf_secret" not in outcome.out


def test_a_reader_that_has_had_enough_is_no_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "litgpt", "schema"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_a_full_disk_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(name: str, recipe: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out/metrics.csv")

    monkeypatch.setattr(cli, "run_command", fill)
    assert cli.main(["report", "out"]) == 1
    assert capsys.readouterr().err.startswith("litgpt: error: out/metrics.csv: No space left on device; free space")
