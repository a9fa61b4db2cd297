"""`litgpt plan`: the table, JSON, the errors, and layouts without other processes."""

import json
import re
from typing import Any

import pytest

from litgpt.errors import UserError
from litgpt.plan.ranks import check_skew
from litgpt.recipe.build import build_recipe
from litgpt.recipe.parallel import ParallelDims
from litgpt.recipe.plan import infer_command
from litgpt.recipe.pretrain import Pretrain

SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "head_size": 8, "intermediate_size": 48, "padded_vocab_size": 512}
RUN = [
    *("--model_name", "pythia-14m", "--out_dir", "out", "--train.max_seq_length", "32", "--precision", "bf16-mixed"),
    *("--train.micro_batch_size", "1", "--train.global_batch_size", "8"),
    *(word for key, value in SHAPE.items() for word in (f"--model_config.{key}", str(value))),
]


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    from litgpt import cli

    assert cli.main(["plan", *RUN, *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_table_says_what_the_memory_holds_and_whether_it_fits(capsys):
    from litgpt import cli

    assert cli.main(["plan", *RUN, "--gpu", "RTX-3090"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Memory of rank 0, with rows of 32 tokens\nParameters")
    assert "\nFits " in out and "of the 23.7 GiB of RTX-3090" in out
    assert "Time on 1 x RTX-3090\nMatrix products" in out and "tokens/s per GPU, MFU" in out


def test_json_has_parts_that_add_up(capsys):
    shown = plan(capsys, "--gpu_memory", "1")
    assert shown["fits"] is False and shown["ranks"] == [shown["worst"]]
    assert sum(shown["worst"]["parts"].values()) == pytest.approx(shown["worst"]["peak_gib"], abs=0.01)
    assert plan(capsys)["fits"] is None


def test_time_and_price_of_a_run(capsys, tmp_path):
    figures = {"memory": 10, "bf16_tflops": 0.01, "tf32_tflops": 0.01}
    figures |= {name: 0.1 for name in ("memory_bandwidth", "link_bandwidth", "network_bandwidth")}
    (tmp_path / "slow.yaml").write_text(json.dumps(figures))
    (tmp_path / "fast.yaml").write_text(json.dumps(figures | {"bf16_tflops": 1000, "memory_bandwidth": 1000}))
    run = ["--train.max_steps", "1000", "--price_per_hour", "2"]
    slow, fast = (plan(capsys, "--gpu_file", str(tmp_path / f"{name}.yaml"), *run) for name in ("slow", "fast"))
    step = slow["step"]
    assert sum(step["parts"].values()) == pytest.approx(step["seconds"], rel=1e-3)
    assert step["tokens_per_second_per_gpu"] == pytest.approx(8 * 32 / step["seconds"], rel=1e-3)
    assert slow["run"]["hours"] == pytest.approx(1000 * step["seconds"] / 3600, rel=1e-3)
    assert slow["run"]["price"] == pytest.approx(2 * slow["run"]["hours"])
    assert slow["gpu_memory_gib"] == 10 and 5 * fast["step"]["seconds"] < step["seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--parallel.data_shard", "--parallel.tensor"])
def test_a_layout_needs_less_of_each_rank(capsys, layout):
    key = ["--devices", "2", layout, "2", "--model_config.n_embd", "256"]
    one, two = (plan(capsys, *rest)["worst"]["parts"] for rest in (key[4:], key))
    assert two["parameters"] == pytest.approx(one["parameters"] / 2, rel=0.1)
    assert two["optimizer"] == pytest.approx(one["optimizer"] / 2, rel=0.1)


def test_every_stage_of_a_pipeline_is_planned(capsys):
    shown = plan(capsys, "--devices", "4", "--parallel.pipeline", "2")
    assert [(rank["rank"], rank["ranks_alike"]) for rank in shown["ranks"]] == [(0, 2), (2, 2)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--fp8.recipe", "mxfp8"], "fp8.recipe: mxfp8 is not planned yet; set rowwise"),
        (["--routing_skew", "1.5"], "routing_skew: 1.5 has no effect with parallel.expert: 1; set routing_skew: 1"),
        (["--gpu", "H200", "--precision", "64-true"], "precision: 64-true: its time is not planned; set 32-true"),
        (["--gpu", "H200", "--recompute.offload", "true"], "recompute.offload: true: its time is not planned"),
        (["--gpu", "H200", "--fp8.recipe", "blockwise"], "fp8.recipe: blockwise: its time is not planned; set rowwise"),
        (
            ["--gpu", "A100-80GB", "--fp8.recipe", "rowwise"],
            "fp8.recipe: rowwise on a GPU without fp8_tflops: its time is not planned; set null",
        ),
        (["--train.max_seq_length", "100000"], "train.max_seq_length: 100000 is more than the model's block_size"),
    ],
)
def test_settings_that_are_not_planned_are_refused(capsys, argv, message):
    from litgpt import cli

    assert cli.main(["plan", *RUN, *argv]) == 1
    assert message in capsys.readouterr().err


def check_skewed(skew: float, expert: int, **moe: Any) -> None:
    recipe = build_recipe(Pretrain, {"model_name": "tiny", "out_dir": "out", "devices": expert, "moe": moe})
    check_skew(skew, recipe, ParallelDims(data_shard=expert, expert=expert))


@pytest.mark.parametrize(
    ("skew", "moe", "message"),
    [
        (5, {}, "routing_skew: 5 is more than parallel.expert: 4, all rows; set at most 4"),
        (2, {"expert_capacity_factor": 1.25}, "is more than moe.expert_capacity_factor: 1.25 lets experts have"),
        (
            2,
            {"expert_capacity_factor": 2.5, "pad_expert_input_to_capacity": True},
            "no effect with moe.pad_expert_input_to_capacity: true",
        ),
    ],
)
def test_a_skew_that_is_not_possible_is_refused(skew, moe, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_skewed(skew, 4, **moe)
    check_skewed(1, 4, **moe)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--check_step", "--gpu", "H100-80GB"], "gpu: H100-80GB has no effect with check_step: true; leave it out"),
        (["--gpu", "H100-80GB", "--gpu_memory", "80"], "are the same setting; set one of them"),
        (["--search", "--gpu_memory", "80"], "search: true needs the figures of a GPU; set gpu: H100-80GB"),
        (["--gpus", "8", "--gpu", "H200"], "gpus: 8 has no effect with search: false"),
        (["--gpu_memory", "80", "--price_per_hour", "2"], "price_per_hour: 2 has no effect without the time of a step"),
        (["--checkpoint_dir", "EleutherAI/pythia-14m"], "command: missing; set that of the recipe"),
        (["chat", *RUN], "command: 'chat' is not valid"),
        ([*RUN, "--train.micro_batch", "1"], "train.micro_batch is not a key"),
    ],
)
def test_wrong_arguments_are_refused(capsys, argv, message):
    from litgpt import cli

    assert cli.main(["plan", *argv]) == 2
    assert message in capsys.readouterr().err


def test_what_is_found_in_a_step_is_printed_and_an_error(capsys, monkeypatch):
    from litgpt import cli
    from litgpt.plan import step_findings

    argv = ["plan", *RUN, "--devices", "1", "--check_step"]
    monkeypatch.delitem(step_findings.EXPECTED, ("step.py", "compute_model_norm"))
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert line.startswith("rank 0: synchronization: litgpt/train/step.py:")
    assert line.endswith(" in compute_model_norm (gradient_norm): the host reads float32 ()")
    assert "check_step: 1 operation(s) of the step" in captured.err
    monkeypatch.undo()
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == "The step runs on a GPU, and waits for it only where it has to.\n"


def test_a_recipe_of_the_package_is_found_by_its_name():
    assert infer_command(["quickstart"], []) == "pretrain"
