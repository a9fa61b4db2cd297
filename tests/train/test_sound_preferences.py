"""Preferences with sounds, alone and beside images and videos: both answers share them in any arrangement."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.cli import main
from litgpt.data.modules.finetuning import Packing
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.media import Media
from litgpt.store.load_model import load_model
from litgpt.train.stored_scores import hash_answers
from tests.audio_model import write_audio_model
from tests.omni_model import write_media, write_omni_model
from tests.runs import read_losses
from tests.train.test_vision_preferences import FLAGS, compute, open_data, read_batches
from tests.video_files import draw_tone, write_video
from tests.vision_model import write_rows

TEXTS = {
    "omni": ["<audio>?", "<image>and <audio>?", "Hello", "<video><audio><audio>?", "<image>?", "<audio>Which?"],
    "audio": ["<audio>?", "Hi", "<audio>or <audio>?", "<audio>Which?", "Hello", "<audio>What?"],
}
"""Of the prompts of a model."""
FILES = {"image": ["a.png"], "video": ["heard.mkv"], "audio": ["b.wav", "d.wav"]}
SETTINGS: dict[str, dict[str, Any]] = {"omni": {"video_sounds": True}, "audio": {}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each model its folder, and in its name those of rows of pairs and of rated answers."""
    root = tmp_path_factory.mktemp("base")
    for kind, write in (("omni", write_omni_model), ("audio", write_audio_model)):
        folder = root / kind
        (folder / "pairs").mkdir(parents=True)
        write(folder / kind)
        write_media(folder / "pairs")
        write_video(folder / "pairs" / "heard.mkv", 10, (16, 24), rate=4, sound=draw_tone(2.2))
        rows = []
        for number, text in enumerate(TEXTS[kind]):
            columns = {
                f"{name}s": names[: text.count(f"<{name}>")] for name, names in FILES.items() if f"<{name}>" in text
            }
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": f"It is {number}."}]
            rows.append({"messages": messages, "rejected_response": "no " * number + "idea", **columns})
        write_rows(folder / "pairs", rows)
        rated = [{**row, "label": number % 2 == 0} for number, row in enumerate(rows)]
        shutil.copytree(folder / "pairs", folder / "rated")
        write_rows(folder / "rated", [{key: row[key] for key in row if key != "rejected_response"} for row in rated])
    return root


@pytest.mark.parametrize(("kind", "rows"), [("omni", "pairs"), pytest.param("audio", "rated", marks=pytest.mark.slow)])
def test_packed_rows_equal_others(kind: str, rows: str, base: Path) -> None:
    loss, gradients = compute(base / kind, kind, rows, 1, **SETTINGS[kind])
    assert any(name.startswith("audio.blocks") for name in gradients)
    for micro, settings in ((3, {}), (2, {"padding": True}), (1, {"packing": Packing(True, strategy="sequential")})):
        other_loss, others = compute(base / kind, kind, rows, micro, **settings, **SETTINGS[kind])
        assert other_loss == pytest.approx(loss, abs=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-9, rtol=1e-7)


def copy_for_each_use(media: Media) -> Media:
    """The same media, each as often as it is used."""
    sounds = media.sounds
    if sounds is not None:
        frames = sounds.split_frames()
        copies = torch.cat([frames[use] for use in sounds.uses or ()])
        lengths = tuple(sounds.lengths[use] for use in sounds.uses or ())
        sounds = replace(sounds, frames_NM=copies, lengths=lengths, uses=None, answers=None)
    patches = media.split_patches()
    grids = tuple(media.grids[use] for use in media.uses or ())
    copies = torch.cat([patches[use] for use in media.uses]) if media.uses else media.patches_NP
    return replace(media, patches_NP=copies, grids=grids, uses=None, answers=None, sounds=sounds)


def test_answers_share_sounds(base: Path) -> None:
    (batch, _) = read_batches(open_data(base / "omni", "omni"), 3)
    assert batch.media is not None and batch.media.sounds is not None
    sounds = batch.media.sounds
    assert (sounds.uses, sounds.answers) == ([0, 0, 1, 1], [0, 1, 2, 3]) and len(sounds.lengths) == 2
    assert (batch.media.uses, batch.media.answers) == ([0, 0], [2, 3])
    kept = batch.select_answers(torch.tensor([True, False, False, True, False, False]))
    assert kept.media is not None and kept.media.sounds is not None
    assert (kept.media.sounds.uses, kept.media.sounds.answers, kept.media.answers) == ([0, 1], [0, 1], [1])
    model = GPT(Config.from_checkpoint(base / "omni" / "omni")).eval()
    load_model(model, base / "omni" / "omni")
    inputs: dict[str, Any] = {"positions_BT": batch.positions, "documents_BT": batch.documents}
    with torch.no_grad():
        shared = model(batch.ids, media=batch.media, **inputs)
        copied = model(batch.ids, media=copy_for_each_use(batch.media), **inputs)
        inputs = {"positions_BT": kept.positions, "documents_BT": kept.documents}
        alone = model(kept.ids, media=kept.media, **inputs)
    torch.testing.assert_close(shared, copied, atol=1e-6, rtol=1e-6)
    assert batch.answers is not None
    of_kept = torch.isin(batch.answers, torch.tensor([0, 3]))
    torch.testing.assert_close(alone[0], shared[of_kept], atol=1e-6, rtol=1e-6)


def test_keys_of_answers_depend_on_their_sounds(base: Path) -> None:
    (batch, _) = read_batches(open_data(base / "omni", "omni"), 3)
    assert batch.media is not None and batch.media.sounds is not None
    keys, frames = hash_answers(batch), batch.media.sounds.frames_NM.clone()
    frames[-1, 0] += 1  # of the sound of the second sample
    changed = replace(batch.media, sounds=replace(batch.media.sounds, frames_NM=frames))
    others = hash_answers(replace(batch, media=changed))
    assert [a == b for a, b in zip(keys, others, strict=True)] == [True, True, False, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "rows", "flags"),
    [
        ("dpo", "pairs", "--lora_r 4 --preference.precompute_ref_log_probs true"),
        ("kto", "rated", "--freeze.audio false"),
    ],
)
def test_runs(command: str, rows: str, flags: str, base: Path, tmp_path: Path) -> None:
    argv = [command, str(base / "omni" / "omni"), *FLAGS, "--data.sources", str(base / "omni" / rows / "rows.jsonl")]
    argv += [*flags.split(), "--data.cache_dir", str(tmp_path / "cache"), "--out_dir", str(tmp_path / "out")]
    assert main(argv) == 0
    losses = list(read_losses(tmp_path).values())
    assert len(losses) == 4 and len(set(losses)) > 1
