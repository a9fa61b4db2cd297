"""Recipes from YAML files and flags, and the errors of invalid ones."""

import inspect
from pathlib import Path

import pytest

from litgpt.recipe.build import build_parser
from litgpt.recipe.optimizer import SGD, AdamW, AdamW8bit, Custom, Muon
from litgpt.recipe.pretrain import Pretrain
from litgpt.recipe.train import BestArgs


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
def test_integers_have_many_spellings(litgpt, tmp_path, key, spelling):
    group, name = key.split(".")
    assert getattr(litgpt("pretrain", "x", f"--{key}", spelling).recipe.train, name) == 10**9
    (tmp_path / "t.yaml").write_text(f"model_name: x\n{group}:\n  {name}: {spelling}\n")
    value = getattr(litgpt("pretrain", "--config", tmp_path / "t.yaml").recipe.train, name)
    assert value == 10**9 and type(value) is int


def test_a_group_in_a_group_is_set_key_by_key_or_as_a_whole(litgpt, tmp_path):
    (tmp_path / "best.yaml").write_text("model_name: x\ncheckpoint: {best: {metric: val_ppl, mode: max}}\n")
    given = ("pretrain", "--config", tmp_path / "best.yaml")
    assert litgpt(*given).recipe.checkpoint.best == BestArgs("val_ppl", "max")
    assert litgpt(*given, "--checkpoint.best.metric", "a").recipe.checkpoint.best == BestArgs("a", "max")
    assert litgpt(*given, "--checkpoint.best", "{mode: min}").recipe.checkpoint.best == BestArgs("val_ppl", "min")
    assert litgpt(*given, "--checkpoint.best", "null").recipe.checkpoint.best is None
    assert litgpt("pretrain", "x", "--checkpoint.best", "{}").recipe.checkpoint.best == BestArgs()
    assert "checkpoint.best.mod is not a key" in litgpt(*given, "--checkpoint.best.mod", "a").error_line()
    said = "'val_loss' is a single value for a group of settings; set checkpoint.best.metric"
    assert said in litgpt(*given, "--checkpoint.best", "val_loss").error_line()
    assert "best2.yaml: no such file" in litgpt(*given, "--checkpoint.best", "best2.yaml").error_line()


@pytest.mark.parametrize("value", ["1.5", "1e-9", "nan", "inf", "1e999999999", "true", "[1]", "-3", "0", "", "many"])
def test_other_values_of_an_integer_are_refused(litgpt, value):
    assert "train.max_steps" in litgpt("pretrain", "x", f"--train.max_steps={value}").error_line()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_flags_override_files_in_either_order(litgpt, config, order):
    parts = [["--config", config], ["--train.lr_warmup_steps=200", "--optimizer.lr", "0.005", "--seed", "1"]]
    recipe = litgpt("pretrain", *parts[order[0]], *parts[order[1]]).recipe
    assert (recipe.train.lr_warmup_steps, recipe.optimizer.lr, recipe.seed) == (200, 0.005, 1)
    assert (recipe.optimizer.weight_decay, recipe.train.max_tokens) == (0.1, 3000)


@pytest.mark.parametrize(
    ("command", "flag", "value", "tuner"),
    [
        ("finetune_full", "freeze_parameters_ratio", 0.5, "Full"),
        ("finetune_adapter", "start_layer", 1, "Adapter"),
        ("finetune_adapter_v2", "prompt_length", 3, "AdapterV2"),
        ("finetune", "r", 3, "LoRA"),
        ("finetune_lora", "r", 3, "LoRA"),
    ],
)
def test_keys_below_tuner_are_those_of_the_tuner_of_the_command(litgpt, tmp_path, command, flag, value, tuner):
    (tmp_path / "t.yaml").write_text(f"tuner: {{init_args: {{{flag}: {value}}}}}\n")
    for arguments in ([f"--tuner.{flag}", str(value)], ["--config", tmp_path / "t.yaml"]):
        recipe = litgpt(command, "m", *arguments).recipe
        assert type(recipe.tuner).__name__ == tuner and getattr(recipe.tuner, flag) == value
    said = litgpt(command, "m", "--tuner.gibberish", "1").error_line()
    assert "tuner.gibberish is not a key; the keys of tuner are " in said and flag in said


def test_later_files_override_earlier_ones(litgpt, config, tmp_path):
    (tmp_path / "more.yaml").write_text("seed: 8\ntrain: {max_tokens: 10}\noptimizer: {init_args: {lr: 0.25}}\n")
    recipe = litgpt("pretrain", "--config", config, "--config", tmp_path / "more.yaml").recipe
    assert (recipe.seed, recipe.train.max_tokens, recipe.train.micro_batch_size) == (8, 10, 2)
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (0.25, (0.9, 0.95))


def test_a_positional_argument_overrides_the_file(litgpt, config):
    assert litgpt("pretrain", "pythia-70m", "--config", config).recipe.model_name == "pythia-70m"
    assert litgpt("pretrain", "--config", config, "--model_name", "a").recipe.model_name == "a"
    assert "model_name: missing" in litgpt("pretrain").error_line()
    assert "unexpected argument" in litgpt("pretrain", "a", "b").error_line()


def test_a_group_can_be_read_from_a_file(litgpt, tmp_path):
    (tmp_path / "t.yaml").write_text("micro_batch_size: 8\nmax_steps: 3\n")
    (tmp_path / "e.yaml").write_text("interval: 5\n")
    (tmp_path / "l.yaml").write_text("run: mine\n")
    flags = ["--train.max_steps", "4", "--train", tmp_path / "t.yaml"]
    recipe = litgpt("pretrain", "x", *flags, "--eval", tmp_path / "e.yaml", "--log", tmp_path / "l.yaml").recipe
    assert (recipe.train.micro_batch_size, recipe.train.max_steps) == (8, 4)
    assert (recipe.eval.interval, recipe.log.run) == (5, "mine")
    (tmp_path / "t.yaml").write_text("micro_batch_sise: 8\n")
    line = litgpt("pretrain", "x", "--train", tmp_path / "t.yaml").error_line()
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
def test_another_optimizer_drops_the_settings_of_the_first(litgpt, config, tmp_path, text):
    (tmp_path / "more.yaml").write_text(text)
    assert litgpt("pretrain", "--config", config, "--config", tmp_path / "more.yaml").recipe.optimizer == SGD()
    assert litgpt("pretrain", "--config", config, "--optimizer", "AdamW").recipe.optimizer.lr == 4e-4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.lr_warmup_step", "3"], "train.lr_warmup_step is not a key; did you mean train.lr_warmup_steps?"),
        (["--trian.max_steps", "3"], "did you mean train.max_steps?"),
        (["--max_steps", "3"], "max_steps is not a key; did you mean train.max_steps?"),
        (["--optimizer.learning_rate", "3"], "optimizer.learning_rate is not a key"),
        (["--optimizer", "Adamw"], "did you mean AdamW?"),
        (["--optimizer", "torch.optim.Nothing"], "optimizer: class torch.optim.Nothing not found"),
        (["--optimizer", "no.such.Thing"], "optimizer: 'no.such.Thing' cannot be imported"),
        (["--optimizer", "torch.optim.Adagrad", "--optimizer.lrr", "1"], "did you mean optimizer.lr?"),
        (["--optimizer", "LBFGS"], "optimizer: torch.optim.LBFGS is not supported, because it needs a closure"),
        (["--optimizer", "SparseAdam"], "optimizer: torch.optim.SparseAdam is not supported, because it needs sparse"),
        (["--optimizer", "Adam", "--optimizer.momentum", "1"], "optimizer.momentum is not a key"),
        (["--data", "TextFile"], "did you mean TextFiles?"),
        (["--optimizer", "os.stat_result"], "optimizer: os.stat_result is not an optimizer"),
        (["--data", "pathlib.Path"], "data: pathlib.Path is not a subclass of DataModule"),
        (["--precision", "bf16"], "precision: 'bf16' is not valid; use 32-true or bf16-mixed"),
        (
            ["--resume", "true", "--initial_checkpoint_dir", "a"],
            "resume: True and initial_checkpoint_dir: a are mutually",
        ),
        (["--eval.max_new_tokens", "5"], "eval.max_new_tokens: 5 is not supported for pretraining"),
        (
            ["--train.lr_warmup_fraction", "0.1", "--train.lr_warmup_steps", "2000"],
            "train.lr_warmup_fraction: 0.1 and train.lr_warmup_steps: 2000 are mutually",
        ),
        (
            ["--train.lr_warmup_fraction", "1.5"],
            "train.lr_warmup_fraction: '1.5' is not valid; use a number from 0 to 1",
        ),
        (
            ["--train.micro_batch_size", "1000"],
            "train.micro_batch_size: 1000 is larger than train.global_batch_size: 512",
        ),
        (["--train.min_lr", "0.5"], "train.min_lr: 0.5 is above the optimizer's lr: 0.001"),
        (["--optimizer.lr", "nan"], "optimizer.lr: 'nan' is not valid; use a number from 0 to 1000"),
        (["--seed", "-1"], "seed: -1 is not valid; use an integer from 0 to 4294967295, such as 42"),
        (["--parallel.zero", "true"], "parallel.zero: 'true' is not valid; use an integer from 1 to 3 or null"),
        (["--out_dir", ""], "out_dir: '' is not valid; use a path, such as out/pretrain"),
        (["--devices", "0"], "devices: 0 is not valid; use auto or a number from 1"),
        (["--devices", "3"], "is not divisible by micro_batch_size x data ranks = 4 x 3 = 12; use 504 or 516"),
        (["--devices", "4", "--parallel.data_replicate", "2", "--parallel.data_shard", "4"], "2 x 4 = 8"),
        (["--tokenizer.kind", "bpe", "--tokenizer_dir", "x"], "tokenizer: bpe and tokenizer_dir: x are mutually"),
        (
            ["--tokenizer.vocab_size", "100"],
            "tokenizer.vocab_size: 100 is not valid; use an integer from 258",
        ),
        (["--tokenizer.kind", "words"], "tokenizer.kind: 'words' is not valid; use bpe or bytes"),
        (["--train", "no.yaml"], "no.yaml: no such file"),
        (["--train.max_steps"], "--train.max_steps: needs a value"),
        (["--logger_name", "litlogger"], "logger_name: 'litlogger' is not valid; use csv or tensorboard"),
    ],
)
def test_an_invalid_flag_is_an_error_in_one_line(litgpt, flags, message):
    assert message in litgpt("pretrain", "x", *flags).error_line()


def test_a_data_module_of_the_user(litgpt, user_module, tmp_path):
    recipe = litgpt("pretrain", "x", "--data.path", "a", "--data", user_module, "--data.copies", "1e2").recipe
    assert (recipe.data.path, recipe.data.copies) == ("a", 100)
    (tmp_path / "d.yaml").write_text(f"model_name: x\ndata:\n  class_path: {user_module}\n  init_args: {{path: b}}\n")
    recipe = litgpt("pretrain", "--config", tmp_path / "d.yaml", "--data.share", "5e-1").recipe
    assert (recipe.data.path, recipe.data.share) == ("b", 0.5)
    assert "data.path: missing" in litgpt("pretrain", "x", "--data", user_module).error_line()
    outcome = litgpt("pretrain", "x", "--data", user_module, "--data.path", "a", "--data.copies", "a")
    assert "data.copies: 'a' is not valid; use an integer" in outcome.error_line()
    line = litgpt("pretrain", "x", "--data", user_module, "--data.path", "a", "--data.copy", "1").error_line()
    assert line == "data.copy is not a key; did you mean data.copies?"


def test_text_files(litgpt):
    recipe = litgpt("pretrain", "x", "--data", "TextFiles", "--data.train_data_path", "texts").recipe
    assert type(recipe.data).__name__ == "TextFiles" and str(recipe.data.train_data_path) == "texts"
    assert "data.train_data_path: missing" in litgpt("pretrain", "x", "--data", "litgpt.data.TextFiles").error_line()


def test_model_config_flags(litgpt, tmp_path):
    (tmp_path / "m.yaml").write_text("model_name: x\nmodel_config: {n_layer: 4, bias: false}\n")
    flags = ["--model_config.n_layer", "2", "--model_config.norm_class_name", "RMSNorm", "--model_config.norm_eps=1e-6"]
    recipe = litgpt("pretrain", "--config", tmp_path / "m.yaml", *flags).recipe
    assert recipe.model_config == {"n_layer": 2, "bias": False, "norm_class_name": "RMSNorm", "norm_eps": 1e-6}


@pytest.mark.parametrize("value", [True, False, "auto", "out/step-00000004"])
def test_resume(litgpt, value):
    recipe = litgpt("pretrain", "x", "--resume", str(value).lower() if isinstance(value, bool) else value).recipe
    assert recipe.resume == (Path(value) if isinstance(value, str) and "/" in value else value)


def test_a_wrong_group_is_not_hidden_by_a_later_right_one(litgpt, tmp_path):
    (tmp_path / "a.yaml").write_text("train: 7\n")
    outcome = litgpt("pretrain", "x", "--config", tmp_path / "a.yaml", "--train.max_steps", "3")
    assert "train: 7 is a single value for a group" in outcome.error_line()


def test_positional_arguments(litgpt):
    recipe = litgpt("tokenizer", "train", "texts", "tokens", "--vocab_size", "1e3").recipe
    assert (recipe.input, recipe.output_dir, recipe.vocab_size) == (Path("texts"), Path("tokens"), 1000)
    recipe = litgpt("data", "prepare", "TextFiles", "--data.train_data_path", "texts").recipe
    assert recipe.data.train_data_path == Path("texts")
    assert "data: missing" in litgpt("data", "inspect", "--print_config").error_line()
    recipe = litgpt("convert_pretrained_checkpoint", "out/x", "clean").recipe
    assert (recipe.checkpoint_dir, recipe.output_dir) == (Path("out/x"), Path("clean"))


CHATS = ["finetune", "x", "--data", "Conversations", "--data.sources", "[a.jsonl]"]
MIX = "data: {class_path: Conversations, init_args: {sources: [a.jsonl], packing: {enabled: true, strategy: sequential}"
MIX += ", template_args: {a: {x: 1, y: 2}, b: 2}}}"


@pytest.mark.parametrize("by", ["flag", "init_args flag", "JSON flag", "file", "file without init_args"])
def test_a_nested_key_leaves_its_siblings(litgpt, tmp_path, by):
    (tmp_path / "mix.yaml").write_text(MIX)
    (tmp_path / "over.yaml").write_text("data: {init_args: {packing: {length: 7}, template_args: {a: {x: 5}}}}")
    (tmp_path / "direct.yaml").write_text("data: {packing: {length: 7}, template_args: {a: {x: 5}}}")
    flags = {
        "flag": ["--data.packing.length", "7", "--data.template_args.a.x", "5"],
        "init_args flag": ["--data.init_args.packing.length", "7", "--data.init_args.template_args.a.x", "5"],
        "JSON flag": ["--data.packing", "{length: 7}", "--data.template_args", "{a: {x: 5}}"],
        "file": ["--config", tmp_path / "over.yaml"],
        "file without init_args": ["--config", tmp_path / "direct.yaml"],
    }
    data = litgpt("finetune", "x", "--config", tmp_path / "mix.yaml", *flags[by]).recipe.data
    assert (data.packing.enabled, data.packing.strategy, data.packing.length) == (True, "sequential", 7)
    assert data.template_args == {"a": {"x": 5, "y": 2}, "b": 2} and data.sources == ["a.jsonl"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_mapping_comes_before_its_keys(litgpt, order):
    parts = ["--data.packing={enabled: true, length: 3}", "--data.packing.length=7"]
    packing = litgpt(*CHATS, *(parts[at] for at in order)).recipe.data.packing
    assert (packing.enabled, packing.length) == (True, 7)
    classes = ["--optimizer.class_path=SGD", "--optimizer.momentum=0.5"]
    assert litgpt("pretrain", "x", *(classes[at] for at in order)).recipe.optimizer == SGD(momentum=0.5)


def test_lists_classes_and_nulls_replace(litgpt, tmp_path):
    (tmp_path / "mix.yaml").write_text(MIX)
    line = ["finetune", "x", "--config", tmp_path / "mix.yaml"]
    assert litgpt(*line, "--data.sources", "[b.jsonl]").recipe.data.sources == ["b.jsonl"]
    assert litgpt(*line, "--data", "JSON", "--data.json_path", "b").recipe.data.packing.enabled is False
    assert "data.template_args: None is not valid" in litgpt(*line, "--data.template_args", "null").error_line()
    (tmp_path / "style.yaml").write_text(
        "data: {class_path: JSON, init_args: {json_path: b, prompt_style: {class_path: litgpt.prompts.ChatML}}}"
    )
    style = ["finetune", "x", "--config", tmp_path / "style.yaml"]
    message = ["--data.prompt_style.init_args.system_message", "Hi"]
    assert litgpt(*style, *message).recipe.data.prompt_style == {
        "class_path": "litgpt.prompts.ChatML",
        "init_args": {"system_message": "Hi"},
    }
    other = {"class_path": "litgpt.prompts.Alpaca", "init_args": {}}
    flags = [*message, "--config", tmp_path / "other.yaml"]
    (tmp_path / "other.yaml").write_text(f"data: {{init_args: {{prompt_style: {other}}}}}")
    assert litgpt(*style, *flags[2:], "--data.prompt_style", "alpaca").recipe.data.prompt_style == "alpaca"
    assert litgpt(*style, *flags[2:]).recipe.data.prompt_style == other


def test_keys_without_a_class_belong_to_the_class_named_later(litgpt, tmp_path):
    (tmp_path / "rate.yaml").write_text("model_name: x\noptimizer: {lr: 0.25}\n")
    assert litgpt("pretrain", "--config", tmp_path / "rate.yaml", "--optimizer", "SGD").recipe.optimizer == SGD(lr=0.25)
    (tmp_path / "twice.yaml").write_text("data: {class_path: Conversations, packing: {enabled: true}, init_args: ")
    with (tmp_path / "twice.yaml").open("a") as file:
        file.write("{sources: [a], packing: {length: 7}}}\n")
    packing = litgpt("finetune", "x", "--config", tmp_path / "twice.yaml").recipe.data.packing
    assert (packing.enabled, packing.length) == (True, 7)


def test_a_nested_key_leaves_the_defaults_of_its_siblings(litgpt):
    train = litgpt("finetune", "x", "--train.max_time", "3").recipe.train
    assert (train.epochs, train.global_batch_size) == (5, 16)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"epochs": 5, "max_steps": None, "lr_warmup_steps": 100}),
        (["--train.max_steps", "3"], {"epochs": None, "max_steps": 3}),
        (["--train.max_tokens", "3000"], {"epochs": None, "max_tokens": 3000}),
        (["--train.max_steps", "3", "--train.epochs", "2"], {"epochs": 2, "max_steps": 3}),
        (["--train.max_steps", "null"], {"epochs": 5, "max_steps": None}),
        (["--train.max_time", "60"], {"epochs": 5, "max_time": 60.0}),
        (["--train.lr_warmup_fraction", "0.1"], {"lr_warmup_steps": None, "lr_warmup_fraction": 0.1}),
        (["--train.lr_warmup_fraction", "null"], {"lr_warmup_steps": 100, "lr_warmup_fraction": None}),
    ],
)
def test_defaults_follow_what_is_given(litgpt, flags, expected):
    train = litgpt("finetune_full", "x", *flags).recipe.train
    assert {name: getattr(train, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("command", "lr", "min_lr"),
    [
        ("finetune_full", "1e-5", 1e-6),
        ("finetune_full", "6e-5", 6e-5),
        ("finetune_lora", "2e-4", 6e-5),
        ("pretrain", "4e-5", 4e-5),
        ("pretrain", "2e-5", 2e-6),
    ],
)
def test_the_default_of_min_lr_follows_lr(litgpt, command, lr, min_lr):
    assert litgpt(command, "x", "--optimizer.lr", lr).recipe.train.min_lr == pytest.approx(min_lr)
    line = litgpt(command, "x", "--optimizer.lr", lr, "--train.min_lr", "1e-2").error_line()
    assert line == f"train.min_lr: 0.01 is above the optimizer's lr: {float(lr)}; set train.min_lr: 0"


@pytest.mark.parametrize(("command", "name"), [("pretrain", "TinyLlama"), ("finetune", "Alpaca")])
def test_keys_of_data_without_a_class_are_those_of_the_default(litgpt, command, name):
    data = litgpt(command, "x", "--data.seed", "7").recipe.data
    assert (type(data).__name__, data.seed) == (name, 7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.weights=[{regex: 3}]"], "data.weights.regex: [{'regex': 3}] is not valid; use a string or null"),
        (["--data.sources=7.5"], "data.sources: 7.5 is not valid; use a string or a list"),
        (["--tuner.target_modules=7"], "tuner.target_modules: 7 is not valid; use a list"),
        (
            ["--optimizer.betas=7"],
            "optimizer.betas: 7 is not valid; use a list of numbers from 0 to 1, such as [0.9, 0.95]",
        ),
    ],
)
def test_a_wrong_value_inside_of_a_class_is_named(litgpt, flags, message):
    assert litgpt(*CHATS, *flags).error_line() == message


def test_a_wrong_class_inside_of_a_class_is_named(litgpt):
    style = "--data.prompt_style={class_path: ChatML, init_args: {system_message: a}}"
    line = litgpt("finetune", "x", "--data=JSON", "--data.json_path=a", style).error_line()
    assert line.startswith("data: Expected a dot import path string: ChatML; --data.help CLASS")


def test_a_path_of_digits_is_a_path(litgpt, tmp_path):
    (tmp_path / "recipe.yaml").write_text("checkpoint_dir: 7\ninitial_adapter_dir: 123\n")
    outcome = litgpt(
        "finetune", "--config", tmp_path / "recipe.yaml", "--data", "Conversations", "--data.sources", "45"
    )
    assert outcome.code == 0, outcome.err
    recipe = outcome.recipe
    assert (recipe.checkpoint_dir, recipe.initial_adapter_dir) == (Path("7"), Path("123"))
    assert recipe.data.sources == "45"
    listed = litgpt("finetune", "7", "--data", "Conversations", "--data.sources", "[45, {path: 6}]")
    assert [source.path for source in listed.recipe.data._sources] == ["45", "6"]


def test_a_parser_is_built_without_reading_source_code(monkeypatch):
    read = []
    monkeypatch.setattr(inspect, "getsource", read.append)
    build_parser.__wrapped__(Pretrain)
    assert not read
