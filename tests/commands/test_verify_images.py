"""litgpt verify of models with a vision tower: media by the folder's processors, and logits of a text with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from litgpt.cli import main
from litgpt.data.media import pictures, videos
from litgpt.model import registry
from litgpt.model.config import Config
from litgpt.model.names import NameRule
from litgpt.store.load_model import iter_tensors
from litgpt.store.save_model import save_model_folder
from tests.parity.test_vision_families import CANVASES, ROWS, build_reference

AREA = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "patch_size": 4, "merge_size": 2}
CLIP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava-llama-clip": ("CLIPImageProcessor", CLIP),
    "llava-mistral-siglip": ("SiglipImageProcessor", {"size": {"height": 16, "width": 16}}),
    "llava_next-llama-clip": ("LlavaNextImageProcessor", {**CLIP, "image_grid_pinpoints": CANVASES}),
    "llava_onevision": (
        "LlavaOnevisionImageProcessor",
        {"size": {"height": 22, "width": 22}, "image_grid_pinpoints": [[22, 44], [44, 22], [44, 44]]},
    ),
    "qwen2_vl": ("Qwen2VLImageProcessor", AREA),
    "qwen2_5_vl": ("Qwen2VLImageProcessor", AREA),
    "qwen3_vl": ("Qwen2VLImageProcessor", AREA),
    "glm4v": ("Glm4vImageProcessor", AREA),
    "glm4v_moe": ("Glm4vImageProcessor", AREA),
    "idefics3": ("Idefics3ImageProcessor", TILES),
    "smolvlm": ("SmolVLMImageProcessor", TILES),
    "internvl-qwen2-internvl": ("GotOcr2ImageProcessor", {"size": {"height": 24, "width": 24}, "max_patches": 4}),
    "llava-mistral-pixtral": ("PixtralImageProcessor", {"size": {"longest_edge": 60}}),
    "mistral3-ministral3-pixtral": ("PixtralImageProcessor", {"size": {"longest_edge": 60}}),
    "gemma3": ("Gemma3ImageProcessor", {"size": {"height": 24, "width": 24}}),
    "llama4": ("Llama4ImageProcessor", {"size": {"height": 24, "width": 24}, "max_patches": 4}),
    "paligemma-gemma-siglip": ("SiglipImageProcessor", {"size": {"height": 16, "width": 16}}),
}


def write_folder(name: str, folder: Path) -> Path:
    """A small model of transformers with its image processor."""
    build_reference(ROWS[name]).save_pretrained(folder)
    kind, settings = PROCESSORS[name]
    getattr(transformers, kind)(**settings).save_pretrained(folder)
    if name in VIDEO_PROCESSORS:
        shared = {key: value for key, value in settings.items() if key != "image_grid_pinpoints"}
        getattr(transformers, VIDEO_PROCESSORS[name])(**shared, fps=2.0).save_pretrained(folder)
    return folder


def verify_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """The exit code of a verification, and the result of each check."""
    capsys.readouterr()
    code = main(["verify", str(folder), "--length", "24"])
    lines = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    return code, {words[0]: words[1] for words in lines if words[0] in (*NAMES, *MEDIA)}


VIDEO_PROCESSORS = dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), "Qwen2VLVideoProcessor")
VIDEO_PROCESSORS |= {"llava_onevision": "LlavaOnevisionVideoProcessor", "smolvlm": "SmolVLMVideoProcessor"}
VIDEO_PROCESSORS |= {"qwen3_vl": "Qwen3VLVideoProcessor", "internvl-qwen2-internvl": "InternVLVideoProcessor"}
NAMES = ("tensors", "round trip", "settings", "logits")
MEDIA = ("images", "videos")
FAST = ("qwen2_5_vl", "qwen3_vl")
CASES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PROCESSORS]


@pytest.mark.parametrize("name", CASES)
def test_a_folder_with_a_tower_passes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, results = verify_folder(write_folder(name, tmp_path), capsys)
    media = MEDIA if name in VIDEO_PROCESSORS else MEDIA[:1]
    assert code == 0 and results == dict.fromkeys((*NAMES, *media), "passed")


def swap_q_and_k(rule: NameRule) -> NameRule:
    """A rule with the tower's queries and keys exchanged."""
    names = {"vision.blocks.<i>.q": "vision.blocks.<i>.k", "vision.blocks.<i>.k": "vision.blocks.<i>.q"}
    return replace(rule, names=tuple(names.get(name, name) for name in rule.names))


def test_wrong_rules_of_a_tower_and_other_pixels_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = write_folder("qwen2_vl", tmp_path), registry.load_families()
    rules = tuple(swap_q_and_k(rule) for rule in before["qwen2_vl"].tensors.rules)
    changed = replace(before["qwen2_vl"], tensors=replace(before["qwen2_vl"].tensors, rules=rules))
    with monkeypatch.context() as patch:
        patch.setattr(registry, "load_families", lambda: {**before, "qwen2_vl": changed})
        code, results = verify_folder(folder, capsys)
    assert code == 1 and results == {**dict.fromkeys(NAMES, "passed"), **dict.fromkeys(MEDIA, "FAILED")}

    def resize_without_filter(pixels: Any, size: Any, _mode: str) -> Any:
        return pictures.F.interpolate(pixels[None], size)[0]

    monkeypatch.setattr(pictures, "interpolate", resize_without_filter)
    monkeypatch.setattr(videos, "interpolate", resize_without_filter)
    code, results = verify_folder(folder, capsys)
    assert code == 1 and {results[name] for name in MEDIA} == {"FAILED"} and results["logits"] == "passed"


def test_without_a_processor_the_check_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_reference(ROWS["qwen2_vl"]).save_pretrained(tmp_path)
    code, results = verify_folder(tmp_path, capsys)
    assert code == 0 and {results[name] for name in MEDIA} == {"skipped"}


def test_processor_goes_along_with_the_tokenizer(tmp_path: Path) -> None:
    source = write_folder("qwen2_vl", tmp_path / "source")
    config = Config.from_checkpoint(source)
    save_model_folder(tmp_path / "copy", config=config, tensors=iter_tensors(source, config), tokenizer_dir=source)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
