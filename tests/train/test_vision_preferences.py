"""Preferences with images: batches of any arrangement, cuts, bad rows, stored scores, and runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.cli import main
from litgpt.data import Preferences
from litgpt.data.modules.finetuning import Packing
from litgpt.data.read.fields import BadRow
from litgpt.data.read.preference import list_sides, to_preferences
from litgpt.data.stream.batch import Batch
from litgpt.data.tokenizer import Tokenizer
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.data import BatchShape
from litgpt.recipe.preference import PreferenceArgs
from litgpt.recipe.train import LossArgs
from litgpt.store.load_model import load_model
from litgpt.train.kto import rated_answers
from litgpt.train.preference import paired_answers
from litgpt.train.reference import Reference, copy_values
from litgpt.train.step import add_gradients
from litgpt.train.stored_scores import hash_answers
from litgpt.train.train_state import TrainState
from tests.runs import read_losses
from tests.vision_model import COLORS, draw_image, write_rows, write_vision_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models by their kinds, and of rows."""
    return write_answers(tmp_path_factory.mktemp("base"))


def write_answers(folder: Path) -> Path:
    """Write `pairs/rows.jsonl` and `rated/rows.jsonl` with their images into a folder, which it returns."""
    rows: dict[str, list[dict[str, Any]]] = {"pairs": [], "rated": []}
    for name in rows:
        (folder / name).mkdir()
    for number, (name, color) in enumerate(COLORS.items()):
        for kind in rows:
            draw_image(folder / kind / f"{name}.png", color, (16 + 8 * number, 16))
        for images in ([f"{name}.png"], ["red.png", f"{name}.png"], []):
            prompt = {"role": "user", "content": "<image>" * len(images) + f"Which {number}?"}
            columns = {"images": images} if images else {}
            said = [prompt, {"role": "assistant", "content": f"It is {name}."}]
            rows["pairs"].append({"messages": said, "rejected_response": "no " * number + "idea", **columns})
            rows["rated"].append({"messages": said, "label": len(images) != 1, **columns})
    for name, items in rows.items():
        write_rows(folder / name, items)
    return folder


def open_data(base: Path, kind: str, rows: str = "pairs", **settings: Any) -> Preferences:
    model = base / kind
    if not model.exists():
        write_vision_model(model, kind)
    options = {"val_fraction": 0.0, "num_workers": 0, "shuffle": False, "cache_dir": base / "cache", **settings}
    data = Preferences(str(base / rows / "rows.jsonl"), **options)
    data.set_objective({"pairs": "pairs", "rated": "kto"}[rows])
    data.connect(Tokenizer(model), 2, 256)
    data.prepare_data()
    return data


def read_batches(data: Preferences, micro: int, length: int = 256) -> list[Batch]:
    shape = BatchShape(micro_batch_size=micro, global_batch_size=12, max_seq_length=length, rank=0, ranks=1, seed=0)
    rows = data.train_stream(shape)
    stream = iter(rows)
    return [next(stream) for _ in range(rows.samples_per_epoch // micro)]


def compute(base: Path, kind: str, rows: str, micro: int, **settings: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of one step over all rows, in float64."""
    batches = read_batches(open_data(base, kind, rows, **settings), micro)
    model = GPT(Config.from_checkpoint(base / kind)).double()
    load_model(model, base / kind)
    values = {name: value * 0.9 for name, value in copy_values(model, dict(model.named_parameters())).items()}
    state = TrainState(model, [], torch.device("cpu"), PRECISIONS["64-true"], reference=Reference(values))
    options = {"loss_type": "kto"} if rows == "rated" else {"ld_alpha": 0.5}
    build = rated_answers if rows == "rated" else paired_answers
    loss = add_gradients(state, batches, build(PreferenceArgs(**options), LossArgs(chunk_rows=16))).loss.item()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", ["pairs", "rated"])
@pytest.mark.parametrize(
    "kind", ["llava", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("smolvlm", "qwen2_vl"))]
)
def test_packed_rows_equal_others(kind: str, rows: str, base: Path) -> None:
    loss, gradients = compute(base, kind, rows, 1)
    assert any(name.startswith("vision.blocks") for name in gradients)
    for micro, settings in ((3, {}), (2, {"padding": True}), (1, {"packing": Packing(True, strategy="sequential")})):
        other_loss, others = compute(base, kind, rows, micro, **settings)
        assert other_loss == pytest.approx(loss, abs=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-9, rtol=1e-7)


def test_answers_share_images_also_when_they_are_read_lazily(base: Path) -> None:
    batches = read_batches(open_data(base, "llava"), 3)
    for batch, lazy in zip(batches, read_batches(open_data(base, "llava", tokenize="lazy"), 3), strict=True):
        media = batch.media
        assert torch.equal(batch.ids, lazy.ids) and media is not None and lazy.media is not None
        assert torch.equal(media.patches_NP, lazy.media.patches_NP) and media.uses == lazy.media.uses
        assert len(media.grids) == len(set(media.uses or ())) and media.answers == [0, 1, 2, 2, 3, 3]
    assert [len(batch.media.grids) for batch in batches if batch.media] == [2, 3, 3, 3]  # red and red are one
    first = batches[1]
    kept = first.select_answers(torch.tensor([True, False, False, True, False, False]))
    assert kept.media is not None and kept.media.answers == [0, 1, 1] and kept.media.uses == [0, 1, 2]
    image = first.ids == open_data(base, "llava").tokenizer.find_token("<image>")
    assert image.sum() == 16 * 6 and (kept.ids == first.ids[image][0]).sum() == 16 * 3


def test_keys_of_answers_depend_on_their_images(base: Path) -> None:
    (batch, *_) = read_batches(open_data(base, "llava"), 3)
    assert batch.media is not None
    keys = hash_answers(batch)
    patches = batch.media.patches_NP.clone()
    patches[-1, 0] += 1  # of the image of the second sample
    changed = hash_answers(replace(batch, media=replace(batch.media, patches_NP=patches)))
    assert [a == b for a, b in zip(keys, changed, strict=True)] == [True, True, False, False, True, True]


@pytest.mark.parametrize("policy", ["truncate_right", "truncate_left", "drop"])
def test_a_cut_never_divides_an_image(policy: Any, base: Path) -> None:
    data = open_data(base, "llava", on_overlong=policy)
    token = data.tokenizer.find_token("<image>")
    for length in (55, 60, 70, 90):
        for batch in read_batches(data, 1, length):
            grids = [] if batch.media is None else batch.media.uses
            assert (batch.ids == token).sum() == 16 * len(grids or ())
            assert torch.bincount(batch.answers.flatten()).max() <= length  # type: ignore[union-attr]


def build_row(**columns: Any) -> dict[str, Any]:
    prompt = [{"role": "user", "content": "<image>?"}]
    return {"prompt": prompt, "chosen": "a", "rejected": "b", "images": ["a.png"], **columns}


BOXED = {
    "messages": [{"role": "user", "content": "<image><bbox>?"}, {"role": "assistant", "content": "a"}],
    **{"rejected_response": "b", "images": ["a.png"], "objects": {"bbox": [[1, 2]]}},
}
BAD: list[tuple[dict[str, Any], str]] = [
    (build_row(chosen="a <image>", images=["a.png", "b.png"]), "image in an answer is not supported by preferences"),
    (build_row(rejected_images=["b.png"]), "answers with different media"),
    (build_row(prompt=[{"role": "user", "content": "<image><image>"}]), "more places for images than images"),
    (BOXED, "boxes are not supported by preferences"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_rows(number: int) -> None:
    row, reason = BAD[number]
    with pytest.raises(BadRow) as raised:
        to_preferences(row, None, "pairs")
    assert raised.value.reason == reason and "\n" not in str(raised.value)


def test_both_answers_have_the_images_of_the_row() -> None:
    (pair,) = to_preferences(build_row(), None, "pairs")
    first, second = list_sides(pair)
    assert first.media == second.media and len(first.media) == 1 and pair.unread == ()


FLAGS = [
    *("--data", "Preferences", "--data.num_workers", "0", "--data.val_fraction", "0.2", "--precision", "32-true"),
    *("--train.max_steps", "4", "--train.global_batch_size", "4", "--train.micro_batch_size", "2"),
    *("--train.lr_warmup_steps", "0", "--train.save_interval", "null", "--eval.max_new_tokens", "null"),
    *("--train.max_seq_length", "200", "--train.log_interval", "1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "rows", "flags"),
    [
        ("align", "pairs", "--preference.precompute_ref_log_probs true --data.packing.enabled true"),
        ("dpo", "pairs", "--freeze.llm true --freeze.vision false --lora_r 4 --data.padding true"),
        ("kto", "rated", "--freeze.aligner false"),
    ],
)
def test_runs(command: str, rows: str, flags: str, base: Path, tmp_path: Path) -> None:
    open_data(base, "smolvlm", rows)
    argv = [command, str(base / "smolvlm"), *FLAGS, "--data.sources", str(base / rows / "rows.jsonl"), *flags.split()]
    assert main([*argv, "--data.cache_dir", str(tmp_path / "cache"), "--out_dir", str(tmp_path / "out")]) == 0
    losses = list(read_losses(tmp_path).values())
    assert len(losses) == 4 and abs(losses[0] - (0.5 if command == "kto" else 0.6931)) < 1e-3 and len(set(losses)) > 1
    assert (tmp_path / "out" / "final" / "preprocessor_config.json").exists()


def test_reward_models_have_no_images(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_data(base, "llava")
    argv = ["rm", str(base / "llava"), *FLAGS, "--data.sources", str(base / "pairs" / "rows.jsonl")]
    argv = [word for word in argv if word != "null" and "max_new" not in word and "save_interval" not in word]
    assert main([*argv, "--data.cache_dir", str(tmp_path / "cache"), "--out_dir", str(tmp_path / "out")]) == 1
    assert "it has a vision tower, which only litgpt finetune, finetune_full, align, dpo and kto train" in " ".join(
        capsys.readouterr().err.split()
    )
