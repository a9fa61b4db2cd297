"""`TrainableModel`: its steps are those of the commands, gradients add up, samples are of the weights as they are."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import LLM, TrainableModel
from litgpt.cli import main
from litgpt.errors import UserError
from litgpt.parallel.strategy import exit_process
from litgpt.store.checkpoint_load import iter_checkpoint_weights
from tests.commands.test_finetune import recipe_of, write_base, write_rows
from tests.processes import join_ranks, start_ranks

ROWS = [[5, 6, 7, 8, 9, 10], [30, 31, 32, 33], [60, 61, 62], [90, 91, 92, 93, 94]]
DROPOUT = {"lora_r": 4, "lora_dropout": 0.1, "lora_mlp": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def unused(base: Path) -> TrainableModel:
    """A model without gradients."""
    return open_model(base)


def open_model(base: Path, command: str = "finetune_full", **changes: Any) -> TrainableModel:
    settings: dict[str, Any] = {"checkpoint_dir": str(base), "precision": "32-true", "optimizer": {"lr": 1e-2}}
    settings |= {"train": {"global_batch_size": 4, "micro_batch_size": 4, "max_norm": 1.0}}
    return TrainableModel.open(command, settings, changes)


def weights(model: TrainableModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model._state.core.named_parameters()}


def gradients(model: TrainableModel) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model._state.parameters() if parameter.grad is not None]


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "changes"), [("finetune", DROPOUT), ("finetune_full", {})])
def test_steps_are_those_of_the_command_to_the_bit(
    command: str, changes: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    recipe = recipe_of(tmp_path, base, devices=1, train__max_steps=4, train__save_interval=2, **changes)
    assert main([command, "--config", str(recipe), "--train.max_norm", "0.5"]) == 0
    with next(tmp_path.glob("out/logs/csv/version_0/metrics.csv")).open() as file:
        logged = [row for row in csv.DictReader(file) if row["loss"]]
    model = TrainableModel.open(command, recipe, {"train": {"max_norm": 0.5}})
    states: dict[int, Path] = {}
    for row, batches in zip(logged, model.batches(), strict=False):
        assert len(batches) == 4
        assert model.forward_backward(batches).loss == pytest.approx(float(row["loss"]), rel=1e-6)
        result = model.optim_step(lr=float(row["learning_rate"]))
        assert (result.loss, result.gradient_norm) == (float(row["loss"]), float(row["grad_norm"]))
        states[model.step] = model.save_state(tmp_path / f"state-{model.step}")
    for step in (2, 4):
        run, own = (dict(iter_checkpoint_weights(f)) for f in (tmp_path / f"out/step-{step:08d}", states[step]))
        assert are_equal(run, own)
    # a state continues a run of the command, and a checkpoint of the command a model of the caller's
    argv = ["--config", str(recipe), "--train.max_norm", "0.5", "--resume", str(states[2]), "--out_dir", "again"]
    assert main([command, *argv]) == 0
    assert are_equal(dict(iter_checkpoint_weights(tmp_path / "again/step-00000004")), run)
    other = TrainableModel.open(command, recipe, {"resume": "out/step-00000002", "train": {"max_norm": 0.5}})
    for row, batches in zip(logged[2:], other.batches(), strict=False):
        other.forward_backward(batches)
        other.optim_step(lr=float(row["learning_rate"]))
    assert are_equal(weights(other), weights(model)) and other.tokens == model.tokens
    assert torch.isfinite(LLM.load(states[4], distribute=None)(torch.tensor([[1, 2, 3]]))).all()


def test_gradients_of_two_calls_are_those_of_one(base: Path) -> None:
    model = open_model(base)
    whole = model.forward_backward(ROWS)
    expected = gradients(model)
    model = open_model(base)
    parts = [model.forward_backward(ROWS[:1]), model.forward_backward(ROWS[1:])]
    assert whole.targets == sum(part.targets for part in parts) == 14
    assert sum(part.loss * part.targets for part in parts) == pytest.approx(whole.loss * whole.targets, rel=1e-6)
    for first, second in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(first, second, atol=1e-7, rtol=1e-5)
    result = model.optim_step()
    assert result.loss == pytest.approx(whole.loss, rel=1e-6) and (result.targets, result.tokens) == (14, 18)
    with pytest.raises(UserError, match="optim_step: there are no gradients"):
        model.optim_step()


def test_weights_and_losses_of_the_callers_own(base: Path) -> None:
    """A function that sums what cross_entropy sums has its gradients; values follow the tokens that they belong to."""
    weighted = [{"ids": ids, "weights": [0, 0, *(1.0 for _ in ids[2:])]} for ids in ROWS]
    model = open_model(base)
    expected = model.forward_backward(weighted, loss="cross_entropy")
    reference = gradients(model)
    seen: list[torch.Tensor] = []

    def loss(log_probs: torch.Tensor, batch: Any) -> torch.Tensor:
        seen.extend((batch.ids, batch.labels, batch.token_values["factor"]))
        return -(log_probs * batch.token_values["factor"]).sum()

    model = open_model(base)
    rows = [{"ids": ids, "factor": [7, *(float(number) for number in ids[1:])]} for ids in ROWS]
    model.forward_backward(rows, loss)
    _, labels, factors = seen
    assert torch.equal(factors, labels.clamp(min=0).float())
    model = open_model(base)
    got = model.forward_backward(weighted, lambda log_probs, _: -log_probs.sum())
    assert (got.loss, got.targets) == (pytest.approx(expected.loss, rel=1e-6), 10)
    for first, second in zip(gradients(model), reference, strict=True):
        torch.testing.assert_close(first, second, atol=1e-7, rtol=1e-5)


def test_samples_are_of_the_weights_as_they_are(base: Path) -> None:
    """Their log-probabilities are those that training computes for them, before and after steps."""
    model = open_model(base, "finetune", **DROPOUT)
    texts = []
    for _ in range(2):
        state = torch.get_rng_state()
        samples = model.sample([[5, 6, 7], "There are"], max_new_tokens=8, temperature=1.0, seed=3)
        assert torch.equal(torch.get_rng_state(), state) and model._state.core.training
        texts.append([sample.ids for sample in samples])
        prompts = [[5, 6, 7], model.tokenizer.encode("There are").tolist()]
        for prompt, sample in zip(prompts, samples, strict=True):
            ids = [*prompt, *(token.token for token in sample.tokens)]
            row = {"ids": ids, "weights": [0] * len(prompt) + [1] * len(sample.tokens)}
            trained = measure(model, row)
            sampled = torch.tensor([token.logprob for token in sample.tokens])
            torch.testing.assert_close(trained, sampled, atol=1e-6, rtol=0)
        for _ in range(5):
            model.forward_backward(ROWS)
            model.optim_step(lr=0.05)
    assert texts[0] != texts[1]


def measure(model: TrainableModel, row: dict[str, Any]) -> torch.Tensor:
    """The log-probabilities of the labels of a row in training, without dropout; the gradients are dropped."""
    found: list[torch.Tensor] = []

    def loss(log_probs: torch.Tensor, batch: Any) -> torch.Tensor:
        found.append(log_probs.detach()[batch.labels != -100])
        return log_probs.sum()

    before, core = weights(model), model._state.core
    core.eval()
    model.forward_backward([row], loss)
    core.train()
    model._state.zero_grad()
    model._gradients = None
    assert are_equal(weights(model), before)
    return found[0]


def test_a_state_continues_to_the_bit(base: Path, tmp_path: Path) -> None:
    def train(model: TrainableModel, steps: int) -> dict[str, torch.Tensor]:
        for _ in range(steps):
            model.forward_backward(ROWS)
            model.optim_step()
        return weights(model)

    model = open_model(base, "finetune", **DROPOUT)
    train(model, 2)
    folder = model.save_state(tmp_path / "state.2")
    assert [path.name for path in tmp_path.iterdir()] == ["state.2"]
    expected = train(model, 2)
    assert (model.step, model.tokens) == (4, 72)
    model.load_state(folder)
    assert (model.step, model.tokens) == (2, 36)
    assert are_equal(train(model, 2), expected)
    assert are_equal(train(open_model(base, "finetune", resume=str(folder), **DROPOUT), 2), expected)
    with pytest.raises(UserError, match="already exists"):
        model.save_state(folder)
    model.forward_backward(ROWS)
    with pytest.raises(UserError, match="gradients are not saved"):
        model.save_state(tmp_path / "other")
    (shard,) = folder.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=shard.name):
        model.load_state(folder)


def test_what_a_killed_process_left_is_replaced(base: Path, tmp_path: Path) -> None:
    (tmp_path / "state.partial" / "step-00000000").mkdir(parents=True)
    open_model(base).save_state(tmp_path / "state")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], None, "batches: there are none"),
        ([[1, 2], [3]], None, r"row 2: ids have the shape \(1,\)"),
        ([[0.5, 1]], None, "row 1: ids"),
        ([list(range(258))], None, "give 2 to 257 whole numbers"),
        ([[1, 400]], None, "data: holds token 400, but the model has 320 rows"),
        ([{"tokens": [1, 2]}], None, "row 1: has no ids, but tokens"),
        ([{"ids": [1, 2], "weights": [1]}], None, "row 1: weights is not one finite number for each of the 2 ids"),
        ([{"ids": [1, 2], "weights": [1, -1]}], None, "row 1: weights has -1"),
        ([{"ids": [1, 2], "old": [0, 1]}, [1, 2]], None, r"rows: one has the values \['old'\], another \[\]"),
        ([[1, 2]], "mse", "loss: 'mse' is not known; set cross_entropy, dft, None or a function"),
        ([[1, 2]], lambda log_probs, _: log_probs, r"loss: the function has returned \(1, 2\)"),
    ],
)
def test_what_does_not_fit_is_named(batches: Any, loss: Any, message: str, unused: TrainableModel) -> None:
    with pytest.raises(UserError, match=message):
        unused.forward_backward(batches, loss)


def test_settings_that_need_the_loop_of_a_command_are_refused(base: Path) -> None:
    with pytest.raises(UserError, match="command: 'generate' does not train"):
        open_model(base, "generate")
    with pytest.raises(UserError, match="lora_ga needs the loop"):
        open_model(base, "finetune", tuner={"class_path": "LoRA", "init_args": {"init": "lora_ga"}})
    with pytest.raises(UserError, match="add_version: true has no effect"):
        open_model(base, add_version=True)
    with pytest.raises(UserError, match=r"train\.max_stepz"):
        open_model(base, train={"max_stepz": 1})


@pytest.mark.slow
def test_preferences_are_trained_by_the_loss_of_the_recipe(base: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": "How many?", "chosen": f"There are {n}.", "rejected": "None"} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source: dict[str, Any] = {"sources": [str(tmp_path / "pairs.jsonl")], "cache_dir": str(tmp_path / "cache")}
    arguments = {**source, "prompt_style": "alpaca", "num_workers": 0}
    data = {"class_path": "Preferences", "init_args": arguments}
    model = open_model(base, "align", data=data, train={"micro_batch_size": 2})
    losses = []
    for _, batches in zip(range(3), model.batches(), strict=False):
        losses.append(model.forward_backward(batches).loss)
        with pytest.raises(UserError, match="several terms"):
            model.forward_backward(batches)
        assert "rewards/margins" in model.optim_step().metrics
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[2] < losses[0]


def train_on_ranks(base: Path, layout: dict[str, Any], rows: int) -> int:
    """Two calls and a step of each of two ranks, with rows of its own or all of them, and a checkpoint."""
    model = open_model(base, devices=2, parallel=layout, train={"micro_batch_size": 2})
    first = model._fabric.global_rank * (rows % 4)
    for start in (first, first + rows // 2):
        model.forward_backward(ROWS[start : start + rows // 2])
    loss = model.optim_step().loss
    model.save_state("state")
    if "tensor" in layout:
        print("sampled", [text.ids for text in model.sample([[5, 6, 7]], max_new_tokens=4, temperature=0)])
    elif "data_shard" in layout:
        with pytest.raises(UserError, match=r"sample: not supported with parallel\.data_shard: 2"):
            model.sample([[5, 6, 7]])
    print("loss", loss)
    sys.stdout.flush()
    exit_process(0)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "rows"),
    [({"data_replicate": 2}, 2), ({"data_shard": 2}, 2), ({"data_shard": 1, "tensor": 2, "sequence": False}, 4)],
)
def test_gradients_of_several_calls_add_up_over_ranks(
    layout: dict[str, Any], rows: int, base: Path, tmp_path: Path
) -> None:
    codes = join_ranks(start_ranks(train_on_ranks, base, layout, rows, folder=tmp_path, ranks=2))
    log = (tmp_path / "rank-0.log").read_text()
    assert codes == [0, 0], log
    model = open_model(base)
    model.forward_backward(ROWS)
    assert f"loss {model.optim_step().loss:.5f}"[:10] in log
    own, saved = weights(model), dict(iter_checkpoint_weights(tmp_path / "state"))
    for name in own:
        torch.testing.assert_close(saved[name], own[name], atol=1e-5, rtol=1e-4)
    if "tensor" in layout:
        model.load_state(tmp_path / "state")
        assert f"sampled {[text.ids for text in model.sample([[5, 6, 7]], max_new_tokens=4, temperature=0)]}" in log
