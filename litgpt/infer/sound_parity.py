"""Compare sounds with transformers: frames by a folder's processor, and the logits of a text with them."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.data.media.sound_reader import SoundReader, build_sound_reader
from litgpt.data.media.sounds import compute_log_mel
from litgpt.infer.requests import name_media_tokens
from litgpt.model.audio_config import AudioShape
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.media import pack_sounds
from litgpt.store.load_model import load_model

LENGTHS = (0.13, 0.7)  # of the longest sound


@dataclass(frozen=True)
class ComparedSounds:
    """Drawn sounds as both libraries read them.

    Attributes:
        seconds: of each.
        same_frames: whether frames and their numbers are equal to the bit.
        largest, share: the largest difference of logits of a text with them, and its share of the largest logit.
    """

    seconds: list[float]
    same_frames: bool
    largest: float
    share: float


def compare_sounds(reference: Any, folder: Path, config: Config, seed: int) -> ComparedSounds:
    """Two drawn sounds by the folder's processor, and the logits of a text with them.

    Args:
        reference: the model of transformers.

    Raises:
        UserError: if the processor of the folder is not supported, or not that of the tower.
    """
    from transformers import AutoFeatureExtractor

    assert config.audio is not None
    reader = build_sound_reader(folder, AudioShape.from_values(config.audio))
    settings, shape = reader.settings, reader.shape
    extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    options = {"sampling_rate": settings.rate, "padding": "max_length", "return_attention_mask": True}
    sounds = draw_sounds(reader, seed)
    outputs = [extractor(sound.numpy(), **options, return_tensors="pt") for sound in sounds]
    expected = torch.cat([output["input_features"] for output in outputs])
    mask = torch.cat([output["attention_mask"] for output in outputs])
    frames = [compute_log_mel(sound, settings) for sound in sounds]
    lengths = [settings.count_frames(len(sound)) for sound in sounds]
    same = lengths == mask.sum(1).tolist() and all(map(is_start, frames, expected.mT))
    read = [each[: shape.count_read_frames(length)] for each, length in zip(frames, lengths, strict=True)]
    words = sorted(set(range(min(config.vocab_size, config.padded_vocab_size or 0))) - name_media_tokens(config).keys())
    draw = random.Random(seed)
    ids = draw.choices(words, k=3)
    for length in lengths:
        ids += [shape.audio_token] * shape.count_features(length) + draw.choices(words, k=2)
    model, ids_BT = GPT(config).eval(), torch.tensor([ids])
    load_model(model, folder)
    inputs = {"input_features": expected, "feature_attention_mask": mask, "attention_mask": torch.ones_like(ids_BT)}
    with torch.no_grad():
        expected_logits = reference(input_ids=ids_BT, **inputs, use_cache=False).logits
        logits = model(ids_BT, media=pack_sounds(torch.cat(read), lengths))
    largest = float((logits - expected_logits).abs().max())
    seconds = [len(sound) / settings.rate for sound in sounds]
    return ComparedSounds(seconds, same, largest, largest / float(expected_logits.abs().max()))


def is_start(frames_FM: Tensor, expected_FM: Tensor) -> bool:
    """Whether frames equal the first of others, after which there is only silence."""
    return torch.equal(frames_FM, expected_FM[: len(frames_FM)])


def draw_sounds(reader: SoundReader, seed: int) -> list[Tensor]:
    """Sounds of two lengths: a rising tone with noise."""
    draw, sounds = torch.Generator().manual_seed(seed), []
    for share in LENGTHS:
        times = torch.arange(int(share * reader.settings.most_samples)) / reader.settings.rate
        noise = torch.randn(len(times), generator=draw)
        sounds.append(0.3 * torch.sin(2 * torch.pi * (200 + 300 * times) * times) + 0.05 * noise)
    return sounds
