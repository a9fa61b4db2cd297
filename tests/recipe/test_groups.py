"""Groups of settings validate themselves."""

import dataclasses
from pathlib import Path

import pytest

from litgpt.errors import UserError
from litgpt.recipe.finetune import FinetuneFull
from litgpt.recipe.optimizer import OPTIMIZERS, SGD, AdamW, Muon
from litgpt.recipe.parallel import ParallelArgs, ParallelDims
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.pretrain import Pretrain, TokenizerArgs
from litgpt.recipe.train import BestArgs, CheckpointArgs, EvalArgs, GuardArgs, LogArgs, LossArgs, TrainArgs
from litgpt.recipe.tuner import Full, LoRA

GROUPS = [
    TrainArgs,
    EvalArgs,
    CheckpointArgs,
    GuardArgs,
    LossArgs,
    ParallelArgs,
    PreferenceArgs,
    TokenizerArgs,
    *OPTIMIZERS.values(),
]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("absurd", [-1, float("nan"), float("inf"), 10**30])
def test_numbers_out_of_range_are_refused(group, absurd):
    for name, value in dataclasses.asdict(group()).items():
        if type(value) in (int, float) and (name, absurd) != ("max_iters", -1):
            with pytest.raises(UserError, match=rf"{name}: .* is not valid; use a number from"):
                group(**{name: absurd})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainArgs(lr_warmup_steps=3, lr_warmup_fraction=0.5), "mutually exclusive"),
        (lambda: TrainArgs(lr_warmup_fraction=1.5, lr_warmup_steps=None), "from 0 to 1"),
        (lambda: TrainArgs(micro_batch_size=65), "use at most 64"),
        (lambda: TrainArgs(wsd_decay_steps=3), "set train.lr_decay_style: wsd"),
        (lambda: LogArgs(teamspace="a"), "log.teamspace: 'a' is a setting of litlogger"),
        (lambda: LogArgs(save_logs=False), "log.save_logs: False is a setting of litlogger"),
        (
            lambda: TokenizerArgs(vocab_size=100),
            "tokenizer.vocab_size: 100 is not valid; use a number from 258",
        ),
        (lambda: AdamW(betas=(0.9, 1.0)), r"optimizer.betas: \[0.9, 1.0\] is not valid"),
        (lambda: Muon(adamw_betas=(-0.1, 0.9)), "optimizer.adamw_betas"),
        (lambda: Pretrain("x", resume="auto", initial_checkpoint_dir=Path("a")), "resume: auto and initial"),
        (
            lambda: Pretrain("x", eval=EvalArgs(evaluate_example="random")),
            "eval.evaluate_example: random is not supported for",
        ),
        (
            lambda: BestArgs("val_rewards/accuracies"),
            "checkpoint.best.mode: null is valid for val_loss and val_ppl only",
        ),
        (
            lambda: Pretrain("x", train=TrainArgs(patience=3)),
            "train.patience: 3 has no effect with checkpoint.best: null; set checkpoint.best.metric: val_loss",
        ),
        (lambda: Pretrain("x", devices=-2), "devices: -2 is not valid"),
        (lambda: Pretrain("x", num_nodes=0), "num_nodes: 0 is not valid"),
    ],
)
def test_contradictions_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("world", [1, 2, 6, 8])
def test_data_shard_auto_uses_the_remaining_devices(world):
    assert ParallelArgs().resolve_dims(world) == ParallelDims(data_shard=world)
    assert ParallelArgs(data_replicate=world).resolve_dims(world) == ParallelDims(data_replicate=world)
    assert ParallelArgs(data_replicate=world, data_shard=1).resolve_dims(world) == ParallelDims(data_replicate=world)
    assert ParallelArgs(tensor=2, pipeline=2, context=3).resolve_dims(12 * world) == ParallelDims(
        pipeline=2, data_shard=world, context=3, tensor=2
    )
    assert ParallelArgs(expert=2, tensor=2).resolve_dims(4 * world).expert_shard == 2 * world


def test_a_layout_that_does_not_fit_is_refused():
    for settings, world, message in (
        (
            {"data_shard": 8},
            4,
            "data_shard: 8, but devices x num_nodes is 4; set parallel.data_shard: auto, or devices: 8",
        ),
        (
            {"data_replicate": 3},
            4,
            "data_replicate: 3 does not divide {} = 4; set parallel.data_replicate: 2, or devices: 3",
        ),
        ({"tensor": 3}, 1, "tensor: 3 does not divide {} = 1; set parallel.tensor: 1, or devices: 3"),
        (
            {"pipeline": 2, "tensor": 4},
            4,
            "pipeline x tensor: 2 x 4 = 8 does not divide {} = 4; set parallel.tensor: 2, or devices: 8",
        ),
        ({"pipeline": 2, "tensor": 2}, 3, "pipeline x tensor: 2 x 2 = 4 does not divide {} = 3; set devices: 4"),
        (
            {"tensor": 2, "data_shard": 4},
            4,
            "tensor x data_shard: 2 x 4 = 8, but {} is 4; set parallel.data_shard: auto, or devices: 8",
        ),
    ):
        with pytest.raises(UserError) as caught:
            ParallelArgs(**settings).resolve_dims(world)
        assert str(caught.value) == "parallel." + message.format("devices x num_nodes")
        assert ParallelArgs(**settings).resolve_dims(int(message.rpartition("devices: ")[2]))
    for settings, nodes, cure in (({"tensor": 4}, 2, "devices: 2"), ({"tensor": 3}, 2, "num_nodes: 1 and devices: 3")):
        with pytest.raises(UserError, match=rf"devices x num_nodes = {nodes}; set .*or {cure}$"):
            ParallelArgs(**settings).resolve_dims(nodes, num_nodes=nodes)
    with pytest.raises(UserError, match=r"data_shard: auto, or devices: 4$"):
        Pretrain("x", devices=1, num_nodes=2, parallel=ParallelArgs(data_shard=8))
    with pytest.raises(UserError, match=r"expert x expert_tensor: 3 x 1 does not divide .* 4; set parallel.expert: 4"):
        ParallelArgs(expert=3).resolve_dims(4)
    with pytest.raises(UserError, match=r"pipeline_layers: 3 stages are not divisible by 2"):
        ParallelArgs(pipeline=2, pipeline_layers=[1, 2, 3])
    with pytest.raises(UserError, match=r"parallel\.data_replicate x data_shard: 2 x 2 = 4"):
        Pretrain("x", devices=1, parallel=ParallelArgs(data_replicate=2, data_shard=2))
    assert Pretrain("x", devices=2, num_nodes=2, parallel=ParallelArgs(data_replicate=2)).parallel.resolve_dims(
        4
    ) == ParallelDims(data_replicate=2, data_shard=2)


@pytest.mark.parametrize(("ranks", "steps"), [(1, 16), (2, 8), (4, 4), (16, 1)])
def test_gradient_accumulation_steps(ranks, steps):
    assert TrainArgs(global_batch_size=64, micro_batch_size=4).accumulation(ranks) == steps


def test_an_indivisible_batch_size_is_refused():
    with pytest.raises(UserError, match=r"125 is not divisible by .* 5 x 2 = 10; use 120 or 130"):
        TrainArgs(global_batch_size=125, micro_batch_size=5).accumulation(2)
    with pytest.raises(UserError, match="; use 32"):
        TrainArgs(global_batch_size=8, micro_batch_size=8).accumulation(4)


def test_the_default_of_max_tokens_is_litgpts():
    assert Pretrain("x").train.max_tokens == 3 * 10**12
    assert Pretrain("x", train=TrainArgs(max_time=1.0)).train.max_tokens is None


def test_a_constant_learning_rate_ignores_min_lr():
    train = TrainArgs(lr_decay_style="constant", min_lr=6e-5)
    assert Pretrain("x", optimizer=AdamW(lr=1e-6), train=train).train.min_lr == 6e-5
    with pytest.raises(UserError, match=r"train\.min_lr: 6e-05 is above the optimizer's lr: 1e-06"):
        Pretrain("x", optimizer=AdamW(lr=1e-6), train=TrainArgs(min_lr=6e-5))


@pytest.mark.parametrize(("given", "used"), [(-1, None), (None, None), (1, 1)])
def test_all_of_the_validation_data_is_minus_one_or_null(given: int | None, used: int | None) -> None:
    assert EvalArgs(max_iters=given).max_iters == used


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: TrainArgs(wsd_decay_steps=5),
            "train.wsd_decay_steps: 5 has no effect with train.lr_decay_style: cosine",
        ),
        (
            lambda: TrainArgs(wsd_decay_style="cosine"),
            "train.wsd_decay_style: cosine has no effect with train.lr_decay",
        ),
        (
            lambda: TrainArgs(lr_decay_steps=5, lr_decay_style="constant"),
            "train.lr_decay_steps: 5 has no effect with train.lr_decay_style: constant; set null",
        ),
        (lambda: TrainArgs(lr_decay_steps=5, lr_decay_style="inverse-sqrt"), "train.lr_decay_style: inverse-sqrt"),
        (
            lambda: LossArgs(impl="plain", chunk_rows=7),
            "loss.chunk_rows: 7 has no effect with loss.impl: plain; set loss.impl: chunked",
        ),
        (lambda: EvalArgs(sample_tokens=7), "eval.sample_tokens: 7 has no effect with eval.sample_prompt: null"),
        (lambda: TokenizerArgs(kind="bytes", vocab_size=512), "tokenizer.vocab_size: 512 has no effect with tokenizer"),
        (
            lambda: ParallelArgs(sequence=False),
            "parallel.sequence: false has no effect with parallel.tensor: 1; set par",
        ),
        (
            lambda: ParallelArgs(context_method="ring"),
            "parallel.context_method: ring has no effect with parallel.conte",
        ),
        (lambda: ParallelArgs(pipeline_schedule="gpipe"), "parallel.pipeline_schedule: gpipe has no effect with paral"),
        (
            lambda: ParallelArgs(pipeline_layers=[2]),
            r"parallel.pipeline_layers: \[2\] has no effect with parallel.pipel",
        ),
        (lambda: ParallelArgs(expert_dispatch="all-gather"), "parallel.expert_dispatch: all-gather has no effect"),
        (lambda: SGD(nesterov=True), "optimizer.nesterov: true has no effect with optimizer.momentum: 0"),
        (lambda: SGD(dampening=0.5), "optimizer.dampening: 0.5 has no effect with optimizer.momentum: 0"),
        (lambda: SGD(momentum=0.9, nesterov=True, dampening=0.5), "set optimizer.dampening: 0"),
        (
            lambda: Full(trainable_parameters=["head"]),
            r"tuner.trainable_parameters: \['head'\] has no effect with",
        ),
        (
            lambda: LoRA(target_regex="q", target_modules=["k"]),
            "has no effect with tuner.target_regex; set one of them",
        ),
        (
            lambda: FinetuneFull(Path("x"), eval=EvalArgs(evaluate_example=3)),
            "eval.evaluate_example: 3 has no effect with eval.max_new_tokens: null",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize(
    ("settings", "warnings"),
    [
        ({}, []),
        ({"optimizer": AdamW(lr=1e-6), "train": TrainArgs(lr_decay_style="constant")}, []),
        (
            {"train": TrainArgs(lr_decay_style="constant", min_lr=1e-5)},
            ["train.min_lr: 1e-05 has no effect with train.lr_decay_style: constant; set train.lr_decay_style: cosine"],
        ),
        (
            {"log": LogArgs(project="a", group="b")},
            [
                f"log.{name} has no effect with logger_name: tensorboard; set logger_name: wandb or mlflow"
                for name in ("project: a", "group: b")
            ],
        ),
        ({"log": LogArgs(project="a"), "logger_name": "wandb"}, []),
        (
            {"log": LogArgs(save_dir=Path("d"), tensorboard_queue_size=1), "logger_name": "mlflow"},
            [
                "log.tensorboard_queue_size: 1 has no effect with logger_name: mlflow; set tensorboard",
                "log.save_dir: d has no effect with logger_name: mlflow; set logger_name: tensorboard or wandb",
            ],
        ),
        ({"log": LogArgs(save_dir=Path("d"), tensorboard_queue_size=1), "logger_name": "tensorboard"}, []),
        (
            {"checkpoint": CheckpointArgs(load_optimizer=False, load_rng=False)},
            [
                f"checkpoint.{name}: false has no effect with resume: false; set resume: auto"
                for name in ("load_optimizer", "load_rng")
            ],
        ),
        (
            {"parallel": ParallelArgs(zero=2)},
            ["parallel.zero: 2 has no effect with 1 shard; set parallel.data_shard: 2"],
        ),
        (
            {"parallel": ParallelArgs(reshard_after_forward=False, prefetch=2)},
            [
                f"parallel.{name} has no effect with 1 shard; set parallel.data_shard: 2"
                for name in ("reshard_after_forward: false", "prefetch: 2")
            ],
        ),
    ],
)
def test_what_litgpt_accepts_without_effect_is_a_warning(settings, warnings):
    assert Pretrain("x", **settings).list_unused_settings(ParallelDims()) == warnings
