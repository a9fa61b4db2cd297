"""Training of models that write images: what is trained, resuming, and what the model writes then."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from litgpt import LLM
from litgpt.cli import main
from litgpt.data import Conversations
from litgpt.data.media.codes import CodeReader, open_code_reader
from litgpt.infer.image_codes import ImagePrompt, generate_codes, guide
from litgpt.infer.requests import Request
from litgpt.infer.sampling import Sampling
from tests.code_model import build_row, draw_noise, write_codec_folder, write_text_model
from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.vision_model import write_rows

NAMES = ["red", "green", "blue", "white"]
FLAGS = [
    *("--data", "Conversations", "--data.num_workers", "0", "--data.val_fraction", "0", "--precision", "32-true"),
    *("--train.max_steps", "4", "--train.global_batch_size", "8", "--train.micro_batch_size", "4"),
    *("--train.lr_warmup_steps", "0", "--optimizer.lr", "1e-2", "--train.save_interval", "null"),
    *("--eval.max_new_tokens", "null", "--train.max_seq_length", "64", "--data.padding", "true"),
]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `model` and the rows `rows.jsonl`, of which half have an image as the answer."""
    folder = tmp_path_factory.mktemp("base")
    text, codec = write_text_model(folder / "text"), write_codec_folder(folder / "codec", seed=5)
    assert main(["tokenizer", "extend", str(text), str(codec), str(folder / "model")]) == 0
    rows = []
    for seed, name in enumerate(NAMES):
        image = folder / draw_noise(folder / f"{name}.png", seed)
        rows += [build_row([name], [image]), build_row([image], [name])]
    write_rows(folder, rows)
    return folder


def finetune(base: Path, out: Path, *flags: str, code: int = 0) -> None:
    data = ["--data.sources", str(base / "rows.jsonl"), "--data.cache_dir", str(base / "cache")]
    assert main(["finetune_full", str(base / "model"), *FLAGS, *data, "--out_dir", str(out), *flags]) == code


def open_reader(llm: LLM) -> CodeReader:
    reader = open_code_reader(llm.tokenizer)
    assert reader is not None
    return reader


def read_losses(out: Path) -> list[float]:
    lines = next(out.glob("logs/**/metrics.csv")).read_text().splitlines()
    column = lines[0].split(",").index("loss")
    return [float(value) for line in lines[1:] if (value := line.split(",")[column])]


def test_resumed_run_with_null_prompts_equals_one_without_pause(base: Path, tmp_path: Path) -> None:
    flags = ["--data.null_prompt", "0.5", "--train.save_interval", "2"]
    finetune(base, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole" / "step-00000002", tmp_path / "half" / "step-00000002")
    finetune(base, tmp_path / "half", *flags, "--resume", "true", "--data.num_workers", "1")
    finetune(base, tmp_path / "other", *flags, "--data.seed", "43")
    whole, half, other = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "half", "other"))
    assert all(torch.equal(tensor, half[name]) for name, tensor in whole.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in whole.items())
    final = tmp_path / "whole" / "final"
    for name in ("config.json", "model.safetensors"):
        assert (final / "image_codes" / name).read_bytes() == (base / "codec" / name).read_bytes()


def test_only_the_modalities_of_the_recipe_are_trained(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {}
    for name in ("text", "image", "both"):
        flags = [] if name == "both" else ["--loss.modalities", f"[{name}]"]
        finetune(base, tmp_path / name, *flags, "--train.max_steps", "1", "--train.log_interval", "1")
        losses[name] = read_losses(tmp_path / name)[0]
    lengths = sum(len(name) for name in NAMES)
    text, image = lengths + 2 * len(NAMES), len(NAMES) * 6  # each answer ends in eos; an image has 4 codes and two ends
    whole = (losses["text"] * text + losses["image"] * image) / (text + image)
    assert losses["both"] == pytest.approx(whole, rel=1e-4) and losses["text"] != pytest.approx(losses["image"])
    shutil.copytree(base / "text", base / "plain", dirs_exist_ok=True)
    finetune(base / "none", tmp_path / "x", code=1)
    capsys.readouterr()
    words = ["finetune_full", str(base / "plain"), *FLAGS, "--loss.modalities", "[image]"]
    (base / "texts.jsonl").write_text(json.dumps(build_row(["a"], ["b"])) + "\n")
    words += ["--data.sources", str(base / "texts.jsonl"), "--data.cache_dir", str(base / "cache")]
    assert main([*words, "--out_dir", str(tmp_path / "plain")]) == 1
    assert "loss.modalities: ['image'] needs a model that writes images" in capsys.readouterr().err


def test_guidance_is_a_line_through_both_logits(base: Path) -> None:
    conditional, unconditional = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.5, 3.0, 0.0])
    both = torch.stack([conditional, unconditional])
    assert guide(both, 3.0).tolist() == [0.5 + 3 * 0.5, 3.0 - 3 * 1.0, 0.0 - 3 * 1.0]
    assert torch.equal(guide(conditional[None], 1.0), conditional)
    llm = LLM.load(base / "model")
    reader = open_reader(llm)
    prompt = ImagePrompt(llm.prompt_tokens("red"), llm.prompt_tokens(""), guidance=2.5)
    codes = generate_codes(llm.model, reader, prompt, sampling=GREEDY, seed=1)
    ids, texts = reader.tokens, [list(prompt.ids), list(prompt.null_ids)]
    for text in texts:
        text.append(ids.begin)
    for code in codes:  # the same, without a cache, from the logits of two separate passes
        with torch.no_grad():
            c, u = (llm.model(torch.tensor([text]))[0, -1] for text in texts)
        logits = (u + 2.5 * (c - u))[ids.first : ids.first + ids.codes]
        assert code == int(logits.argmax())
        for text in texts:
            text.append(ids.first + code)
    plain = ImagePrompt(prompt.ids, prompt.null_ids)
    assert len(generate_codes(llm.model, reader, plain, sampling=Sampling(temperature=5.0), seed=2)) == 4


def test_generate_writes_png_files(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    words = ["generate", str(base / "model"), "--prompt", "red"]
    assert main([*words, "--image_out", str(tmp_path / "a.png"), "--guidance", "2", "--num_samples", "2"]) == 0
    names = capsys.readouterr().out.split()
    assert names == [str(tmp_path / f"a-{number}.png") for number in (1, 2)]
    assert [Image.open(name).size for name in names] == [(8, 8)] * 2
    refused = [
        (["--guidance", "2"], "guidance: 2.0 has no effect with a text; set image_out: FILE.png too"),
        (["--image_out", "a.jpg"], "image_out: a.jpg does not end in .png; set a.png"),
        (["--image_out", "a.png", "--regex", "a"], "regex: a has no effect with image_out; leave it out"),
        (["--image_out", "a.png", "--compile", "true"], "compile: true has no effect with image_out; leave it out"),
    ]
    for flags, message in refused:
        assert main([*words, *flags]) != 0 and message in capsys.readouterr().err
    plain = ["generate", str(base / "text"), "--prompt", "", "--image_out", str(tmp_path / "b.png")]
    assert main(plain) == 1 and "has no image codes" in capsys.readouterr().err
    same = [*words[:3], "", "--image_out", str(tmp_path / "b.png"), "--guidance", "2"]
    assert main(same) == 1 and "guidance: 2.0 has no effect with a prompt without text" in capsys.readouterr().err


def test_images_in_prompts_are_the_tokens_of_training(base: Path, tmp_path: Path) -> None:
    data = Conversations(str(base / "rows.jsonl"), val_fraction=0.0, num_workers=0, cache_dir=tmp_path / "cache")
    llm = LLM.load(base / "model")
    data.connect(llm.tokenizer, 1, 64)
    data.prepare_data()
    renderer = data.build_renderer()
    asked = [each for each in data.iter_conversations() if each.messages[0].media][1]
    encoded = llm.prompt_encoder().encode("", None, None, sources={"image": [str(base / "green.png")]})
    assert list(encoded.ids) == renderer.encode_prompt(asked) and encoded.load_images() is None
    tokens = llm.generate("", images=[base / "green.png"], max_new_tokens=4, temperature=0.0, return_as_token_ids=True)
    assert tokens.tolist() == write_text(llm, list(encoded.ids))[: len(tokens)]
    words = ["generate", str(base / "model"), "--prompt", "in blue", "--image", str(base / "green.png")]
    assert main([*words, "--image_out", str(tmp_path / "a.png"), "--guidance", "2"]) == 0
    assert (tmp_path / "a.png").is_file()


@pytest.mark.slow
def test_overfit_grids_come_back_exactly(base: Path, tmp_path: Path) -> None:
    flags = [
        "--train.max_steps",
        "150",
        "--optimizer.lr",
        "3e-3",
        "--eval.max_new_tokens",
        "12",
        "--eval.interval",
        "75",
    ]
    finetune(
        base, tmp_path / "out", *flags, "--data.val_sources", str(base / "rows.jsonl"), "--data.val_fraction", "null"
    )
    llm = LLM.load(tmp_path / "out" / "final")
    reader = open_reader(llm)
    data = Conversations(str(base / "rows.jsonl"), val_fraction=0.0, num_workers=0, cache_dir=tmp_path / "cache")
    data.connect(llm.tokenizer, 1, 64)
    data.prepare_data()
    renderer = data.build_renderer()
    for conversation in data.iter_conversations():
        prompt, (medium, *_) = renderer.encode_prompt(conversation), conversation.media
        codes = [token - reader.tokens.first for token in reader.read(medium)[1:-1]]
        if conversation.messages[-1].media:
            written = generate_codes(llm.model, reader, ImagePrompt(prompt, []), sampling=GREEDY, seed=1)
            assert written == codes
            texts = write_text(llm, prompt)
            assert texts == reader.tokens.write(codes), "it ends by itself, without the grid"
        else:
            assert llm.tokenizer.decode(write_text(llm, prompt)) == conversation.messages[-1].content
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert rows and all(image.startswith("data:image/png;base64,") for image in rows[-1]["images"])
    assert rows[-1]["images"] and rows[-1]["images"][0] in (tmp_path / "out" / "report.html").read_text()
    assert math.isfinite(read_losses(tmp_path / "out")[-1])


def write_text(llm: LLM, prompt: list[int]) -> list[int]:
    """The most likely tokens after a prompt, up to the end."""
    request: Any = Request(tuple(prompt), 12, GREEDY, frozenset(llm.tokenizer.stop_ids))
    with llm.kept_engine.take(llm.model, tokens=64) as engine:
        (sequence,) = engine.run([request])
    return [token.token for token in sequence.tokens if token.finish_reason != "stop"]


@pytest.mark.slow
def test_two_ranks_equal_one_process(base: Path, tmp_path: Path) -> None:
    flags = ["--data.null_prompt", "0.5", "--loss.modalities", "[image]"]
    finetune(base, tmp_path / "one", *flags)
    words = ["finetune_full", str(base / "model"), *FLAGS, *flags, "--devices", "2", "--out_dir", str(tmp_path / "two")]
    words += ["--data.sources", str(base / "rows.jsonl"), "--data.cache_dir", str(base / "cache")]
    processes = start_ranks(run_litgpt, *words, folder=tmp_path, ranks=2)
    assert join_ranks(processes) == [0, 0], (tmp_path / "rank-0.log").read_text()
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5)
