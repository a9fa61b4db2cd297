"""Sounds: frames equal to the published processor's to the bit, lengths from headers, and files that are refused."""

import json
import struct
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from litgpt.data.media.errors import MediumError
from litgpt.data.media.sounds import (
    SoundSettings,
    build_mel_filters,
    compute_log_mel,
    decode_sound,
    read_sound_samples,
    read_sound_settings,
)
from litgpt.errors import UserError

SETTINGS = SoundSettings(rate=16000, window=400, hop=160, mels=128, seconds=30)


def draw_samples(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """A rising tone with noise, int16 (samples, channels)."""
    times = np.linspace(0, 1, samples)[:, None]
    tone = np.sin(2 * np.pi * (50 * np.arange(1, channels + 1) * times + 300 * times**2))
    noise = np.random.default_rng(seed).normal(size=(samples, channels))
    return ((0.5 * tone + 0.05 * noise) * 20000).astype(np.int16)


def write_wav(path: Path, values: np.ndarray, rate: int) -> Path:
    """Write a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(values.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    return path


def encode(path: Path, values: np.ndarray, rate: int, codec: str) -> Path:
    """Write a file of another format, that of its suffix."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(values.T.copy(), format="s16", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.format.name, layout="mono", rate=rate, frame_size=stream.frame_size)
        for each in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(each))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("samples", "mels"), [(7000, 128), (53920, 128), (16001, 80), (160, 128), (480000, 80)], ids=str
)
def test_frames_equal_the_processor(samples: int, mels: int, tmp_path: Path) -> None:
    values = draw_samples(samples)
    path, settings = write_wav(tmp_path / "a.wav", values, 16000), SoundSettings(16000, 400, 160, mels, 30)
    decoded = decode_sound(path, settings)
    assert torch.equal(decoded, torch.from_numpy(values[:, 0].astype(np.float32) / 32768))
    theirs = WhisperFeatureExtractor(feature_size=mels)
    expected = theirs(decoded.numpy(), sampling_rate=16000, return_attention_mask=True, return_tensors="pt")
    assert torch.equal(compute_log_mel(decoded, settings).T, expected["input_features"][0])
    assert settings.count_frames(read_sound_samples(path, settings)) == int(expected["attention_mask"].sum())
    torch.testing.assert_close(build_mel_filters(settings).double().numpy(), theirs.mel_filters, atol=1e-8, rtol=0)


@pytest.mark.parametrize("samples", [800, 479_600, 479_601, 480_000, 1_039_999])
def test_long_silence_is_not_computed(samples: int) -> None:
    settings, theirs = SoundSettings(16000, 400, 160, 8, 65), WhisperFeatureExtractor(feature_size=8, chunk_length=65)
    sound = torch.from_numpy(draw_samples(samples)[:, 0].astype(np.float32) / 32768)
    expected = torch.from_numpy(theirs(sound.numpy(), sampling_rate=16000)["input_features"][0]).T
    frames = compute_log_mel(sound, settings)
    assert torch.equal(frames, expected[: len(frames)])
    assert len(frames) == {800: 3000, 479_600: 3000, 1_039_999: 6500}.get(samples, 6000)
    assert len(frames) >= min(settings.count_frames(samples) + 2, 6500)


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (22050, 2), (44100, 1), (48000, 6), (16000, 2)], ids=str)
def test_rates_and_channels(rate: int, channels: int, tmp_path: Path) -> None:
    values = draw_samples(rate // 2 + 7, channels)
    path = write_wav(tmp_path / "a.wav", values, rate)
    decoded = decode_sound(path, SETTINGS)
    assert len(decoded) == read_sound_samples(path, SETTINGS) == -(-len(values) * 16000 // rate)
    mean = values.mean(1) / 32768
    times = np.arange(len(decoded)) / 16000
    if rate <= 16000:
        expected = np.interp(times, np.arange(len(values)) / rate, mean)
        correlation = np.corrcoef(decoded.numpy()[:-50], expected[:-50])[0, 1]
        assert correlation > (0.9999 if rate == 16000 else 0.97)
    assert torch.equal(decode_sound(path.read_bytes(), SETTINGS), decoded)


@pytest.mark.parametrize(("suffix", "codec"), [("flac", "flac"), ("mp3", "libmp3lame"), ("ogg", "libopus")], ids=str)
def test_compressed_formats(suffix: str, codec: str, tmp_path: Path) -> None:
    values = draw_samples(48000)
    path = encode(tmp_path / f"a.{suffix}", values, 48000, codec)
    decoded = decode_sound(path, SETTINGS)
    assert len(decoded) == read_sound_samples(path, SETTINGS)
    assert abs(len(decoded) - 16000) <= (0 if codec == "flac" else 1200)


def test_lengths_are_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_wav(tmp_path / "a.wav", draw_samples(1000), 16000)
    monkeypatch.setattr("litgpt.data.media.sounds.decode_sound", None)
    assert read_sound_samples(path, SETTINGS) == 1000


def test_files_that_are_refused(tmp_path: Path) -> None:
    good = write_wav(tmp_path / "good.wav", draw_samples(16000), 16000).read_bytes()
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path / 'good.wav'}\n#EXT-X-ENDLIST\n"
    listed = f"ffconcat version 1.0\nfile '{tmp_path / 'good.wav'}'\n"
    long = write_wav(tmp_path / "long.wav", draw_samples(16000 * 31), 16000).read_bytes()
    claims_less = bytearray(long)
    claims_less[40:44] = struct.pack("<I", 2000)
    cases: dict[bytes, str] = {
        b"": "not a sound that can be read",
        good[:40]: "not a sound that can be read",
        good[:9000]: "not a sound that can be read",
        b"RIFF" + bytes(100): "not a sound that can be read",
        b"\xff\xfb\x90\x00" * 3: "not a sound that can be read",
        playlist.encode(): "not a sound that can be read",
        listed.encode(): "not a sound that can be read",
        long: "sound that is too long",
        good[:40] + struct.pack("<I", 0): "not a sound that can be read",
    }
    for content, reason in cases.items():
        with pytest.raises(MediumError) as error:
            decode_sound(content, SETTINGS)
        assert error.value.reason == reason, content[:20]
    assert len(decode_sound(bytes(claims_less), SETTINGS)) == 1000
    with pytest.raises(MediumError, match="sound not found"):
        decode_sound(tmp_path / "missing.wav", SETTINGS)
    with pytest.raises(MediumError, match="sound not found"):
        read_sound_samples(tmp_path, SETTINGS)


@pytest.mark.parametrize("nested", [False, True])
def test_settings_of_a_folder(nested: bool, tmp_path: Path) -> None:
    values = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128}
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"feature_extractor": values} if nested else values))
    assert read_sound_settings(tmp_path) == SETTINGS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_extractor_type": "EncodecFeatureExtractor"}, "EncodecFeatureExtractor is not supported"),
        ({"dither": 0.1}, "dither: 0.1 is not supported; use 0"),
        ({"hop_length": 0}, "hop_length: 0 is not supported; use e.g. 160"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {"feature_extractor_type": "WhisperFeatureExtractor", **change}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        read_sound_settings(tmp_path)


def test_folder_without_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no preprocessor_config"):
        read_sound_settings(tmp_path)
