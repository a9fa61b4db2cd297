"""The audio tower: sounds apart from each other, what it refuses, and its operations."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litgpt.errors import UserError
from litgpt.model.audio import AudioTower
from litgpt.model.audio_config import AudioShape
from litgpt.model.config import Config
from litgpt.model.flops import TrainedShares, compute_training_flops
from litgpt.model.gpt import GPT
from litgpt.model.media import Media, Sounds, build_empty_media, pack_sounds
from litgpt.model.tower_flops import measure_media
from litgpt.model.weight_counts import count_tower_weights

AUDIO: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "mlp_size": 24, "mels": 6, "places": 20}
AUDIO |= {"key_bias": False, "audio_token": 9}
SHAPE: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "n_head": 2, "padded_vocab_size": 16, "block_size": 64}


def build_model(**fields: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(Config(**{**SHAPE, **fields}, audio=AUDIO))


def draw_sounds(*lengths: int) -> Media:
    """Sounds of these numbers of frames."""
    shape, draw = AudioShape.from_values(AUDIO), torch.Generator().manual_seed(1)
    frames = [torch.randn(shape.count_read_frames(length), shape.mels, generator=draw) for length in lengths]
    return pack_sounds(torch.cat(frames), lengths)


def run_tower(model: GPT, media: Media) -> torch.Tensor:
    assert model.audio is not None and media.sounds is not None
    features: torch.Tensor = model.audio(media.sounds)
    return features


def test_published_counts_of_tokens() -> None:
    shape = AudioShape.from_values({**AUDIO, "places": 1500})
    assert [shape.count_features(frames) for frames in (50, 337, 3000)] == [12, 84, 750]
    assert [shape.count_read_frames(frames) for frames in (50, 2999, 3000)] == [52, 3000, 3000]


def test_features_stand_at_their_places_and_sounds_do_not_hear_each_other() -> None:
    model, ids = build_model(), torch.tensor([[1, *[9] * 2, 2, *[9] * 10], [*[9] * 4, 3, *[4] * 9]])
    media = draw_sounds(9, 40, 17)
    hidden, features = model.embed_media(ids, media), run_tower(model, media)
    assert torch.equal(hidden[ids == 9], features)
    assert torch.equal(hidden[ids != 9], model.embedding(ids[ids != 9]))
    alone = [run_tower(model, pack_sounds(frames, [length])) for frames, length in split_sounds(media)]
    torch.testing.assert_close(features, torch.cat(alone), atol=1e-6, rtol=1e-6)


def split_sounds(media: Media) -> list[tuple[torch.Tensor, int]]:
    """The frames and the length of each sound."""
    assert media.sounds is not None
    counts = [AudioShape.from_values(AUDIO).count_read_frames(length) for length in media.sounds.lengths]
    return list(zip(media.sounds.frames_NM.split(counts), media.sounds.lengths, strict=True))


def test_chunks_of_a_sound_do_not_hear_each_other() -> None:
    audio = {**AUDIO, "chunk_places": 5, "positions": "sinusoids", "edge_tokens": True}
    model, shape = GPT(Config(**SHAPE, audio=audio)), AudioShape.from_values(audio)
    assert shape.list_chunks(23) == [10, 10, 3] and shape.list_chunks(20) == [10, 10] and shape.most_frames is None
    frames = torch.randn(23, 6, generator=torch.Generator().manual_seed(1))
    media = pack_sounds(frames, [23])
    features = run_tower(model, media)
    assert len(features) == shape.count_features(23) == 6
    frames = torch.cat([frames[:20], frames[20:] + 1])
    moved = (run_tower(model, pack_sounds(frames, [23])) - features).abs().amax(1) > 1e-6
    assert moved.tolist() == [False] * 5 + [True]
    assert measure_media(model.config, [media])[4:] == (23, 12, 25 + 25 + 4, 6)


def test_trained_tower_without_sounds_has_gradients_of_zero() -> None:
    model, ids = build_model(), torch.tensor([[1, 2, 3]])
    model.embed_media(ids, build_empty_media()).sum().backward()
    assert model.audio is not None
    gradients = {name: parameter.grad for name, parameter in model.audio.named_parameters()}
    assert gradients.pop("positions.weight") is None
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())
    model.audio.requires_grad_(False)
    assert torch.equal(model.embed_media(ids, build_empty_media()), model.embedding(ids))


@pytest.mark.parametrize(
    ("lengths", "ids", "message"),
    [
        ((41,), [9] * 10, "sound of 41 frames: the audio tower reads at most 40; cut it"),
        ((2,), [1], "sound of 2 frames: too short for the audio tower, which reads 3 or more"),
        ((40,), [9] * 9, "10 features for 9 places"),
    ],
)
def test_refusals(lengths: tuple[int, ...], ids: list[int], message: str) -> None:
    frames = torch.zeros(sum(min(length + 2, 40) for length in lengths), 6)
    media = Media(torch.zeros(0, 0), (), sounds=Sounds(frames, lengths))
    with pytest.raises(UserError, match=message):
        build_model().embed_media(torch.tensor([ids]), media)


def test_model_without_tower_refuses_sounds() -> None:
    with pytest.raises(UserError, match="the model has no audio tower"):
        GPT(Config(**SHAPE)).embed_media(torch.tensor([[1]]), draw_sounds(9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mels": 0}, "audio.mels: 0 is out of range"),
        ({"heads": 3}, "audio.width: 16 does not fit 3 heads"),
        ({"mel": 3}, "audio.mel: unknown field"),
        ({"audio_token": None}, "audio.audio_token"),
    ],
)
def test_shapes_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**SHAPE, audio={**AUDIO, **change})


@pytest.mark.parametrize("trained", ["", "audio.", "audio.projector", "audio.conv", "audio.blocks.1"])
def test_formula_equals_the_count(trained: str) -> None:
    model, media = build_model(), draw_sounds(39, 40)  # read without padding
    assert isinstance(model.audio, AudioTower)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and bool(trained) and name.startswith(trained))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        features = run_tower(model, media)
        if features.requires_grad:
            features.sum().backward()
    sizes = measure_media(model.config, [None, media])
    shares = TrainedShares.measure(model)
    flops = compute_training_flops(model.config, tokens=0, sequence_length=0, trained=shares, media=sizes)
    assert counter.get_total_flops() == flops
    assert sizes.list_idle_towers() == ["vision"]
    assert measure_media(model.config, [draw_sounds(8, 17)])[4:] == (10 + 19, 4 + 9, 16 + 81, 2 + 4)
    matrices = [p for name, p in model.audio.named_parameters() if p.dim() == 2 and "positions" not in name]
    assert count_tower_weights(model.config) == sum(parameter.numel() for parameter in matrices)
