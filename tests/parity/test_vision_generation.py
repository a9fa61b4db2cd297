"""Texts after prompts with images against transformers: alone, together, in chunks, with prefixes, and put back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.data.media.positions import build_media_positions
from litgpt.infer.engine import Engine
from litgpt.infer.load import open_model
from litgpt.infer.prompt_images import PromptImage, PromptImages, compute_image_key
from litgpt.infer.requests import Request
from litgpt.infer.sampling import Sampling
from litgpt.model.gpt import GPT
from litgpt.model.media import Media
from tests.parity.test_engine import build_draft, list_ids
from tests.parity.test_vision_families import (
    IMAGE,
    PATCHED,
    ROWS,
    VIDEO,
    Row,
    build_hf_images,
    build_reference,
    draw_image,
    join_images,
)

NEW_TOKENS = 12
PREFIX = list(range(20, 40))
TEXTS: list[list[int | list[int]]] = [
    [*PREFIX, [0], 7, 8],
    [*PREFIX, [0], 9],  # the same prefix, with the image
    [*PREFIX, [1], 7, 8],  # the same tokens, and another image
    [5, [2], 6, [0], 7],
    [*PREFIX, 41, 42, 43],
    [11, 12],
]
"""Prompts: token ids, and the numbers of images in lists."""


class Case:
    """A small model in both libraries, images, and prompts with them."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.reference = build_reference(row)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, matrix in self.reference.named_parameters():
                if matrix.dim() > 1 and "vis" not in name:  # so that texts do not repeat themselves
                    matrix.add_(torch.randn(matrix.shape, generator=generator) * 0.2)
            self.reference.get_output_embeddings().weight[[IMAGE, VIDEO]] = 0  # so that texts do not have them
        self.reference.save_pretrained(folder)
        self.reference.generation_config.eos_token_id = None
        self.model = open_model(folder, device=torch.device("cpu"))
        assert self.model.vision is not None
        self.row, self.shape = row, self.model.vision.shape
        pixels = torch.Generator().manual_seed(1)
        self.numbers = [0, 0, 1]
        self.cut = [draw_image(row, number, self.shape, pixels) for number in self.numbers]

    def write(self, text: list[int | list[int]]) -> tuple[list[int], list[int]]:
        """The tokens of a prompt, and the numbers of its images."""
        ids: list[int] = []
        for part in text:
            ids += [part] if isinstance(part, int) else [IMAGE] * self.cut[part[0]].places
        return ids, [part[0] for part in text if isinstance(part, list)]

    def build_request(self, text: list[int | list[int]], **settings: Any) -> Request:
        """Our request."""
        ids, numbers = self.write(text)
        images, start = list[PromptImage](), 0
        for number in numbers:
            start = ids.index(IMAGE, start)
            places = tuple(range(start, start + self.cut[number].places))
            media = self.join([number])
            key = compute_image_key(media.patches_NP, media.grids, self.cut[number].order)
            images.append(PromptImage(media, places, key))
            start = places[-1] + 1
        positions = None
        if self.model.config.rope_sections:
            grids = [grid for number in numbers for _, grid in self.cut[number].items]
            positions = build_media_positions(self.shape, ids, grids)
        prompt_images = PromptImages(tuple(images), positions) if images else None
        return Request(tuple(ids), NEW_TOKENS, Sampling(0), images=prompt_images, **settings)

    def join(self, numbers: list[int]) -> Media:
        """Some of the images as the tower reads them."""
        return join_images([self.cut[number] for number in numbers])

    def generate(self, text: list[int | list[int]]) -> list[int]:
        """The text of transformers."""
        ids, numbers = self.write(text)
        inputs: dict[str, Any] = {}
        if numbers:
            cut, is_image = [self.cut[number] for number in numbers], (torch.tensor([ids]) == IMAGE).int()
            inputs = build_hf_images(self.row, cut, [self.numbers[number] for number in numbers])
            inputs |= {"mm_token_type_ids": is_image} if self.row.kind.startswith(PATCHED) else {}
            inputs |= {"token_type_ids": is_image} if self.row.kind == "Gemma3" else {}
        if self.row.kind == "PaliGemma":
            inputs["token_type_ids"] = torch.zeros(1, len(ids), dtype=torch.int)
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)
        output = self.reference.generate(
            input_ids=prompt, attention_mask=mask, **inputs, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return output[0, len(ids) :].tolist()


FAST = ("llava-qwen2-siglip", "qwen2_5_vl")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)
def test_texts_after_images_equal_those_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(ROWS[name], tmp_path)
    model = case.model
    expected = [case.generate(text) for text in TEXTS]
    assert expected[0] != expected[2], "another image must change the text"
    requests = [case.build_request(text) for text in TEXTS]
    assert [list_ids(Engine(model).run([request]))[0] for request in requests] == expected
    batched = Engine(model)
    assert list_ids(batched.run(requests)) == expected
    assert list_ids(batched.run(requests[::-1])) == expected[::-1]  # every prompt is in the cache
    assert list_ids(Engine(model, prefill_chunk=3).run(requests)) == expected  # chunks end in the middle of images
    speculative = Engine(model, draft=build_draft(model), prefill_chunk=16)
    assert list_ids(speculative.run(requests)) == expected
    assert speculative.draft is not None and 0 < speculative.draft.accepted < speculative.draft.proposed

    runs = count_tower_runs(model, monkeypatch)
    engine = Engine(model, prefill_chunk=5)
    sequences = [engine.submit(request) for request in requests[:4]]
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
        if steps in (5, 7, 9, 20, 24):
            engine._preempt(engine._running[-1])  # in the middle of an image, and of its text
    assert list_ids(sequences) == expected[:4]
    assert len(runs) <= 5  # once for each image of a prompt
    check_logprobs(case)


def count_tower_runs(model: GPT, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The patches of each call of the tower from now on."""
    runs: list[int] = []
    assert model.vision is not None
    forward = model.vision.forward

    def count(media: Media) -> Tensor:
        runs.append(len(media.patches_NP))
        return forward(media)

    monkeypatch.setattr(model.vision, "forward", count)
    return runs


def check_logprobs(case: Case) -> None:
    """Log-probabilities of prompt and text are those of the forward pass of training; of the text alone, if the tokens
    of a prompt attend to later ones."""
    model = case.model.double()
    for text in TEXTS[:4]:
        prompt_logprobs = None if model.config.has_prompt_blocks else 0
        request = case.build_request(text, logprobs=0, prompt_logprobs=prompt_logprobs)
        (sequence,) = Engine(model, prefill_chunk=7).run([request])
        _, numbers = case.write(text)
        whole = torch.tensor([sequence.ids])
        media = case.join(numbers)
        positions = None
        if model.config.rope_sections:
            positions = build_media_positions(case.shape, sequence.ids, media.grids)[None]
        prompts = torch.arange(len(sequence.ids))[None] < len(request.prompt)
        with torch.no_grad():
            media = replace(media, patches_NP=media.patches_NP.double())
            logits = model(whole, media=media, positions_BT=positions, prompts_BT=prompts)
        expected = logits.log_softmax(-1)[0, :-1].gather(-1, whole[0, 1:, None])[:, 0]
        actual = [token.logprob for token in (*sequence.prompt_logprobs, *sequence.tokens)]
        expected = expected[-len(sequence.tokens) :] if prompt_logprobs is None else expected
        torch.testing.assert_close(torch.tensor(actual, dtype=torch.float64), expected, atol=1e-10, rtol=0)
