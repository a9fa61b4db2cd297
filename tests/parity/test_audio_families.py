"""Models with an audio tower against transformers: read as published, logits, gradients, and written to load there."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from litgpt.errors import UserError
from litgpt.model.audio_config import AudioShape
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.media import Media, pack_sounds
from litgpt.model.registry import find_family
from litgpt.store.adapters.peft_lora import list_published_mappings
from litgpt.store.load_model import iter_tensors, load_model
from tests.parity.tower_exports import check_export
from tests.parity.tower_gradients import compare_gradients
from tests.vision_model import DECODER

AUDIO = 90
TEXT = {**DECODER, "model_type": "qwen2", "vocab_size": 96}
TOWER: dict[str, Any] = {"num_mel_bins": 6, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
TOWER |= {"d_model": 16, "max_source_positions": 20}
LENGTHS = (17, 40, 3, 38)
"""Frames of sounds: odd, all, the fewest, and so many that the silence after it is cut."""


def build_config(**changes: Any) -> Any:
    """The settings of a small model."""
    tower = {"model_type": "qwen2_audio_encoder", **TOWER}
    return transformers.Qwen2AudioConfig(
        **{"audio_config": tower, "text_config": TEXT, "audio_token_index": AUDIO} | changes
    )


def build_reference() -> Any:
    """A small random model of transformers, with weights far enough from zero that every part shows in the logits."""
    torch.manual_seed(0)
    model = transformers.Qwen2AudioForConditionalGeneration._from_config(build_config(), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


class Example(NamedTuple):
    """Two texts with sounds for both libraries."""

    ids_BT: Tensor
    media: Media
    theirs: dict[str, Tensor]


def build_example(shape: AudioShape) -> Example:
    """The first row has two sounds, and the second one two; both have the same length."""
    torch.manual_seed(1)
    frames = torch.randn(len(LENGTHS), shape.mels, shape.most_frames)
    places = [[AUDIO] * shape.count_features(length) for length in LENGTHS]
    first = [5, 6, *places[0], 7, *places[1], 8]
    second = [9, *places[2], 11, *places[3], 12, 13]
    length = max(len(first), len(second))
    texts = [text + list(range(20, 20 + length - len(text))) for text in (first, second)]
    mask = torch.arange(shape.most_frames) < torch.tensor(LENGTHS)[:, None]
    parts = [each[:, : shape.count_read_frames(length)].T for each, length in zip(frames, LENGTHS, strict=True)]
    theirs = {"input_features": frames, "feature_attention_mask": mask.long()}
    return Example(torch.tensor(texts), pack_sounds(torch.cat(parts), LENGTHS), theirs)


def compute_hf_logits(model: Any, example: Example) -> Tensor:
    """The logits (B, T, V) of transformers."""
    mask = torch.ones_like(example.ids_BT)
    return model(input_ids=example.ids_BT, attention_mask=mask, **example.theirs, use_cache=False).logits


def test_family_as_published(tmp_path: Path) -> None:
    source, hf_model = tmp_path / "published", build_reference()
    hf_model.save_pretrained(source)
    config = Config.from_checkpoint(source)
    family = find_family(config)
    assert family is not None and family.name == "qwen2_audio" and config.audio is not None
    modules = {mapping.hf_name for mapping in list_published_mappings(config).values()}
    assert modules == set(hf_model.state_dict())  # as PEFT names them
    example = build_example(AudioShape.from_values(config.audio))

    model = GPT(config).eval()
    load_model(model, source, warn=lambda line: pytest.fail(line))
    expected, actual = compute_hf_logits(hf_model, example), model(example.ids_BT, media=example.media)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert compare_gradients(model, hf_model, actual, expected, config) == ["audio.positions.weight"]

    assert model.audio is not None and example.media.sounds is not None
    with torch.no_grad():
        hf_tower, features = hf_model.model, model.audio(example.media.sounds)
        padded = hf_tower.multi_modal_projector(
            hf_tower.audio_tower(example.theirs["input_features"]).last_hidden_state
        )
    whole = slice(4, 14)  # the sound of all frames, for which nothing is masked
    torch.testing.assert_close(features[whole], padded[1], atol=1e-5, rtol=1e-5)
    other = Media(
        torch.zeros(0, 0), (), sounds=example.media.sounds.__class__(example.media.sounds.frames_NM.flip(0), LENGTHS)
    )
    assert (model(example.ids_BT, media=other) - actual).abs().max() > 1e-3

    auto = transformers.Qwen2AudioForConditionalGeneration
    check_export(model, hf_model, source, auto, lambda loaded: compute_hf_logits(loaded, example), expected)


def test_newer_names(tmp_path: Path) -> None:
    build_reference().save_pretrained(tmp_path)
    config, tensors = Config.from_checkpoint(tmp_path), load_file(tmp_path / "model.safetensors")
    expected = dict(iter_tensors(tmp_path, config))
    family = find_family(config)
    assert family is not None
    renamed = {family.name_module(key): value for key, value in tensors.items()}
    assert renamed.keys().isdisjoint(tensors.keys())
    save_file(renamed, tmp_path / "model.safetensors")
    actual = dict(iter_tensors(tmp_path, config))
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"model_type": "phi"}}, "text_config.model_type: 'phi'"),
        ({"audio_config": [1]}, "audio_config: [1]"),
        ({"audio_config": {"scale_embedding": True}}, "audio_config.scale_embedding: True"),
        ({"audio_config": {"encoder_layers": 0}}, "audio_config.encoder_layers"),
        ({"audio_config": {"num_mel_bins": "x"}}, "audio_config.num_mel_bins"),
        ({"audio_config": {"d_model": 17}}, "audio.width: 17"),
        ({"audio_config": {"activation_function": "relu"}}, "audio.act: 'relu'"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {**build_config().to_dict(), "architectures": None}
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    with pytest.raises(UserError, match=re.escape(message)):
        Config.from_checkpoint(tmp_path)
