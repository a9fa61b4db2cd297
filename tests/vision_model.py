"""Tiny models that see, with random weights, tokenizer, chat template and processor, and drawn images."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken

from litgpt.data.tokenizer import train_tokenizer
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.store.save_model import save_model_folder

LISTS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""A template that takes contents as lists only, in the form of SmolVLM's."""
BOTH = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<start><image><end>{% elif part['type'] == 'video' %}<start><video><end>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that takes both, in the form of Qwen2-VL's."""
TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>", "<start>"]
TOKENS += ["<img>", "</img>", "[IMG_BREAK]", "[IMG_END]"]
TOKENS += ["<end>", *(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)), "<video>"]
TOKENS += ["<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]
DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TEXT = {**DECODER, "vocab_size": 288, "tie_word_embeddings": False}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
AREA = {"size": {"shortest_edge": 64, "longest_edge": 1024}, "patch_size": 4, "merge_size": 2}
VOLUME = {**AREA, "size": {"shortest_edge": 64, "longest_edge": 4096}}
IN_TURN = {**MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
KINDS: dict[str, dict[str, Any]] = {
    "smolvlm": {
        "config": {
            "architectures": ["SmolVLMForConditionalGeneration"],
            "scale_factor": 2,
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**TOWER, "model_type": "smolvlm_vision", "image_size": 16},
        },
        "processor": {
            "image_processor_type": "SmolVLMImageProcessor",
            "size": {"longest_edge": 32},
            "max_image_size": {"longest_edge": 16},
        },
        "template": LISTS,
    },
    "llava": {
        "config": {
            "architectures": ["LlavaForConditionalGeneration"],
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**TOWER, "model_type": "clip_vision_model", "image_size": 16},
        },
        "processor": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
        },
        "template": BOTH,
    },
    "llava_next": {
        "config": {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**TOWER, "model_type": "clip_vision_model", "image_size": 16},
        },
        "processor": {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
        },
        "template": BOTH,
    },
    "llava_onevision": {
        "config": {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "vision_aspect_ratio": "anyres_max_2",
            "image_grid_pinpoints": [[18, 36], [36, 18], [36, 36]],
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**TOWER, "model_type": "siglip_vision_model", "image_size": 18},
        },
        "processor": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": [[18, 36], [36, 18], [36, 36]],
            "size": {"height": 18, "width": 18},
        },
        "videos": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "size": {"height": 18, "width": 18},
            "fps": 2.0,
        },
        "template": BOTH,
    },
    "internvl": {
        "config": {
            "architectures": ["InternVLForConditionalGeneration"],
            "text_config": {**TEXT, "model_type": "qwen2"},
            "vision_config": {**TOWER, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
        },
        "processor": {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 16, "width": 16},
            "max_patches": 3,
        },
        "template": BOTH.replace("<start><image><end>", "<image>").replace("<start><video><end>", "<video>"),
    },
    "mistral3": {
        "config": {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "text_config": {**TEXT, "model_type": "mistral", "head_dim": 8, "rms_norm_eps": 1e-5},
            "vision_config": {**TOWER, "model_type": "pixtral", "image_size": 64},
        },
        "processor": {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 40}},
        "template": BOTH.replace("<start><image><end>", "<image>"),
    },
    "gemma3": {
        "config": {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "mm_tokens_per_image": 4,
            "text_config": {
                **{**TEXT, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 3},
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {**TOWER, "model_type": "siglip_vision_model", "image_size": 16},
        },
        "processor": {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 16, "width": 16}},
        "template": BOTH.replace("<start><image><end>", "<start>"),
    },
    "paligemma": {
        "config": {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "projection_dim": 32,
            "text_config": {**TEXT, "model_type": "gemma", "head_dim": 8},
            "vision_config": {**TOWER, "model_type": "siglip_vision_model", "image_size": 16},
        },
        "processor": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 16, "width": 16}},
        "template": None,
    },
    "llama4": {
        "config": {
            "architectures": ["Llama4ForConditionalGeneration"],
            "text_config": {
                **{**TEXT, "model_type": "llama4_text", "head_dim": 8, "intermediate_size_mlp": 40},
                **{"num_local_experts": 4, "no_rope_layer_interval": 2, "attention_chunk_size": 24, "floor_scale": 16},
            },
            "vision_config": {
                **{**TOWER, "model_type": "llama4_vision_model", "image_size": 16, "intermediate_size": 64},
                **{"vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24},
            },
        },
        "tokens": {
            "image_token_index": "<|patch|>",
            "boi_token_index": "<|image_start|>",
            "eoi_token_index": "<|image_end|>",
        },
        "processor": {
            "image_processor_type": "Llama4ImageProcessor",
            "size": {"height": 16, "width": 16},
            "max_patches": 4,
        },
        "template": BOTH.replace("<start><image><end>", "<|image|>"),
    },
    "qwen2_vl": {
        "config": {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "text_config": {**TEXT, "model_type": "qwen2_vl_text", "rope_parameters": MROPE},
            "vision_config": {
                **{"model_type": "qwen2_vl", "depth": 2, "num_heads": 2, "patch_size": 4},
                **{"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            },
        },
        "processor": {"image_processor_type": "Qwen2VLImageProcessor", **AREA},
        "videos": {"video_processor_type": "Qwen2VLVideoProcessor", **VOLUME, "fps": 2.0},
        "template": BOTH,
    },
    "glm4v": {
        "config": {
            "architectures": ["Glm4vForConditionalGeneration"],
            "text_config": {**TEXT, "model_type": "glm4v_text", "rope_parameters": MROPE},
            "vision_config": {
                **{"model_type": "glm4v_vision", "depth": 2, "num_heads": 2, "patch_size": 4, "image_size": 24},
                **{"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24},
            },
        },
        "processor": {"image_processor_type": "Glm4vImageProcessor", **AREA},
        "template": BOTH,
    },
    "qwen3_vl": {
        "config": {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "text_config": {**TEXT, "model_type": "qwen3_vl_text", "rope_parameters": IN_TURN, "head_dim": 8},
            "vision_config": {
                **{"model_type": "qwen3_vl_vision", "depth": 2, "num_heads": 2, "patch_size": 4},
                **{"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24},
                **{"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            },
        },
        "processor": {"image_processor_type": "Qwen2VLImageProcessor", **AREA},
        "videos": {"video_processor_type": "Qwen3VLVideoProcessor", **VOLUME, "fps": 2.0},
        "template": BOTH,
    },
}


def write_vision_model(folder: Path, kind: str = "smolvlm", *, seed: int = 0) -> Path:
    """Write a model of a kind, which transformers loads too, into a new folder, which it returns."""
    parts, source = KINDS[kind], folder.parent / f"{folder.name}-source"
    backend = train_tokenizer([], "bytes", 258, source).processor
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in TOKENS])
    backend.save(str(source / "tokenizer.json"))
    own = {key: backend.token_to_id(token) for key, token in parts.get("tokens", {}).items()}
    token = {key: backend.token_to_id("<image>") for key in ("image_token_id", "image_token_index")}
    around = {
        **dict.fromkeys(("vision_start_token_id", "boi_token_index"), backend.token_to_id("<start>")),
        **dict.fromkeys(("vision_end_token_id", "eoi_token_index"), backend.token_to_id("<end>")),
        **dict.fromkeys(("video_token_id", "video_token_index"), backend.token_to_id("<video>")),
    }
    around |= {"eos_token_id": backend.token_to_id("<end_of_utterance>"), "pad_token_id": 1}
    config = {"model_type": kind, "tie_word_embeddings": False, **token, **around, **own, **parts["config"]}
    (source / "config.json").write_text(json.dumps(config))
    if parts["template"] is not None:
        (source / "chat_template.jinja").write_text(parts["template"])
    (source / "preprocessor_config.json").write_text(json.dumps(parts["processor"]))
    if "videos" in parts:
        (source / "video_preprocessor_config.json").write_text(json.dumps(parts["videos"]))
    return write_random_weights(source, folder, seed=seed)


def write_random_weights(source: Path, folder: Path, *, seed: int) -> Path:
    """Write a model with random weights, its config and tokenizer being those of another folder."""
    torch.manual_seed(seed)
    shape = Config.from_checkpoint(source)
    model = GPT(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    save_model_folder(folder, config=shape, tensors=model.named_parameters(), tokenizer_dir=source)
    return folder


def draw_image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (24, 16)) -> str:
    """Write an image (width, height) of one color with a slope, as PNG; returns its name."""
    from PIL import Image

    pixels = torch.tensor(color, dtype=torch.float32).expand(size[1], size[0], 3)
    slope = torch.linspace(0.5, 1, size[0])[None, :, None]
    Image.fromarray((pixels * slope).to(torch.uint8).numpy()).save(path)
    return path.name


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write `rows.jsonl`."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


COLORS = {"red": (230, 20, 30), "green": (20, 200, 40), "blue": (10, 40, 220), "white": (240, 240, 240)}


def write_color_rows(folder: Path) -> Path:
    """Rows with one image, with two, and with none, of different sizes."""
    rows: list[dict[str, Any]] = []
    for number, (name, color) in enumerate(COLORS.items()):
        image = draw_image(folder / f"{name}.png", color, (16 + 8 * number, 16))
        content = [{"type": "image", "image": image}, {"type": "text", "text": "Which color?"}]
        answer = {"role": "assistant", "content": name}
        rows.append({"messages": [{"role": "user", "content": content}, answer]})
        rows.append({"messages": [{"role": "user", "content": f"Say {name}."}, answer]})
    both = {"role": "user", "content": "<image> or <image>: which is blue?"}
    rows.append({"messages": [both, {"role": "assistant", "content": "2"}], "images": ["red.png", "blue.png"]})
    rows.append({"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]})
    return write_rows(folder, rows)
