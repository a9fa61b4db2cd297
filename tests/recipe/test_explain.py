"""`litgpt explain`: launch scripts as recipes, with a comment on what changed, and errors in one line."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from litgpt import cli
from litgpt.model.config import Config
from litgpt.parallel.model_sizes import check_model_sizes
from litgpt.recipe.launch_script import parse_launch, read_script
from litgpt.recipe.option_table import index_options
from tests.recipes import megatron_page

SCRIPTS = Path(__file__).parent / "launch_scripts"


def explain(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The output of the command."""
    assert cli.main(["explain", *arguments]) == 0
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of the command, in one line."""
    assert cli.main(["explain", *arguments]) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("litgpt: error: ").strip()


def find_comment(text: str, key: str) -> str:
    """The comment on the line of a key."""
    line = next(line for line in text.splitlines() if line.strip().startswith(f"{key}:"))
    return line.partition("  # ")[2]


@pytest.mark.parametrize(("name", "nodes"), [("quick_start", 1), ("dense_14b", 1), ("moe_30b", 2)])
def test_scripts_translate_to_recipes_whose_layout_fits_the_model(capsys, litgpt, tmp_path, name, nodes):
    text = explain(capsys, str(SCRIPTS / f"{name}.sh"))
    (tmp_path / "recipe.yaml").write_text(next(part for part in text.split("---\n") if "checkpoint_dir:" in part))
    assert "# megatron sft -> litgpt finetune_full --config recipe.yaml\n" in text
    outcome = litgpt("finetune_full", "--config", tmp_path / "recipe.yaml", "--num_nodes", nodes)
    assert outcome.code == 0, outcome.err
    recipe = outcome.recipe
    config = Config.from_name(recipe.checkpoint_dir.name)
    dims = recipe.parallel.resolve_dims(recipe.devices * nodes)
    check_model_sizes(recipe.parallel, dims, config, config.n_layer)
    assert (recipe.optimizer.lr, recipe.train.min_lr, recipe.train.lr_warmup_fraction) == (1e-5, 1e-6, 0.05)
    assert (recipe.optimizer.betas, recipe.optimizer.weight_decay, recipe.train.max_norm) == ((0.9, 0.95), 0.1, 1.0)
    assert (recipe.train.global_batch_size, recipe.precision, recipe.loss.impl) == (16, "bf16-mixed", "chunked")
    assert "Left over" not in text if name != "moe_30b" else "NNODES=$WORLD_SIZE: $WORLD_SIZE is not set" in text


def test_the_quick_start_in_detail(capsys):
    before, training, after = explain(capsys, str(SCRIPTS / "quick_start.sh")).split("---\n")
    assert before == "# swift export: not needed; Hugging Face folders are read as they are\n"
    assert after == "# swift export: not needed; the folder final of a run is a Hugging Face folder\n"
    recipe = yaml.safe_load(training)
    assert recipe["checkpoint_dir"] == "Qwen/Qwen2.5-7B-Instruct"  # that the first command converts
    assert recipe["data"]["init_args"]["sources"][2] == "swift/self-cognition#500"
    assert recipe["parallel"] == {"tensor": 2, "sequence": True}
    assert recipe["train"]["epochs"] == 1 and recipe["devices"] == 2
    assert find_comment(training, "save_rng") == "--no_save_rng true"
    assert find_comment(training, "weight_decay") == "default of Megatron-SWIFT"
    assert find_comment(training, "tensor") == ""
    assert "#   --dataset_num_proc 4: rows are tokenized in parallel by itself\n" in training
    names = [recipe["data"]["init_args"][key] for key in ("model_name", "model_author")]
    assert names == [["swift-robot"], ["swift"]]


def test_what_is_left_over(capsys):
    text = explain(capsys, "--megatron", "--lr 1e-4 --frobnicate 3 x --sgd_momentum 0.5 --tp_comm_overlap true")
    assert "#   --frobnicate 3 x: not an option of the table\n" in text
    assert "--tp_comm_overlap true: matrix products wait " in text.partition("# Refused:")[2]
    assert "--sgd_momentum 0.5: it has an effect only with optimizer: SGD" in text
    assert "# To set:\n#   checkpoint_dir\n" in text
    assert yaml.safe_load(text)["optimizer"]["init_args"]["lr"] == 1e-4


def test_texts_of_several_lines_and_commands(capsys):
    text = explain(capsys, "--swift", "--dataset $(ls) --val_dataset `ls` --system 'a: # 1\nb: # 2'")
    assert yaml.safe_load(text)["data"]["init_args"]["system"] == "a: # 1\nb: # 2"
    assert "--dataset $(ls): commands in a script are not run" in text and "--val_dataset `ls`: commands" in text
    assert "# To set:\n#   checkpoint_dir\n#   data.sources\n" in text


def test_values_that_cannot_be_translated(capsys):
    text = explain(capsys, "--megatron", "--moe_token_dispatcher_type flex --expert_model_parallel_size 2")
    assert "--moe_token_dispatcher_type flex: the dispatchers are alltoall and allgather" in text
    text = explain(capsys, "--swift", "--train_type longlora --deepspeed ds.json")
    assert "--train_type longlora: the tuners are" in text
    assert "--deepspeed ds.json: set parallel.zero to its stage" in text
    stages = "--decoder_first_pipeline_num_layers 11 --decoder_last_pipeline_num_layers 13"
    text = explain(capsys, "--megatron", f"{stages} --pipeline_model_parallel_size 4")
    assert yaml.safe_load(text)["parallel"]["pipeline_layers"] == [11, None, None, 13]
    assert "it needs a pipeline of several stages" in explain(capsys, "--megatron", stages)
    text = explain(capsys, "--megatron", "--train_type lora --tp_comm_overlap false")
    assert "Refused" not in text


@pytest.mark.parametrize(
    ("program", "text", "expected"),
    [
        ("megatron", "--eval_iters 50 --micro_batch_size 2 --global_batch_size 16", {"eval.max_iters": 400}),
        ("megatron", "--adam_beta2 0.99", {"optimizer.init_args.betas": [0.9, 0.99]}),
        ("megatron", "--bf16 --sequence-parallel --tensor-model-parallel-size=2", {"parallel.sequence": True}),
        ("megatron", "--lr 1e-5 --lr 2e-5", {"optimizer.init_args.lr": 2e-5}),
        (
            "megatron",
            "--model Qwen/Qwen1.5-MoE-A2.7B --pipeline_model_parallel_size 2 --decoder_last_pipeline_num_layers 11",
            {"parallel.pipeline_layers": [None, 11]},
        ),
        (
            "megatron",
            "--train_type lora --target_modules linear_qkv",
            {"tuner.init_args.target_modules": ["q", "k", "v"]},
        ),
        (
            "megatron",
            "pt --moe_router_enable_expert_bias true --moe_router_bias_update_rate 1e-2 --moe_z_loss_coeff 1e-3",
            {"moe.router_bias_update_rate": 0.01, "moe.z_loss_coeff": 1e-3, "model_config.router_correction": True},
        ),
        ("megatron", "--optimizer sgd", {"optimizer.class_path": "SGD", "optimizer.init_args.momentum": 0.9}),
        ("megatron", "pt --model Qwen/Qwen3-8B", {"model_name": "Qwen3-8B", "initial_checkpoint_dir": "Qwen/Qwen3-8B"}),
        ("megatron", "pt --dataset a.jsonl", {"data.init_args.train_on": "everything"}),
        ("swift", "--model a/b", {"tuner.class_path": "LoRA", "train.epochs": 3, "recompute.granularity": "full"}),
        ("swift", "--deepspeed zero3_offload", {"parallel.zero": 3, "parallel.cpu_offload": True}),
        ("swift", "NPROC_PER_NODE=4 --gradient_accumulation_steps 2", {"train.global_batch_size": 8}),
        ("swift", "NPROC_PER_NODE=4 swift sft --model a/b", {"devices": 4}),
        ("swift", "--quant_bits 4 --quant_method bnb", {"quantize": "bnb.nf4-dq"}),
        ("swift", "--warmup_ratio 0.05", {"train.lr_warmup_fraction": 0.05}),
        ("swift", "--lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}' --learning_rate 1e-3", {"train.min_lr": 1e-4}),
        ("swift", "--train_type full --lisa_activated_layers 2", {"tuner.class_path": "LISA"}),
        (
            "megatron",
            "rlhf --rlhf_type dpo --dataset p.jsonl --beta 0.1 --loss_type sigmoid --rpo_alpha 0.1",
            {"preference.rpo_alpha": 0.1, "data.class_path": "Preferences", "tuner.class_path": "Full"},
        ),
        ("swift", "rlhf --loss_type exo_pair", {"preference.label_smoothing": 1e-3}),
        ("swift", "rlhf --rlhf_type cpo --loss_type hinge", {"preference.loss_type": "cpo_hinge"}),
        ("swift", "rlhf --loss_type sigmoid sft --loss_weights 1 0.5", {"preference.loss_type": ["sigmoid", "sft"]}),
        ("swift", "rlhf --rlhf_type kto --desirable_weight 2", {"preference.desirable_weight": 2}),
        ("swift", "rlhf --model m --ref_model r", {"preference.reference": "r"}),
        ("swift", "infer --model a/b --temperature 0 --stream true", {"checkpoint_dir": "a/b", "temperature": 0}),
        ("swift", "infer --adapters out --model a/b", {"checkpoint_dir": "out"}),
        ("swift", "export --adapters out --merge_lora true", {"checkpoint_dir": "out"}),
        ("swift", "export --model m --push_to_hub true --hub_model_id a/b --output_dir o", {"push_to_hub": "a/b"}),
    ],
)
def test_translations(capsys, program, text, expected):
    tree = yaml.safe_load(explain(capsys, f"--{program}", text))
    for key, value in expected.items():
        found: Any = tree
        for part in key.split("."):
            found = found[part]
        assert found == pytest.approx(value) if isinstance(value, float) else found == value, key


def test_alignment(capsys, litgpt, tmp_path):
    given = "--model a/b --dataset pairs.jsonl"
    text = explain(capsys, "--megatron", f"--rlhf_type grpo {given}")
    assert text == "# megatron rlhf: the kinds that are translated are dpo, orpo, simpo, cpo, kto, rm\n"
    text = explain(capsys, "--swift", f"rlhf --rlhf_type kto --loss_type apo_zero_unpaired {given}")
    assert "--loss_type apo_zero_unpaired: the loss of kto is kto" in text
    commands = {"dpo": "align", "orpo": "align", "simpo": "align", "kto": "kto", "rm": "rm"}
    for kind in commands:
        text = explain(capsys, "--megatron", f"rlhf --rlhf_type {kind} {given} --ref_model a/b")
        assert f"-> litgpt {commands[kind]} --config" in text and "  reference:" not in text
        (tmp_path / f"{kind}.yaml").write_text(text)
    for kind, command in commands.items():
        outcome = litgpt(command, "--config", tmp_path / f"{kind}.yaml")
        assert outcome.code == 0, outcome.err


def test_a_default_does_not_replace_an_option(capsys):
    assert "default of Megatron-SWIFT" not in find_comment(explain(capsys, "--megatron", "--fp16 true"), "precision")
    tree = yaml.safe_load(explain(capsys, "--megatron", "--lr_warmup_fraction 0.1"))
    assert "lr_warmup_steps" not in tree["train"]
    tree = yaml.safe_load(explain(capsys, "--megatron", "--save_interval 70"))
    assert tree["eval"]["interval"] == 70  # as Megatron-SWIFT has it


def test_an_adapter_that_is_trained_further_has_its_settings(capsys, litgpt, tmp_path):
    text = explain(capsys, "--swift", "--model a/b --dataset a.jsonl --adapters out/adapter --lora_rank 16")
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = litgpt("finetune", "--config", tmp_path / "recipe.yaml").recipe
    assert recipe.initial_adapter_dir == Path("out/adapter") and recipe.tuner is None
    assert "--lora_rank 16: it has an effect only with tuner: LoRA" in text


def test_texts_that_look_like_numbers(capsys, litgpt, tmp_path):
    options = "--model 7 --dataset rows --wandb_project 10 --wandb_exp_name 1e3 --system true --save 5"
    (tmp_path / "recipe.yaml").write_text(explain(capsys, "--swift", options))
    recipe = litgpt("finetune", "--config", tmp_path / "recipe.yaml").recipe
    assert (recipe.checkpoint_dir, recipe.out_dir) == (Path("7"), Path("5"))
    assert (recipe.log.project, recipe.log.run) == ("10", "1e3")
    assert (recipe.data.sources, recipe.data.system) == (["rows"], "true")


def test_scripts_are_read_as_a_shell_does():
    script = """
        # a comment with an apostrophe: don't
        export NPROC_PER_NODE=4 OUT="out dir"
        LR=${LR:-3e-5}
        cd /work && torchrun --nproc_per_node=8 swift/cli/_megatron/sft.py \\
            --save "$OUT" --lr $LR \\
        #   --min_lr 1e-6 \\
            --dataset 'a#5' b.jsonl \\
            --rope_scaling '{"rope_type": "linear",
                             "factor": 2.0}' > log.txt 2>&1 &
        swift infer --model $MODEL   # the answer
    """
    first, second = read_script(script, "run.sh")
    assert (first.program, first.verb, second.program, second.verb) == ("megatron", "sft", "swift", "infer")
    scaling = first.options.pop("rope_scaling")
    assert yaml.safe_load(scaling[0]) == {"rope_type": "linear", "factor": 2.0}
    assert first.options == {
        "nproc_per_node": ["8"],
        "save": ["out dir"],
        "lr": ["3e-5"],
        "dataset": ["a#5", "b.jsonl"],
    }
    assert first.environment == {"NPROC_PER_NODE": "4", "OUT": "out dir"}
    assert second.options == {"model": ["$MODEL"]}


def test_a_configuration_file_of_the_program(tmp_path):
    (tmp_path / "train.yaml").write_text("model: a/b\ndataset: [x.jsonl, y.jsonl]\nlearning_rate: 1e-5\n")
    launch = parse_launch(f"sft --config {tmp_path}/train.yaml --learning_rate 2e-5", "swift", "--swift")
    assert launch.options == {"model": ["a/b"], "dataset": ["x.jsonl", "y.jsonl"], "learning_rate": ["2e-5"]}


def test_the_page_shows_the_output_and_the_whole_table(capsys, tmp_path):
    text = megatron_page.PAGE.read_text(encoding="utf-8")
    assert text == megatron_page.format_page(), "run python -m tests.recipes.megatron_page"
    script, shown = re.search(r"<<'END'\n(.*?)END\n.*?```yaml\n(.*?)```", text, re.DOTALL).groups()
    (tmp_path / "launch.sh").write_text(script)
    assert explain(capsys, str(tmp_path / "launch.sh")) == shown


def test_errors_are_one_line(capsys, tmp_path):
    assert fail(capsys) == "nothing is given; give one of a file, --megatron, --swift and --list"
    assert "file, megatron is given" in fail(capsys, "x.sh", "--megatron", "--lr 1")
    assert fail(capsys, str(tmp_path / "x.sh")).endswith(
        "x.sh is not a file; give a launch script, or the line itself after --megatron or --swift"
    )
    (tmp_path / "x.sh").write_text("echo hello\n")
    assert "starts neither megatron nor swift" in fail(capsys, str(tmp_path / "x.sh"))
    (tmp_path / "x.sh").write_text("# first\nmegatron sft --system 'You are\n")
    assert fail(capsys, str(tmp_path / "x.sh")).endswith(
        "x.sh:2: no closing quotation; close it with the quotation mark"
    )
    assert fail(capsys, "--swift", "--lr 1e-5 --config") == "swift sft: --config: needs a file"
    assert "no closing quotation" in fail(capsys, "--megatron", "--lr '1e-5")
    assert fail(capsys, "--megatron", "sft") == (
        "--megatron: 'sft' has no options; give them in quotes, such as --megatron '--lr 1e-5'"
    )
    assert fail(capsys, "--megatron") == "--megatron: needs a value"


def test_the_list_has_a_line_for_each_name(capsys):
    lines = explain(capsys, "--list").splitlines()
    assert [line.split()[0] for line in lines] == list(index_options())
    assert {line.split()[1] for line in lines} == {"same", "other", "translated", "refused"}
    assert all(len(line.split()) > 2 for line in lines)


def test_it_is_quick_and_imports_no_torch():
    code = (
        "import sys; from litgpt import cli; assert cli.main(sys.argv[1:]) == 0; "
        "sys.exit(sorted({'torch', 'numpy', 'lightning'} & set(sys.modules)) or 0)"
    )
    arguments = [sys.executable, "-c", code, "explain", str(SCRIPTS / "dense_14b.sh")]
    started = time.process_time()
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.process_time() - started < 5
