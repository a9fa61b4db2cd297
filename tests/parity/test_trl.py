"""The losses of preferences against TRL's trainers, on the same weights and answers."""

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from litgpt.data.stream.batch import Batch
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.preference import WITH_DIVERGENCE, WITH_REFERENCE, PreferenceArgs
from litgpt.recipe.train import LossArgs
from litgpt.store.load_model import load_model
from litgpt.train.kto import rated_answers
from litgpt.train.objective import Objective
from litgpt.train.preference import paired_answers
from litgpt.train.preference_losses import PairScores, compute_pair_losses
from litgpt.train.reference import Reference, copy_values
from litgpt.train.step import compute_gradients
from litgpt.train.train_state import TrainState
from tests.train.pairs import Answer, collate, draw_answers
from tests.train.test_preference_losses import COLUMNS, GOLDEN

pytestmark = pytest.mark.slow  # importing TRL and its trainers takes longer than all tests here

DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")
SETTINGS: list[dict[str, Any]] = [
    *({"loss_type": name} for name in sorted(WITH_REFERENCE - {"kto", "exo_pair", "robust"})),
    *({"loss_type": name, "label_smoothing": 0.1} for name in ("exo_pair", "robust", "aot", "aot_unpaired")),
    *(
        {"loss_type": name, "f_divergence_type": divergence, "label_smoothing": smoothing}
        for name in sorted(WITH_DIVERGENCE)
        for smoothing in [0.1 if name in ("exo_pair", "robust") else 0.0]
        for divergence in DIVERGENCES
    ),
    {"loss_type": "sft"},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": "sigmoid", "ld_alpha": 0.3},
    {"loss_type": "ipo", "ld_alpha": 0.0},
    {"loss_type": "sigmoid", "use_weighting": True},
    {"loss_type": ["sigmoid_norm", "apo_zero"], "loss_weights": [0.5, 2.0], "use_weighting": True, "beta": 0.4},
]


class Accelerator:
    """What TRL's losses use of accelerate's, for one process."""

    device = torch.device("cpu")

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes."""
        return values

    gather_for_metrics = gather


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[LlamaForCausalLM], list[GPT]]:
    """A policy and a reference of transformers, and the same two models of ours."""
    from trl.trainer.utils import add_fused_lm_head

    theirs, ours = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=50,
            max_position_embeddings=32,
            initializer_range=0.1,
        )
        model = LlamaForCausalLM(config)
        folder = tmp_path_factory.mktemp("models")
        model.save_pretrained(folder)
        gpt = GPT(Config.from_checkpoint(folder))
        load_model(gpt, folder)
        fields = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
        add_fused_lm_head(model, outputs=fields)
        theirs.append(model.train())
        ours.append(gpt)
    return theirs, ours


def build_inputs(answers: list[Answer], prefix: str = "") -> dict[str, Tensor]:
    """The padded inputs of TRL's collators for answers in this order."""
    shape = (len(answers), max(len(answer.ids) for answer in answers))
    inputs = {
        prefix + name: torch.zeros(shape, dtype=torch.long)
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, answer in enumerate(answers):
        size = slice(len(answer.ids))
        inputs[f"{prefix}input_ids"][row, size] = torch.tensor(answer.ids)
        inputs[f"{prefix}attention_mask"][row, size] = 1
        inputs[f"{prefix}completion_mask"][row, size] = (torch.tensor(answer.weights) > 0).long()
    return inputs


def build_trainer(models: list[LlamaForCausalLM], **settings: Any) -> SimpleNamespace:
    """The attributes that TRL's losses read."""
    return SimpleNamespace(
        accelerator=Accelerator(),
        model=models[0],
        ref_model=models[1],
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def compute_loss_of_trl(
    models: list[LlamaForCausalLM], answers: list[Answer], settings: dict[str, Any]
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient of the embedding, and metrics."""
    from trl import DPOTrainer

    types = settings["loss_type"] if isinstance(settings["loss_type"], list) else [settings["loss_type"]]
    trainer = build_trainer(
        models,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        loss_types=types,
        loss_weights=settings.get("loss_weights") or [1.0] * len(types),
        beta=settings.get("beta", 0.1),
        label_smoothing=settings.get("label_smoothing", 0.0),
        ld_alpha=settings.get("ld_alpha"),
        f_divergence_type=settings.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=0.5,
        use_weighting=settings.get("use_weighting", False),
    )
    loss = DPOTrainer._compute_loss(trainer, models[0], build_inputs([*answers[::2], *answers[1::2]]), False)
    (gradient,) = torch.autograd.grad(loss, [models[0].model.embed_tokens.weight])
    return loss.item(), gradient, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def compute_our_loss(
    models: list[GPT], batches: list[Batch], objective: Objective
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient of the embedding, and metrics."""
    precision = PRECISIONS["32-true"]
    weights = Reference(copy_values(models[1], dict(models[1].named_parameters())))
    train_state = TrainState(models[0], [], torch.device("cpu"), precision, reference=weights)
    sums = torch.zeros(2, len(objective.metrics), dtype=torch.float64)
    counts = objective.count_batches(batches)
    batches = objective.prepare(train_state, batches)
    loss, _ = compute_gradients(train_state, batches, objective, counts=counts, metric_sums=sums)
    gradient = models[0].embedding.weight.grad
    assert gradient is not None
    train_state.zero_grad()
    return loss, gradient, dict(zip(objective.metrics, (sums[0] / sums[1]).tolist(), strict=True))


def check_metrics(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Compare the metrics that both have."""
    names = set(ours) & set(theirs)
    assert {"rewards/chosen", "logps/rejected", "logits/chosen"} <= names
    assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, abs=2e-5)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_losses_of_pairs_equal_trls(models: tuple[list[LlamaForCausalLM], list[GPT]], settings: dict[str, Any]) -> None:
    answers = draw_answers(4)
    expected, wanted, theirs = compute_loss_of_trl(models[0], answers, settings)
    objective = paired_answers(PreferenceArgs(**settings), LossArgs(chunk_rows=7))
    loss, gradient, ours = compute_our_loss(models[1], [collate(answers, packed=True)], objective)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)
    torch.testing.assert_close(gradient[:50], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    if settings["loss_type"] != "sft":  # whose rewards have no reference here
        check_metrics(ours, theirs)


@pytest.mark.parametrize("seed", [0, 2])
def test_kto_equals_trls(models: tuple[list[LlamaForCausalLM], list[GPT]], seed: int) -> None:
    from trl import KTOTrainer

    answers, desirable = draw_answers(4, seed=seed), torch.tensor([True, False, False, True])
    trainer = build_trainer(
        models[0],
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.3,
        undesirable_weight=0.6,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    inputs = build_inputs(answers[::2]) | build_inputs(answers[1::2], "KL_") | {"label": desirable}
    expected = KTOTrainer._compute_loss(trainer, models[0][0], inputs, False)
    (wanted,) = torch.autograd.grad(expected, [models[0][0].model.embed_tokens.weight])
    settings = PreferenceArgs(loss_type="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
    batches = [
        collate(answers[start : start + 4], desirable=desirable[start // 2 :][:2].float().repeat_interleave(2))
        for start in (0, 4)
    ]
    loss, gradient, ours = compute_our_loss(models[1], batches, rated_answers(settings, LossArgs()))
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(gradient[:50], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    check_metrics(ours, {name: values[-1] for name, values in trainer._metrics["train"].items()})


def call_trl(settings: dict[str, Any], scores: PairScores) -> Tensor:
    """The losses of CPO and ORPO by TRL's functions of log-probabilities."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    kinds = {"cpo": "sigmoid", "cpo_hinge": "hinge", "cpo_ipo": "ipo", "simpo": "simpo"}
    name, preference = settings["loss_type"], PreferenceArgs(**settings)
    chosen, rejected = scores.chosen, scores.rejected
    if name in ("orpo", "cpo_ipo", "simpo"):
        chosen, rejected = scores.divide_by_length(chosen, rejected)
    trainer = SimpleNamespace(
        accelerator=Accelerator(), alpha=0.0, beta=preference.resolved_beta, loss_type=kinds.get(name)
    )
    trainer.label_smoothing, trainer.simpo_gamma = preference.label_smoothing, preference.simpo_gamma
    compute: Callable[..., Any] = ORPOTrainer.odds_ratio_loss if name == "orpo" else CPOTrainer.cpo_loss
    losses: Tensor = compute(trainer, chosen, rejected)[0]
    return -losses if name == "orpo" else losses


@pytest.mark.parametrize(
    ("settings", "frozen"), [row for row in GOLDEN if str(row[0]["loss_type"]).startswith(("cpo", "orpo", "simpo"))]
)
def test_losses_without_a_reference_equal_trls(settings: dict[str, Any], frozen: list[float]) -> None:
    scores = PairScores(**{name: torch.tensor(values) for name, values in COLUMNS.items()})
    expected = call_trl(settings, scores)
    torch.testing.assert_close(compute_pair_losses(scores, PreferenceArgs(**settings)), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(expected, torch.tensor(frozen), rtol=1e-5, atol=2e-6)
