"""Models that see and hear against transformers: alone or with further parts, logits, gradients, positions, texts."""

import json
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from litgpt.cli import main
from litgpt.data.media.patches import count_places, cut_patches, pack_media
from litgpt.data.media.positions import build_media_positions
from litgpt.data.render.track_places import interleave
from litgpt.errors import UserError
from litgpt.model.audio_config import AudioShape
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.media import Media, Sounds
from litgpt.model.registry import find_family
from litgpt.model.tower_config import TowerShape
from litgpt.store.adapters.peft_lora import list_published_mappings
from litgpt.store.convert import export_folder
from litgpt.store.load_model import load_model
from litgpt.store.save_model import save_model_folder
from tests.omni_model import SPEED, build_parts
from tests.parity.tower_exports import check_export
from tests.parity.tower_gradients import compare_gradients
from tests.vision_model import DECODER

IMAGE, VIDEO, AUDIO, START, END, AUDIO_START, AUDIO_END = range(80, 87)
TOKENS = {"image_token_index": IMAGE, "video_token_index": VIDEO, "audio_token_index": AUDIO}
TOKENS |= {"vision_start_token_id": START, "vision_end_token_id": END}
TOKENS |= {"audio_start_token_id": AUDIO_START, "audio_end_token_id": AUDIO_END, "position_id_per_seconds": SPEED}
LENGTHS = (33, 14, 3, 28)
"""Frames of sounds: two chunks of 14 and a part, one chunk, the fewest, and two chunks."""
TALKER: dict[str, Any] = {"vocab_size": 24, "embedding_size": 32, "hidden_size": 16, "intermediate_size": 24}
TALKER |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
TALKER |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
DIT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "emb_dim": 8}
DIT |= {"num_embeds": 17, "mel_dim": 8, "enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8, 8, 8, 8, 24]}
DIT |= {"enc_attention_channels": 4, "enc_se_channels": 4, "enc_res2net_scale": 2, "look_ahead_layers": [1]}
VOICE = {"mel_dim": 8, "upsample_initial_channel": 8, "upsample_rates": [2], "upsample_kernel_sizes": [4]}
VOICE |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]]}


def build_config() -> Any:
    """The settings of a small thinker."""
    return transformers.Qwen2_5OmniThinkerConfig(**TOKENS, **build_parts({**DECODER, "vocab_size": 96}))


def add_noise(model: torch.nn.Module) -> None:
    """Move all weights so far from zero that every part shows in the logits."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def build_reference() -> Any:
    """A small random thinker of transformers."""
    torch.manual_seed(0)
    kind = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    model = kind._from_config(build_config(), attn_implementation="eager")
    add_noise(model)
    return model.eval()


class Example(NamedTuple):
    """Two texts with images, sounds and a video for both libraries."""

    ids_BT: Tensor
    media: Media
    positions: Tensor
    theirs: dict[str, Any]


def build_example(vision: TowerShape, audio: AudioShape) -> Example:
    """The first row has two images and two sounds, the second an image, a video and two sounds."""
    torch.manual_seed(1)
    cut = [cut_patches(torch.randn(1, 3, *size), vision) for size in ((16, 24), (40, 48), (8, 8))]
    film = cut_patches(torch.randn(5, 3, 24, 16), vision)
    frames = torch.randn(len(LENGTHS), audio.mels, 40)

    def see(number: int) -> list[int]:
        token, (_, grid) = (VIDEO, film) if number == 3 else (IMAGE, cut[number])
        return [START, *[token] * count_places(grid, vision), END]

    def hear(number: int) -> list[int]:
        return [AUDIO_START, *[AUDIO] * audio.count_features(LENGTHS[number]), AUDIO_END]

    first = [5, 6, *see(0), 7, *hear(0), *see(1), 8, *hear(1)]
    second = [9, *hear(2), *see(2), 11, *see(3), 12, *hear(3), 13]
    length = max(len(first), len(second))
    texts = [text + list(range(20, 20 + length - len(text))) for text in (first, second)]
    ids, seconds = torch.tensor(texts), [1.0, 1.0, 1.0, 0.7]
    grids = [[grid for _, grid in cut[:2]], [cut[2][1], film[1]]]
    by_row = zip(texts, grids, (seconds[:2], seconds[2:]), strict=True)
    positions = torch.stack([build_media_positions(vision, *row, seconds=each) for *row, each in by_row])
    sounds = Sounds(torch.cat([each[:, :size].T for each, size in zip(frames, LENGTHS, strict=True)]), LENGTHS)
    media = pack_media([*cut, film])
    theirs = {
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([patches for patches, _ in cut]),
        "image_grid_thw": torch.tensor([grid for _, grid in cut]),
        "pixel_values_videos": film[0],
        "video_grid_thw": torch.tensor([film[1]]),
        "video_second_per_grid": torch.tensor([0.7]),
        "input_features": frames,
        "feature_attention_mask": (torch.arange(40) < torch.tensor(LENGTHS)[:, None]).long(),
    }
    return Example(ids, Media(media.patches_NP, media.grids, sounds=sounds), positions, theirs)


def compute_hf_logits(model: Any, example: Example) -> Tensor:
    """The logits (B, T, V) of transformers, which finds the positions itself."""
    model.model.rope_deltas = None
    return model(input_ids=example.ids_BT, **example.theirs, use_cache=False).logits


def read_shapes(config: Config) -> tuple[TowerShape, AudioShape]:
    """The shapes of both towers."""
    assert config.vision is not None and config.audio is not None
    return TowerShape.from_values(config.vision), AudioShape.from_values(config.audio)


def read_family(folder: Path) -> Config:
    """The config of a folder of this family."""
    config = Config.from_checkpoint(folder)
    family = find_family(config)
    assert family is not None and family.name == "qwen2_5_omni"
    return config


def test_family_as_published(tmp_path: Path) -> None:
    source, hf_model = tmp_path / "published", build_reference()
    hf_model.save_pretrained(source)
    config = read_family(source)
    modules = {mapping.hf_name for mapping in list_published_mappings(config).values()}
    assert modules == set(hf_model.state_dict())  # as PEFT names them
    example = build_example(*read_shapes(config))

    model = GPT(config).eval()
    load_model(model, source, warn=lambda line: pytest.fail(line))
    expected = compute_hf_logits(hf_model, example)
    actual = model(example.ids_BT, media=example.media, positions_BT=example.positions)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert compare_gradients(model, hf_model, actual, expected, config) == ["audio.edge_tokens.weight"]
    assert example.media.sounds is not None
    patches, sounds = example.media.patches_NP, example.media.sounds
    for other in (
        Media(patches.flip(0), example.media.grids, sounds=sounds),
        Media(patches, example.media.grids, sounds=Sounds(sounds.frames_NM.flip(0), LENGTHS)),
    ):
        logits = model(example.ids_BT, media=other, positions_BT=example.positions)
        assert (logits - actual).abs().max() > 1e-3

    auto = transformers.AutoModelForMultimodalLM
    check_export(model, hf_model, source, auto, lambda loaded: compute_hf_logits(loaded, example), expected)


def write_whole(folder: Path) -> Any:
    """Write a small model of three parts, which it returns."""
    torch.manual_seed(0)
    config = transformers.Qwen2_5OmniConfig(
        thinker_config=build_config().to_dict(),
        talker_config=TALKER,
        token2wav_config={"dit_config": DIT, "bigvgan_config": VOICE},
    )
    model = transformers.Qwen2_5OmniForConditionalGeneration._from_config(config, attn_implementation="eager")
    add_noise(model)
    model.save_pretrained(folder)
    torch.save({"voice": {"cond": torch.ones(2)}}, folder / "spk_dict.pt")
    return model.eval()


def test_a_model_with_further_parts(tmp_path: Path) -> None:
    source, export, cast, alone = (tmp_path / name for name in ("published", "export", "cast", "alone"))
    hf_model = write_whole(source)
    config = read_family(source)
    example, model = build_example(*read_shapes(config)), GPT(config).eval()
    load_model(model, source, warn=lambda line: pytest.fail(line))
    with torch.no_grad():
        expected = compute_hf_logits(hf_model.thinker, example)
        actual = model(example.ids_BT, media=example.media, positions_BT=example.positions)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        model.head.weight.mul_(2)
    save_model_folder(export, config=config, tensors=dict(model.named_parameters()), tokenizer_dir=source)
    before, after = hf_model.state_dict(), load_whole(export).state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert before.keys() == after.keys() and changed == {"thinker.lm_head.weight"}
    assert (export / "spk_dict.pt").read_bytes() == (source / "spk_dict.pt").read_bytes()
    assert read_family(export) == config
    assert main(["verify", str(export), "--length", "24"]) == 0

    export_folder(cast, source, config, dtype=torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in load_file(cast / "model.safetensors").items()}
    assert {types[name] for name in types if name.startswith("thinker.")} == {torch.bfloat16}
    assert {types[name] for name in types if not name.startswith("thinker.")} == {torch.float32}
    values = json.loads((cast / "config.json").read_text())
    assert values["model_type"] == "qwen2_5_omni" and values["torch_dtype"] == "bfloat16"
    assert values["talker_config"] == json.loads((source / "config.json").read_text())["talker_config"]

    only_settings = tmp_path / "settings"  # as that of a run from random weights
    only_settings.mkdir()
    (only_settings / "config.json").write_bytes((source / "config.json").read_bytes())
    for folder, tokenizer_dir in ((alone, None), (tmp_path / "new", only_settings)):  # without the other parts
        save_model_folder(folder, config=config, tensors=dict(model.named_parameters()), tokenizer_dir=tokenizer_dir)
        assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_omni_thinker"
    thinker = transformers.AutoModelForMultimodalLM.from_pretrained(alone, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(compute_hf_logits(thinker, example), 2 * expected)


def load_whole(folder: Path) -> Any:
    """The whole model in a folder."""
    return transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(folder, dtype="float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"model_type": "phi"}}, "text_config.model_type: 'phi'"),
        ({"audio_config": {"output_dim": 48}}, "audio_config.output_dim: 48"),
        ({"audio_config": {"n_window": 13}}, "audio.chunk_places: 13 with places: 12; use 1 to 12"),
        ({"audio_config": {"d_model": 2}}, "audio.width: 2 does not fit sinusoids"),
        ({"vision_config": {"out_hidden_size": 48}}, "vision_config.out_hidden_size: 48"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {**build_config().to_dict(), "architectures": None}
    values |= {key: {**values[key], **value} for key, value in change.items()}
    for whole in (values, {"model_type": "qwen2_5_omni", "thinker_config": values}):
        (tmp_path / "config.json").write_text(json.dumps(whole, default=str))
        with pytest.raises(UserError, match=re.escape(message)):
            Config.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni"}))
    with pytest.raises(UserError, match="thinker_config: None"):
        Config.from_checkpoint(tmp_path)


def test_positions_of_random_layouts(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniThinkerModel(build_config())
    (tmp_path / "config.json").write_text(json.dumps(build_config().to_dict(), default=str))
    vision, audio = read_shapes(Config.from_checkpoint(tmp_path))
    draw, kinds = random.Random(0), {IMAGE: START, VIDEO: START, AUDIO: AUDIO_START}
    moved = 0
    for _ in range(200):
        ids, grids, lengths, seconds = [1] * draw.randint(1, 3), list[Any](), list[int](), list[float]()
        chosen = [draw.choice(list(kinds)) for _ in range(draw.randint(1, 7))]
        for kind in chosen:
            if kind == AUDIO:
                lengths.append(draw.randint(3, 100))
                places = audio.count_features(lengths[-1])
            else:
                grids.append(
                    (draw.randint(1, 4) if kind == VIDEO else 1, 2 * draw.randint(1, 6), 2 * draw.randint(1, 6))
                )
                seconds.append(draw.choice([0.1, 2 / 3, 1.0, 1.01, 2.3]))
                places = count_places(grids[-1], vision)
            ids += [kinds[kind], *[kind] * places, kinds[kind] + 1, *[1] * draw.choice([0, 0, 1, 4])]
        seen = list(zip([kind for kind in chosen if kind != AUDIO], grids, seconds, strict=True))
        films = [(grid, step) for kind, grid, step in seen if kind == VIDEO]
        pictures = [grid for kind, grid, _ in seen if kind == IMAGE]
        expected, _ = model.get_rope_index(
            torch.tensor([ids]),
            torch.tensor(pictures) if pictures else None,
            torch.tensor([grid for grid, _ in films]) if films else None,
            torch.ones(1, len(ids), dtype=torch.long),
            audio_seqlens=torch.tensor(lengths),
            second_per_grids=torch.tensor([step for _, step in films]),
        )
        positions = build_media_positions(vision, ids, grids, seconds=seconds)
        assert torch.equal(positions, expected[:, 0])
        moved += not torch.equal(build_media_positions(vision, ids, grids), positions)
    assert moved > 50  # by the time of videos


def test_positions_of_random_layouts_with_tracks(tmp_path: Path) -> None:
    """Videos with their sound among images and sounds; some have far fewer places of one than of the other."""
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniThinkerModel(build_config())
    (tmp_path / "config.json").write_text(json.dumps(build_config().to_dict(), default=str))
    vision, audio = read_shapes(Config.from_checkpoint(tmp_path))
    assert vision.chunk_seconds == 2
    draw, after_frames = random.Random(1), 0
    for _ in range(200):
        ids, pictures, films, seconds, lengths, tracked = [1], list[Any](), list[Any](), list[float](), [], []
        grids, steps = list[Any](), list[float]()
        for kind in ["film", *draw.choices(["image", "audio", "film"], k=draw.randint(0, 4))]:
            height, width, length = 2 * draw.randint(1, 5), 2 * draw.randint(1, 5), draw.randint(3, 200)
            sound = [AUDIO] * audio.count_features(length)
            lengths += [] if kind == "image" else [length]
            if kind == "image":
                pictures.append((1, height, width))
                ids += [START, *[IMAGE] * count_places(pictures[-1], vision), END]
            elif kind == "audio":
                ids += [AUDIO_START, *sound, AUDIO_END]
            else:
                films.append((draw.randint(1, 6), height, width))
                seconds.append(draw.choice([0.1, 2 / 3, 1.0, 2.3, 30.0]))
                places = count_places(films[-1], vision)
                of_step = places // films[-1][0]
                times = [number // of_step * seconds[-1] * SPEED for number in range(places)]
                run = interleave([VIDEO] * places, sound, times, 2 * SPEED)
                after_frames += run[-1] == VIDEO
                tracked.append(range(len(ids) + 1, len(ids) + len(run) + 3))
                ids += [START, AUDIO_START, *run, AUDIO_END, END]
            grids += [] if kind == "audio" else [pictures[-1] if kind == "image" else films[-1]]
            steps += [] if kind == "audio" else [1.0 if kind == "image" else seconds[-1]]
            ids += [1] * draw.choice([0, 0, 1, 4])
        expected, _ = model.get_rope_index(
            torch.tensor([ids]),
            torch.tensor(pictures) if pictures else None,
            torch.tensor(films),
            torch.ones(1, len(ids), dtype=torch.long),
            use_audio_in_video=True,
            audio_seqlens=torch.tensor(lengths),
            second_per_grids=torch.tensor(seconds),
        )
        positions = build_media_positions(vision, ids, grids, seconds=steps, tracked=tracked)
        assert torch.equal(positions, expected[:, 0])
    assert 20 < after_frames < 400
