"""Rows with images against transformers: tokens of its processors, losses and gradients of its models on them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.smolvlm import processing_smolvlm

from litgpt.data import Conversations
from litgpt.data.read.conversation import Conversation, to_conversation
from litgpt.data.read.media import MARK
from litgpt.data.stream.batch import IGNORE
from litgpt.data.tokenizer import BOS, EOS, Tokenizer
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.parallel.precision import PRECISIONS
from litgpt.recipe.data import BatchShape
from litgpt.recipe.train import LossArgs
from litgpt.store.load_model import load_model
from litgpt.train.objective import next_token
from litgpt.train.step import add_gradients
from litgpt.train.train_state import TrainState
from tests.parity.tower_gradients import compare_gradients
from tests.vision_model import KINDS, write_color_rows, write_vision_model

ROWS = 10


def build_processor(folder: Path, kind: str) -> Any:
    """The processor of transformers, of the parts in a folder."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    settings = {key: value for key, value in KINDS[kind]["processor"].items() if key != "image_processor_type"}
    template = KINDS[kind]["template"]
    if kind == "smolvlm":
        video = transformers.SmolVLMVideoProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        images = transformers.SmolVLMImageProcessor(**settings)
        return transformers.SmolVLMProcessor(images, tokenizer, video, image_seq_len=4, chat_template=template)
    if kind == "llava":
        images = transformers.CLIPImageProcessor(**settings)
        options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaProcessor(images, tokenizer, chat_template=template, image_token="<image>", **options)
    if kind == "llava_next":
        images = transformers.LlavaNextImageProcessor(**settings)
        options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaNextProcessor(images, tokenizer, chat_template=template, **options)
    if kind == "llava_onevision":
        images, video = (
            transformers.LlavaOnevisionImageProcessor(**settings),
            transformers.LlavaOnevisionVideoProcessor(),
        )
        options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "chat_template": template}
        options["vision_aspect_ratio"] = "anyres_max_2"
        return transformers.LlavaOnevisionProcessor(images, tokenizer, video, **options)
    if kind == "mistral3":
        images, sizes = transformers.PixtralImageProcessor(**settings), {"patch_size": 4, "spatial_merge_size": 2}
        return transformers.PixtralProcessor(images, tokenizer, chat_template=template, image_token="<image>", **sizes)
    if kind == "paligemma":
        images = transformers.SiglipImageProcessor(**settings, image_seq_length=16)
        file = str(folder / "tokenizer.json")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, bos_token=BOS, eos_token=EOS)
        return transformers.PaliGemmaProcessor(images, tokenizer)
    if kind == "llama4":
        images = transformers.Llama4ImageProcessor(**settings)
        return transformers.Llama4Processor(images, tokenizer, patch_size=4, chat_template=template)
    names = {"boi_token": "<start>", "eoi_token": "<end>", "image_token": "<image>", "context_image_token": "<image>"}
    names |= {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    file = str(folder / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, extra_special_tokens=names)
    if kind == "internvl":
        images, video = transformers.GotOcr2ImageProcessor(**settings), transformers.InternVLVideoProcessor()
        return transformers.InternVLProcessor(images, tokenizer, video, image_seq_length=4, chat_template=template)
    if kind == "gemma3":
        images = transformers.Gemma3ImageProcessor(**settings)
        return transformers.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    if kind == "glm4v":
        images, video = transformers.Glm4vImageProcessor(**settings), transformers.Glm4vVideoProcessor()
        return transformers.Glm4vProcessor(images, tokenizer, video, chat_template=template)
    images, video = transformers.Qwen2VLImageProcessor(**settings), transformers.Qwen2VLVideoProcessor()
    model = "Qwen2VL" if kind == "qwen2_vl" else "Qwen3VL"
    return getattr(transformers, f"{model}Processor")(images, tokenizer, video, chat_template=template)


def process(processor: Any, row: Any, folder: Path) -> Any:
    """The inputs of transformers for one row."""
    from PIL import Image

    messages, images = [], []
    for message in to_conversation(row).messages:
        parts: list[dict[str, str]] = []
        for number, text in enumerate(message.content.split(MARK)):
            parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
        messages.append({"role": message.role, "content": parts})
        images += [Image.open(folder / str(medium.path)) for medium in message.media]
    if isinstance(processor, transformers.LlavaOnevisionProcessor) and images:
        images = [images]  # all of one sample, on which their sizes depend
    if isinstance(processor, transformers.PaliGemmaProcessor):
        return process_suffix(processor, to_conversation(row), images)
    text = processor.apply_chat_template(messages)
    return processor(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False)


def process_suffix(processor: Any, conversation: Conversation, images: list[Any]) -> Any:
    """The inputs for a question and its answer, for which the processor has no template."""
    question, answer = (message.content.replace(MARK, "<image>") for message in conversation.messages)
    settings = {"return_tensors": "pt", "add_special_tokens": False}
    if images:
        inputs = processor(images=[images], text=[question], suffix=[answer], **settings)
        del inputs["labels"]
        return inputs
    tokenizer = processor.tokenizer  # the processor takes no text without images
    return tokenizer(f"{BOS}{question}\n", f"{answer}{EOS}", return_token_type_ids=True, **settings)


FAST = ("qwen2_vl",)


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_rows_train_as_in_transformers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # a package for texts of videos
    folder = write_vision_model(tmp_path / "model", kind)
    path = write_color_rows(tmp_path)
    data = Conversations(str(path), val_fraction=0.0, num_workers=0, shuffle=False, cache_dir=tmp_path / "cache")
    data.connect(Tokenizer(folder), 1, 256)
    data.prepare_data()
    shape = BatchShape(micro_batch_size=1, global_batch_size=ROWS, max_seq_length=256, rank=0, ranks=1, seed=0)
    stream = iter(data.train_stream(shape))
    batches = [next(stream) for _ in range(ROWS)]

    config = Config.from_checkpoint(folder)
    model = GPT(config)
    load_model(model, folder, warn=lambda line: pytest.fail(line))
    reference = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype="float32", attn_implementation="eager"
    )
    processor, losses = build_processor(folder, kind), []
    for row, batch in zip(map(json.loads, path.read_text().splitlines()), batches, strict=True):
        inputs = process(processor, row, tmp_path)
        assert inputs["input_ids"].tolist() == batch.ids.tolist()
        if batch.media is not None and "image_grid_thw" in inputs:
            assert torch.equal(inputs["pixel_values"], batch.media.patches_NP)
            inputs["mm_token_type_ids"] = (batch.ids == config.vision["image_token"]).int()  # type: ignore[index]
        if "pixel_values" in inputs:  # of Llama 4 in bfloat16
            inputs["pixel_values"] = inputs["pixel_values"].float()
        logits = reference(**inputs).logits
        losses.append(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), reduction="sum", ignore_index=IGNORE
            )
        )
    state = TrainState(model, [], torch.device("cpu"), PRECISIONS["32-true"])
    targets = sum(batch.targets for batch in batches)
    expected = torch.stack(losses).sum() / targets
    gradients = add_gradients(state, batches, next_token(LossArgs(chunk_rows=16)))
    assert gradients.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    expected.backward()
    compare_gradients_of(model, reference, config)


def compare_gradients_of(model: GPT, reference: Any, config: Config) -> None:
    """Compare the gradients that both models have now."""
    zero = sum((parameter * 0).sum() for parameter in model.parameters() if parameter.requires_grad)
    other = sum((parameter * 0).sum() for parameter in reference.parameters() if parameter.grad is not None)
    compare_gradients(model, reference, torch.as_tensor(zero).view(1, 1), torch.as_tensor(other).view(1, 1), config)
