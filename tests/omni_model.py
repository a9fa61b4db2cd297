"""A tiny model that sees and hears, with random weights, tokenizer, chat template and processors, and rows for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from litgpt.data.tokenizer import train_tokenizer
from tests.audio_model import EXTRACTOR, draw_sound
from tests.video_files import write_video
from tests.vision_model import AREA, MROPE, TEXT, VOLUME, draw_image, write_random_weights, write_rows

WORDS = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
"""The tokens of media, as the published processor names them."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif content['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif content['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""In the form of Qwen2.5-Omni's."""
VISION: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
VISION |= {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
AUDIO: dict[str, Any] = {"num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
AUDIO |= {"d_model": 16, "max_source_positions": 12, "n_window": 7, "output_dim": 32}
TYPES = {"vision_config": "vision_encoder", "audio_config": "audio_encoder", "text_config": "text"}
SPEED = 5
"""Positions that a second advances by."""


def build_parts(text: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The settings of decoder and towers."""
    parts = {
        "vision_config": VISION,
        "audio_config": AUDIO,
        "text_config": {**(text or TEXT), "rope_parameters": MROPE},
    }
    return {key: {**part, "model_type": f"qwen2_5_omni_{TYPES[key]}"} for key, part in parts.items()}


def write_omni_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a model in the form of Qwen2.5-Omni's thinker into a new folder, which it returns."""
    source = folder.parent / f"{folder.name}-source"
    backend = train_tokenizer([], "bytes", 258, source).processor
    special = [*WORDS.values(), "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.save(str(source / "tokenizer.json"))
    ids = {name: backend.token_to_id(word) for name, word in WORDS.items()}
    config = {
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "model_type": "qwen2_5_omni_thinker",
        "image_token_index": ids["image_token"],
        "video_token_index": ids["video_token"],
        "audio_token_index": ids["audio_token"],
        "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"],
        "audio_start_token_id": ids["audio_bos_token"],
        "audio_end_token_id": ids["audio_eos_token"],
        "position_id_per_seconds": SPEED,
        "eos_token_id": backend.token_to_id("<|im_end|>"),
        "pad_token_id": 1,
        **build_parts(),
    }
    processor = {"image_processor_type": "Qwen2VLImageProcessor", **AREA, **EXTRACTOR, "chunk_length": 3}
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", **VOLUME, "fps": 2.0}
    for name, values in (
        ("config.json", config),
        ("preprocessor_config.json", processor),
        ("video_preprocessor_config.json", videos),
    ):
        (source / name).write_text(json.dumps(values))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    return write_random_weights(source, folder, seed=seed)


def write_whole_model(folder: Path, thinker: Path) -> Path:
    """Write a folder of a thinker as one of the whole model, with two tensors of its other parts, and return it."""
    shutil.copytree(thinker, folder)
    (folder / "model_config.yaml").unlink()
    tensors = {f"thinker.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    others = {"talker.codec_head.weight": torch.arange(6.0).view(2, 3), "token2wav.filter": torch.ones(3)}
    save_file({**tensors, **others}, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniForConditionalGeneration"]}
    config |= {"thinker_config": json.loads((thinker / "config.json").read_text()), "talker_config": {"vocab_size": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "spk_dict.pt").write_bytes(b"voices")
    return folder


def write_media(folder: Path) -> None:
    """Draw `a.png`, `b.wav`, of several chunks, `c.mp4` and `d.wav`."""
    draw_image(folder / "a.png", (200, 30, 40), (24, 16))
    draw_sound(folder / "b.wav", 300.0, 0.47)
    write_video(folder / "c.mp4", 8, (16, 24), rate=4)
    draw_sound(folder / "d.wav", 900.0, 0.11, 8000)


def write_omni_rows(folder: Path) -> Path:
    """Rows with media of all kinds, with some, and with none."""
    write_media(folder)
    rows = []
    for number, text in enumerate(
        [
            "<image>and <audio>with <video>?",
            "<video><audio>?",
            "<image>?",
            "<audio>?",
            "Hello",
            "<audio><image><audio>?",
            "<video>?",
            "Hi",
        ]
    ):
        columns = {
            "images": ["a.png"] * text.count("<image>"),
            "audios": ["b.wav", "d.wav"][: text.count("<audio>")],
            "videos": ["c.mp4"] * text.count("<video>"),
        }
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"answer {number}"}]
        rows.append({"messages": messages, **{key: names for key, names in columns.items() if names}})
    return write_rows(folder, rows)
