"""The output of `--print_config` and `--data.help`."""

import pytest
import yaml

from litgpt.recipe.data import DATA_MODULES


@pytest.mark.parametrize("name", DATA_MODULES)
def test_help_for_each_data_module(litgpt, name):
    outcome = litgpt("pretrain", "--data.help", name)
    assert outcome.code == 0 and outcome.recipe is None
    assert "--data." in outcome.out


def test_help_for_choices(litgpt):
    listed = litgpt("pretrain", "--data.help").out
    assert all(f"  {name} " in listed for name in DATA_MODULES)
    assert len([line for line in listed.splitlines() if not line.startswith("   ")]) == len(DATA_MODULES)
    assert max(map(len, listed.splitlines())) <= 80
    assert "--optimizer.momentum" in litgpt("pretrain", "--optimizer.help", "SGD").out
    assert "sed is not a group of keys; use --help all" in litgpt("pretrain", "--sed.help").error_line()
    assert litgpt("pretrain", "--help", "optimizer.lr").out.startswith("  --optimizer.lr  Peak learning rate")
    assert litgpt("pretrain", "--seed.help").out.startswith("  --seed  Random seed")


@pytest.mark.parametrize("flags", ["", "skip_default", "skip_null", "skip_default,skip_null"])
def test_print_config_loads_as_the_same_recipe(litgpt, config, user_module, tmp_path, flags):
    line = [
        "--config",
        config,
        "--data",
        user_module,
        "--data.path",
        "a",
        "--optimizer",
        "Adagrad",
        "--compile",
        "true",
    ]
    outcome = litgpt("pretrain", *line, f"--print_config={flags}" if flags else "--print_config")
    assert outcome.recipe is None and outcome.code == 0
    (tmp_path / "again.yaml").write_text(outcome.out)
    assert litgpt("pretrain", "--config", tmp_path / "again.yaml").recipe == litgpt("pretrain", *line).recipe
    assert ("num_nodes" in outcome.out) == ("skip_default" not in flags)
    assert "skip_null" not in flags or "null" not in outcome.out


def test_print_config_needs_no_model(litgpt):
    assert yaml.safe_load(litgpt("pretrain", "--print_config").out)["model_name"] is None
    assert "skip_all" in litgpt("pretrain", "--print_config=skip_all").error_line()


def test_a_token_is_not_printed(litgpt):
    outcome = litgpt("download", "a/b", "--access_token", "hf_secret", "--print_config")
    assert outcome.code == 0 and "hf_secret" not in outcome.out


def test_settings_that_follow_others_are_printed_as_they_were_given(litgpt, tmp_path):
    path = tmp_path / "printed.yaml"
    for command in ("pretrain", "finetune"):
        path.write_text(litgpt(command, "x", "--train.max_steps", "3", "--print_config").out)
        train = yaml.safe_load(path.read_text())["train"]
        assert train["min_lr"] is None and train["max_tokens"] is None and "epochs" not in train
        recipe = litgpt(command, "--config", str(path), "--optimizer.lr", "1e-5", "--train.max_steps", "4").recipe
        assert (recipe.train.min_lr, recipe.train.max_steps, recipe.train.epochs) == (1e-5 / 10, 4, None)
    path.write_text(litgpt("pretrain", "x", "--train.min_lr", "2e-5", "--print_config=skip_default").out)
    assert yaml.safe_load(path.read_text()) == {"model_name": "x", "train": {"min_lr": 2e-5}}
