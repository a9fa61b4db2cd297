"""A tiny model that hears, with random weights, tokenizer, chat template and processor, and drawn sounds."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken

from litgpt.data.tokenizer import train_tokenizer
from tests.vision_model import TEXT, write_random_weights

TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if 'audio' in content or 'audio_url' in content or content['type'] == 'audio' %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "Audio {{ audio_count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""In the form of Qwen2-Audio's."""
TOKENS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|im_start|>", "<|im_end|>"]
TOWER: dict[str, Any] = {"num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
TOWER |= {"d_model": 16, "max_source_positions": 50, "model_type": "qwen2_audio_encoder"}
EXTRACTOR = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8, "chunk_length": 1}
NOTES = {"low": 200.0, "middle": 900.0, "high": 3000.0}


def write_audio_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a model in the form of Qwen2-Audio, which hears one second, into a new folder, which it returns."""
    source = folder.parent / f"{folder.name}-source"
    backend = train_tokenizer([], "bytes", 258, source).processor
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in TOKENS])
    backend.save(str(source / "tokenizer.json"))
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_token_index": backend.token_to_id("<|AUDIO|>"),
        "eos_token_id": backend.token_to_id("<|im_end|>"),
        "pad_token_id": 1,
        "tie_word_embeddings": False,
        "text_config": {**TEXT, "model_type": "qwen2"},
        "audio_config": TOWER,
    }
    (source / "config.json").write_text(json.dumps(config))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "preprocessor_config.json").write_text(json.dumps(EXTRACTOR))
    return write_random_weights(source, folder, seed=seed)


def draw_sound(path: Path, frequency: float, seconds: float, rate: int = 16000) -> str:
    """Write a tone with some noise as WAV; returns its name."""
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).normal(size=len(times))
    values = ((0.4 * np.sin(2 * np.pi * frequency * times) + 0.02 * noise) * 32000).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    return path.name


def write_sound_rows(folder: Path) -> Path:
    """Rows with one sound, with two, and with none, of different lengths and rates."""
    rows: list[dict[str, Any]] = []
    for number, (name, frequency) in enumerate(NOTES.items()):
        sound = draw_sound(folder / f"{name}.wav", frequency, 0.1 + 0.13 * number, (16000, 8000, 44100)[number])
        content = [{"type": "audio", "audio": sound}, {"type": "text", "text": "Which note?"}]
        answer = {"role": "assistant", "content": name}
        rows.append({"messages": [{"role": "user", "content": content}, answer]})
        rows.append({"messages": [{"role": "user", "content": f"Say {name}."}, answer]})
    both = {"role": "user", "content": "<audio> or <audio>: which is low?"}
    rows.append({"messages": [both, {"role": "assistant", "content": "2"}], "audios": ["high.wav", "low.wav"]})
    rows.append({"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
