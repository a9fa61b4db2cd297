"""Checkpoints that Megatron-core wrote (`write_megatron.py`) are read with its results; hostile ones are refused."""

import argparse
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import cli
from litgpt.commands.convert_pretrained_checkpoint import run as convert
from litgpt.errors import UserError
from litgpt.model.gpt import GPT
from litgpt.recipe.pretrain import Pretrain
from litgpt.recipe.store_commands import ConvertPretrainedCheckpoint
from litgpt.store.load_model import iter_tensors, load_config, load_model
from litgpt.store.megatron_config import build_config
from litgpt.store.megatron_files import load_metadata, load_run_arguments
from litgpt.store.weight_files import open_weights
from litgpt.train.build_state import build_train_state
from litgpt.train.run_spec import build_pretrain_spec

ARCHIVE = Path(__file__).parent / "megatron.tar.xz"
MODELS = ("dense", "tensor", "gelu", "experts", "separate", "latent")


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The folder of a model, by name; that of "dense" without one."""
    name = getattr(request, "param", "dense")
    with tarfile.open(ARCHIVE) as archive:
        members = [member for member in archive.getmembers() if member.name.startswith(f"./{name}")]
        archive.extractall(tmp_path, members, filter="data")
    return tmp_path / name


@pytest.mark.parametrize("checkpoint", MODELS, indirect=True)
def test_logits_are_those_of_megatron_core(checkpoint: Path) -> None:
    expected = torch.load(checkpoint / "logits.pt")
    config = load_config(checkpoint)
    model = GPT(config).eval()
    load_model(model, checkpoint)
    torch.testing.assert_close(model(expected["tokens"]), expected["logits"], atol=2e-5, rtol=0)


def test_experts_in_tensors_of_their_own_are_the_same(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    experts, separate = (dict(iter_tensors(tmp_path / name, load_config(tmp_path / name))) for name in MODELS[3:5])
    assert experts.keys() == separate.keys()
    assert all(torch.equal(experts[name], separate[name]) for name in experts)


@pytest.mark.parametrize("checkpoint", ["experts"], indirect=True)
def test_a_command_writes_a_model_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "tokenizer_config.json").write_text("{}")
    assert cli.main(["convert_pretrained_checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "out")]) == 0
    assert "a model folder made of" in capsys.readouterr().out
    read = dict(iter_tensors(checkpoint, load_config(checkpoint)))
    written = dict(iter_tensors(tmp_path / "out", load_config(tmp_path / "out")))
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in read)
    assert (tmp_path / "out" / "tokenizer_config.json").exists()


def test_rows_that_pad_the_vocabulary_are_left_out(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    step = checkpoint / "iter_0000003"
    values = {**config.to_dict(), "padded_vocab_size": 37, "vocab_size": 37}
    (step / "model_config.yaml").write_text(json.dumps(values))  # JSON is YAML
    whole, cut = dict(iter_tensors(checkpoint, config)), dict(iter_tensors(step, load_config(step)))
    for name in ("embedding.weight", "head.weight"):
        assert torch.equal(cut[name], whole[name][:37])


def test_pretraining_starts_from_it(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    fields = {key: value for key, value in config.to_dict().items() if value is not None}
    recipe = Pretrain(
        "tiny", model_config=fields, initial_checkpoint_dir=checkpoint, precision="32-true", compile=False
    )
    state = build_train_state(recipe, build_pretrain_spec(recipe), None, torch.device("cpu"), resumed=False)
    read = dict(iter_tensors(checkpoint, config))
    assert all(torch.equal(parameter, read[name]) for name, parameter in state.model.named_parameters())


class Harmful:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_metadata_that_runs_code_is_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    metadata = checkpoint / "iter_0000003" / ".metadata"
    metadata.write_bytes(pickle.dumps(Harmful(tmp_path / "made")))
    with pytest.raises(UserError, match=r"\.metadata: refused, .* names posix\.mkdir, which no checkpoint") as error:
        open_weights(checkpoint)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["system", "load", "Tensor", "_utils", "float32x", "jit.load"])
def test_no_function_of_torch_can_be_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(b"\x80\x02ctorch\n" + name.encode() + b"\n.")
    with pytest.raises(UserError, match="refused"):
        load_metadata(path)


def test_arguments_that_run_code_are_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    common = checkpoint / "iter_0000003" / "common.pt"
    torch.save({"args": argparse.Namespace(num_layers=Harmful(tmp_path / "made"))}, common)
    with pytest.raises(UserError, match=r"common\.pt: refused, ") as error:
        load_config(checkpoint)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


def test_blocks_outside_the_folder_are_refused(checkpoint: Path) -> None:
    metadata = checkpoint / "iter_0000003" / ".metadata"
    data = metadata.read_bytes()
    name = b"__0_0.distcp"
    assert name in data
    metadata.write_bytes(data.replace(name, b"../../../etc"))
    with pytest.raises(UserError, match="outside of the folder"):
        open_weights(checkpoint)


def test_a_file_that_was_not_saved_whole_is_named(checkpoint: Path) -> None:
    config = load_config(checkpoint)
    path = checkpoint / "iter_0000003" / "__0_1.distcp"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"__0_1\.distcp: ends after 9000 bytes"):
        dict(iter_tensors(checkpoint, config))


@pytest.mark.parametrize("damage", [b"", b"not a pickle", pickle.dumps({"a": 1})])
def test_damaged_metadata_is_named(checkpoint: Path, damage: bytes) -> None:
    (checkpoint / "iter_0000003" / ".metadata").write_bytes(damage)
    with pytest.raises(UserError, match=r"iter_0000003/\.metadata"):
        dict(iter_tensors(checkpoint, load_config(checkpoint)))


def test_a_checkpoint_without_arguments_asks_for_the_config(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "iter_0000003" / "common.pt").unlink()
    with pytest.raises(UserError, match="has no arguments to read the config from; give --model_name"):
        load_config(checkpoint)
    with pytest.raises(UserError, match=r"no tensor of this name in the model"):  # that of the name has no biases
        convert(ConvertPretrainedCheckpoint(checkpoint, tmp_path / "out", model_name="Qwen3-0.6B"))


def test_the_latest_iteration_must_exist(checkpoint: Path) -> None:
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("4\n")
    with pytest.raises(UserError, match="names iter_0000004, which is not a torch_dist checkpoint"):
        load_config(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None}, "the argument num_layers is missing"),
        ({"window_size": (128, 0)}, r"window_size: \(128, 0\) is not supported; only none"),
        ({"position_embedding_type": "mrope"}, "only rope, learned_absolute"),
        ({"num_experts": 4, "swiglu": False}, "experts without swiglu"),
        ({"multi_latent_attention": True, "qk_layernorm": False}, "without qk_layernorm"),
        ({"num_attention_heads": 5, "kv_channels": None}, "model_config.n_embd: 16 is not divisible"),
    ],
)
def test_arguments_of_other_models_are_refused(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    arguments = load_run_arguments(checkpoint / "iter_0000003")
    assert arguments is not None
    with pytest.raises(UserError, match=message):
        build_config({**arguments, **changes}, checkpoint, "tiny")


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"apply_layernorm_1p": True}, {"norm_class_name": "OffsetRMSNorm"}),
        ({"swiglu": False, "squared_relu": True}, {"mlp_class_name": "GptNeoxMLP", "activation": "relu_squared"}),
        ({"swiglu": False, "bias_gelu_fusion": True}, {"gelu_approximate": "tanh", "activation": None}),
        ({"rotary_percent": 0.5, "rotary_interleaved": True}, {"rotary_percentage": 0.5, "rope_interleave": True}),
        ({"rotary_seq_len_interpolation_factor": 4}, {"rope_adjustments": {"factor": 4}}),
        ({"group_query_attention": False, "num_query_groups": 1}, {"n_query_groups": 4}),
        ({"position_embedding_type": "learned_absolute"}, {"position_embedding": "learned"}),
        ({"num_experts": 4, "moe_layer_freq": 2}, {"moe_layers": [1, 0], "norm_topk_prob": False}),
        (
            {"num_experts": 8, "moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2,
             "moe_router_score_function": "sigmoid"},
            {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2, "norm_topk_prob": True},
        ),
    ],
)  # fmt: skip
def test_arguments_are_translated(checkpoint: Path, changes: dict[str, Any], fields: dict[str, Any]) -> None:
    arguments = load_run_arguments(checkpoint / "iter_0000003")
    assert arguments is not None
    config = build_config({**arguments, **changes}, checkpoint, "tiny")
    assert {key: getattr(config, key) for key in fields} == fields
