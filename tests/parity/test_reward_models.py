"""Reward models as transformers publishes them, classifiers with one label: every family read, written and verified."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from litgpt.cli import main
from litgpt.errors import UserError
from litgpt.files import read_json, write_json
from litgpt.infer.requests import check_prompt
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.registry import load_families
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.preference import PreferenceArgs
from litgpt.store.litgpt_files import write_litgpt_config
from litgpt.store.load_model import load_model
from litgpt.store.save_model import save_model_folder
from litgpt.train.reward import pair_rewards
from litgpt.train.step import compute_gradients
from litgpt.train.train_state import TrainState
from tests.parity import test_expert_families, test_families
from tests.parity.test_families import IDS, SIZES
from tests.train.pairs import collate, draw_answers

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{row.kind: (SIZES | IDS, row.settings) for row in reversed(test_families.ROWS.values())},
    **{kind: (test_expert_families.SIZES, changes) for kind, changes in test_expert_families.MODELS.values()},
}
"""The sizes and the other settings of a small model, by the start of the name of transformers' class."""


def find_kind(architecture: str) -> str:
    """The start of the name of a class; that of a config leaves out Text."""
    return architecture.removesuffix("ForSequenceClassification")


ARCHITECTURES = {
    family.name: family.reward_architecture for family in load_families().values() if family.reward_architecture
}


@torch.no_grad()
def build_reference(architecture: str, **changes: Any) -> Any:
    """A small reward model of transformers with random weights."""
    kind = find_kind(architecture)
    sizes, settings = KINDS[kind]
    if "n_embd" in settings:
        sizes = {"vocab_size": 96, **IDS}
    if kind in ("Falcon", "GPTNeoX", "Persimmon"):
        sizes = {key: size for key, size in sizes.items() if key != "num_key_value_heads"}
    shape = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3Text" else f"{kind}Config")
    config = shape(**{**sizes, **settings, "num_labels": 1, **changes})
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).float().eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def compute_scores(model: Any, ids: Tensor) -> Tensor:
    """The scores of transformers of all tokens, (B, T, 1)."""
    return model.score(model.base_model(ids, use_cache=False)[0])


def draw_rows() -> Tensor:
    return torch.randint(3, 96, (3, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_equal_transformers(name: str, tmp_path: Path) -> None:
    hf_model, source, export = build_reference(ARCHITECTURES[name]), tmp_path / "published", tmp_path / "export"
    hf_model.save_pretrained(source)
    config, ids = Config.from_checkpoint(source), draw_rows()
    assert config.output == "score" and not config.tie_embeddings
    model = GPT(config).eval()
    load_model(model, source)
    expected = compute_scores(hf_model, ids)
    assert expected.std() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
        pooled = hf_model(ids, use_cache=False).logits if hf_model.config.pad_token_id is not None else None
    if pooled is not None:
        torch.testing.assert_close(pooled, expected[:, -1])  # what transformers returns is the score of the last token

    save_model_folder(export, config=config, tensors=((key, value.detach()) for key, value in model.named_parameters()))
    exported, original = load_file(export / "model.safetensors"), load_file(source / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original)
    loaded, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        export, output_loading_info=True, dtype="float32", attn_implementation="eager"
    )
    assert type(loaded) is type(hf_model) and loaded.config.num_labels == 1 and not any(report.values()), report
    torch.testing.assert_close(compute_scores(loaded.eval(), ids), expected, atol=1e-6, rtol=1e-5)
    (export / "model_config.yaml").unlink()
    assert Config.from_checkpoint(export) == Config(**{**config.to_dict(), "name": "export"})


def test_a_family_without_classifiers_keeps_our_names(tmp_path: Path) -> None:
    config = Config.from_name("Llama-3.2-1B", n_layer=1, n_embd=16, n_head=2, n_query_groups=1, output="score")
    cohere = Config(**{**config.to_dict(), "norm_class_name": "ScaleLayerNorm", "name": ""})
    lines: list[str] = []
    save_model_folder(
        tmp_path / "model",
        config=cohere,
        tensors={name: torch.zeros_like(value) for name, value in GPT(cohere).named_parameters()},
        warn=lines.append,
    )
    assert len(lines) == 1 and "only litgpt loads it" in lines[0]
    assert "score.weight" in load_file(tmp_path / "model" / "model.safetensors")
    assert Config.from_checkpoint(tmp_path / "model").output == "score"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    build_reference("LlamaForSequenceClassification", tie_word_embeddings=True).save_pretrained(folder)
    return folder


def test_a_classifier_with_two_labels_is_refused(published: Path, tmp_path: Path) -> None:
    values = read_json(published / "config.json")
    assert values["id2label"] == {"0": "LABEL_0"}
    write_json(tmp_path / "config.json", {key: value for key, value in values.items() if key != "id2label"})
    with pytest.raises(UserError, match="num_labels: 2 is not supported; use 1, which is a reward model"):
        Config.from_checkpoint(tmp_path)


def test_text_is_not_generated(published: Path) -> None:
    model = GPT(Config.from_checkpoint(published))
    with pytest.raises(UserError, match="a reward model computes scores, not text"):
        check_prompt(model, [3], 1)


def test_the_tensors_and_scores_are_verified(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(published), "--rows", "2", "--length", "20"]) == 0
    output = capsys.readouterr().out
    assert output.count(": passed") == 4 and "logits: passed" in output


def test_a_padding_token_that_ends_texts_is_not_published(published: Path, tmp_path: Path) -> None:
    model = GPT(Config.from_checkpoint(published))
    load_model(model, published)
    for number, (padding, kept) in enumerate({2: None, 0: 0}.items()):
        source, folder = tmp_path / f"tokenizer-{number}", tmp_path / f"model-{number}"
        source.mkdir()
        write_json(source / "config.json", {"eos_token_id": [2, 5], "pad_token_id": padding})
        save_model_folder(folder, config=model.config, tensors=dict(model.named_parameters()), tokenizer_dir=source)
        assert read_json(folder / "config.json").get("pad_token_id") == kept


def test_other_formats_and_pretraining_refuse_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="LitGPT cannot express output: 'score'"):
        write_litgpt_config(tmp_path / "model_config.yaml", Config.from_name("Llama-3.2-1B", output="score"))
    assert main(["pretrain", "pythia-14m", "--model_config.output", "score"]) != 0
    assert "model_config.output: score is not pretrained; use litgpt rm" in capsys.readouterr().err


@pytest.mark.parametrize("margin", [False, True])
def test_loss_and_metrics_equal_trl(margin: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    hf_model = build_reference("LlamaForSequenceClassification")
    hf_model.save_pretrained(tmp_path)
    answers = draw_answers(3)
    ids = pad_sequence([torch.tensor(answer.ids) for answer in (*answers[0::2], *answers[1::2])], batch_first=True)
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    margins = torch.tensor([0.3, 1.0, 0.0]) if margin else torch.zeros(3)
    args = SimpleNamespace(center_rewards_coefficient=0.02)
    trainer = SimpleNamespace(
        args=args,
        model=hf_model,
        accelerator=Accelerator(cpu=True),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    given = inputs | ({"margin": margins} if margin else {})
    expected = trl.RewardTrainer.compute_loss(trainer, hf_model, given)
    expected.backward()

    model = GPT(Config.from_checkpoint(tmp_path))
    load_model(model, tmp_path)
    batch = collate(answers, margin=margins.repeat_interleave(2))
    objective = pair_rewards(PreferenceArgs(loss_type="reward", center_rewards_coefficient=0.02))
    sums = torch.zeros(2, 4, dtype=torch.float64)
    state = TrainState(model, [], torch.device("cpu"), PRECISIONS["32-true"])
    loss, _ = compute_gradients(state, [batch], objective, counts=objective.count(batch), metric_sums=sums)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(model.score.weight.grad, hf_model.score.weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        model.embedding.weight.grad, hf_model.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-4
    )
    chosen, rejected, accuracy, margin_of_rewards = (sums[0] / sums[1]).tolist()
    metrics = {name: values[0] for name, values in trainer._metrics["eval"].items() if name != "num_tokens"}
    assert accuracy == pytest.approx(metrics["accuracy"]) and margin_of_rewards == pytest.approx(
        metrics["margin"], abs=1e-5
    )
    assert (chosen + rejected) / 2 == pytest.approx(metrics["mean_reward"], abs=1e-5)
