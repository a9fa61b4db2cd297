"""`litgpt verify`: compare a model folder with transformers: tensors, settings, logits, tokenizer."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.data.media.patches import count_places, cut_patches, pack_media
from litgpt.data.media.pictures import (
    PROCESSOR_FILES,
    PictureSettings,
    normalize_picture,
    open_picture,
    read_picture_settings,
    resize_picture,
)
from litgpt.data.media.positions import build_media_positions
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import write_json
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.media import Media
from litgpt.model.registry import find_family, normalize_config
from litgpt.model.tower_config import TowerShape
from litgpt.recipe.store_commands import Verify
from litgpt.store.load_model import load_config, load_model
from litgpt.store.tensor_audit import audit_folder, find_differing

PADDING = 3  # each row is this many tokens shorter than the one before
SAMPLE = """
the llama of Cuzco eats 12 apples, doesn't it? Größe café 你好 世界 привет 🦙 👩‍👩‍👧 def f(x): return x**2 3.14159
1,000,000 https://example.com/a?b=c&d=%20 NaN “quotes” -- ____ ### <b> </s> <|im_start|> ﬁ ½ I'll YOU'RE
snake_case CamelCase ｆｕｌｌ ทดสอบ العربية עברית नमस्ते
"""
WORDS = [*SAMPLE.split(), "\t", "\n", "\n\n", "\r\n", " ", "e\u0301", "\u200b", "\u00a0"]


@dataclass
class Check:
    """Result of one check.

    Attributes:
        passed: None if the check was skipped.
        summary: one line for the terminal.
        figures: details for the report; JSON values.
    """

    name: str
    passed: bool | None
    summary: str
    figures: dict[str, Any]


def run(recipe: Verify) -> None:
    """Run all checks, print one line for each, and write the report.

    Raises:
        UserError: if a check failed, or transformers is not installed.
    """
    require_transformers()
    folder = recipe.checkpoint_dir
    config = load_config(folder)
    checks = []
    for check in (*CHECKS, check_images) if config.vision else CHECKS:
        checks.append(run_check(check, recipe, config))
        word = {True: "passed", False: "FAILED", None: "skipped"}[checks[-1].passed]
        print(f"{checks[-1].name}: {word}: {checks[-1].summary}", flush=True)
    failed = [check.name for check in checks if check.passed is False]
    if recipe.report:
        settings = {key: getattr(recipe, key) for key in ("rows", "length", "strings", "tolerance", "seed")}
        report = {
            "folder": str(folder),
            "passed": not failed,
            "settings": settings,
            "checks": [
                {"name": check.name, "passed": check.passed, "found": check.summary, "figures": check.figures}
                for check in checks
            ],
        }
        write_json(recipe.report, report)
    if failed:
        raise UserError(f"{folder}: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    print(f"{folder}: verified")


def require_transformers() -> None:
    """Check that transformers is installed.

    Raises:
        UserError: if it is not.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError("verify: transformers is not installed: pip install 'litgpt[verify]'") from None


def run_check(check: Callable[[Verify, Config], Check], recipe: Verify, config: Config) -> Check:
    """Run a check; one that raises a UserError has failed."""
    try:
        return check(recipe, config)
    except UserError as error:
        return Check(check.__name__.removeprefix("check_"), False, str(error), {})


def check_tensors(recipe: Verify, config: Config) -> Check:
    """Check that every tensor of the folder has a rule, and that every parameter is present with its shape."""
    audit = audit_folder(recipe.checkpoint_dir, config)
    wrong = [f"{name} has no rule" for name in audit.unknown] + [f"{name} is missing" for name in audit.missing]
    wrong += audit.mismatched
    kinds = Counter(mapping.kind for mapping in audit.mappings)
    rules = ", ".join(f"{number} by {kind}" for kind, number in kinds.items())
    summary = f"{len(audit.source.names)} in the files: {rules}, {len(audit.left_out)} left out"
    figures = {
        "read": {mapping.hf_name: [mapping.kind, *mapping.names] for mapping in audit.mappings},
        "left_out": audit.left_out,
        "wrong": wrong,
    }
    return Check("tensors", not wrong, "; ".join([*wrong[:3], summary]), figures)


def check_round_trip(recipe: Verify, config: Config) -> Check:
    """Check that the loaded tensors, written back, equal the folder's to the bit."""
    audit = audit_folder(recipe.checkpoint_dir, config)
    if not audit.is_clean:
        return Check("round trip", False, "the tensors do not match the model, so they cannot be written back", {})
    wrong = find_differing(audit, config)
    summary = f"{', '.join(wrong[:3])} differ" if wrong else f"{len(audit.mappings)} tensors are equal to the bit"
    return Check("round trip", not wrong, summary, {"differing": wrong})


def check_settings(recipe: Verify, config: Config) -> Check:
    """Check that the config.json written for this shape means the same as the folder's own."""
    from transformers import AutoConfig

    family = find_family(config)
    if family is None or not (recipe.checkpoint_dir / "config.json").is_file():
        return Check("settings", None, "no published architecture has this shape", {})
    written = normalize_config(family.read(family.config_json(config)), family.unused)
    model_type = AutoConfig.from_pretrained(recipe.checkpoint_dir).model_type
    wrong = [key for key, value in normalize_config(config, family.unused).items() if written[key] != value]
    summary = f"{', '.join(wrong)} differ" if wrong else f"config.json of {family.model_type} means the same"
    return Check("settings", not wrong, summary, {"model_type": model_type, "differing": wrong})


def check_logits(recipe: Verify, config: Config) -> Check:
    """Check the logits in float32: rows of several lengths at both ends of the context, padded to the left."""
    reference = load_reference_model(recipe.checkpoint_dir, config)
    model = GPT(config).eval()
    load_model(model, recipe.checkpoint_dir)
    torch.manual_seed(recipe.seed)
    largest, scale, ranges = 0.0, 0.0, []
    with torch.no_grad():
        for name, positions in iter_position_ranges(config, recipe):
            lengths = list_row_lengths(positions, recipe.rows)
            rows = [torch.randint(0, count_tokens(config), (length,)) for length in lengths]
            expected = compute_reference_logits(reference, rows, positions)
            actual = [model(row[None], positions_BT=positions[None, : len(row)])[0] for row in rows]
            differences = [
                float((row_logits - reference_logits).abs().max())
                for row_logits, reference_logits in zip(actual, expected, strict=True)
            ]
            scale = max(scale, *(float(logits.abs().max()) for logits in expected))
            largest = max(largest, *differences)
            ranges.append({"positions": name, "lengths": lengths, "differences": differences})
    share = largest / scale if scale else float("inf")
    passed = share <= recipe.tolerance
    summary = f"differ by at most {largest:.2e}, {share:.2e} of the largest, {recipe.tolerance:g} allowed"
    return Check("logits", passed, summary, {"largest": largest, "share": share, "places": ranges})


def load_reference_model(folder: Path, config: Config) -> Any:
    """Load a folder with transformers, in float32 and with eager attention.

    Raises:
        UserError: if transformers cannot load the folder.
    """
    import transformers

    loader = {"logits": transformers.AutoModelForCausalLM, "score": transformers.AutoModelForSequenceClassification}
    if config.has_tower:
        loader["logits"] = transformers.AutoModelForMultimodalLM
    settings = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    try:
        return loader[config.output].from_pretrained(folder, **settings).eval()
    except Exception as error:  # transformers raises errors of many types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"transformers cannot load {folder} ({type(error).__name__}: {reason})") from None


def count_tokens(config: Config) -> int:
    """The number of token ids to draw from."""
    assert config.padded_vocab_size is not None
    return min(config.vocab_size, config.padded_vocab_size)


def iter_position_ranges(config: Config, recipe: Verify) -> Iterator[tuple[str, Tensor]]:
    """The positions (T,) of the longest row: from the start of the context, and up to its end."""
    length = min(recipe.length, config.block_size)
    yield "first", torch.arange(length)
    yield "last", torch.arange(config.block_size - length, config.block_size)


def list_row_lengths(positions: Tensor, rows: int) -> list[int]:
    """Lengths of the rows, descending from the number of positions; shorter rows are padded."""
    return [max(1, len(positions) - PADDING * row) for row in range(rows)]


def compute_reference_logits(reference: Any, rows: list[Tensor], positions: Tensor) -> list[Tensor]:
    """Compute logits (T, V) of rows (T,) in one batch padded to the left; those of the padding are dropped.

    Of a reward model, the scores (T, 1) of all tokens.
    """
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, position_ids = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
        position_ids[number, longest - len(row) :] = positions[: len(row)]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids, "use_cache": False}
    if hasattr(reference, "score"):  # its own output is the score of the last token
        logits = reference.score(reference.base_model(**inputs)[0])
    else:
        logits = reference(**inputs).logits
    return [logits[number, longest - len(row) :] for number, row in enumerate(rows)]


def check_tokenizer(recipe: Verify, _config: Config) -> Check:
    """Check that texts are encoded and decoded as by transformers.

    Some tokenizer classes of transformers split texts by a rule of their own instead of the one in tokenizer.json.
    Where that makes the difference, `PreTrainedTokenizerFast` is the reference, and the note gives the number of texts.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = recipe.checkpoint_dir
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return Check("tokenizer", None, "no tokenizer.json or tokenizer.model in the folder", {})
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    wrong, note, total = find_differing_texts(recipe, reference), "", recipe.strings
    if wrong and (folder / "tokenizer.json").is_file():
        plain = find_differing_texts(recipe, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
        if len(plain) < len(wrong):
            note = f"; {type(reference).__name__}, which does not follow tokenizer.json, differs on {len(wrong)}"
            wrong = plain
    summary = f"{len(wrong)} of {total} texts differ" + (f", first {wrong[0]!r}" if wrong else "") + note
    return Check("tokenizer", not wrong, summary, {"differing": wrong, "note": note})


def find_differing_texts(recipe: Verify, reference: Any) -> list[str]:
    """Find the texts that are encoded or decoded differently from a tokenizer of transformers."""
    tokenizer, wrong = Tokenizer(recipe.checkpoint_dir), []
    for text in draw_texts(recipe.strings, recipe.seed):
        plain = reference(text, add_special_tokens=False)["input_ids"]
        expected, actual = reference(text)["input_ids"], tokenizer.encode(text).tolist()
        decoded = reference.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        same = tokenizer.encode(text, bos=False).tolist() == plain and actual == expected[: len(actual)]
        if not same or tokenizer.decode(plain) != decoded:
            wrong.append(text)
    return wrong


def draw_texts(number: int, seed: int) -> list[str]:
    """Draw texts of one to thirty words in many scripts, with spaces, line ends, code, numbers and special tokens."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(number)]


def check_images(recipe: Verify, config: Config) -> Check:
    """Check drawn images: their pixels by the folder's processor, to the bit, and the logits of a text with them."""
    from PIL.Image import fromarray
    from transformers import AutoImageProcessor

    folder = recipe.checkpoint_dir
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return Check("images", None, f"no {' or '.join(PROCESSOR_FILES)} in the folder", {})
    assert config.vision is not None
    settings, shape = read_picture_settings(folder), TowerShape.from_values(config.vision)
    images = [fromarray(values.numpy()) for values in draw_pixels(recipe.seed)]
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    unit = shape.patch * shape.merge
    expected = processor(images=images, return_tensors="pt", **list_call_settings(settings, unit))
    resized = [picture for image in images for picture in resize_picture(open_picture(image), settings, unit)]
    pictures = [normalize_picture(picture, settings) for picture in resized]
    items = [cut_patches(picture[None], shape) for picture in pictures]
    media = pack_media(items)
    packed = "image_grid_thw" in expected
    values = expected["pixel_values"]
    if packed:
        same = torch.equal(media.patches_NP, values)
    else:  # in a batch, smaller images have zeros at the right and below
        pairs = zip(pictures, values.flatten(0, -4), strict=True)
        same = all(torch.equal(picture, padded[:, : picture.shape[1], : picture.shape[2]]) for picture, padded in pairs)
    largest, share = compare_image_logits(recipe, config, media, expected)
    said = f"pixels of {len(images)} images {'are equal to the bit' if same else 'DIFFER'}"
    summary = (
        f"{said}; logits differ by at most {largest:.2e}, {share:.2e} of the largest, {recipe.tolerance:g} allowed"
    )
    figures = {"sizes": [image.size for image in images], "grids": media.grids, "largest": largest, "share": share}
    return Check("images", same and share <= recipe.tolerance, summary, {**figures, "same_pixels": same})


def list_call_settings(settings: PictureSettings, unit: int) -> dict[str, Any]:
    """The settings that the processor of a model passes to that of images, beside those in the file."""
    cuts = {} if settings.tile_counts is None else {"crop_to_patches": True}
    return {**cuts, **({"patch_size": {"height": unit, "width": unit}} if settings.rule == "within" else {})}


def draw_pixels(seed: int) -> list[Tensor]:
    """Two images (H, W, 3) of different sizes, uint8: noise over a slope."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(*size, 3, generator=draw) * 100 + torch.linspace(0, 155, size[1])[:, None]).to(torch.uint8)
        for size in ((48, 80), (120, 64))
    ]


def compare_image_logits(recipe: Verify, config: Config, media: Media, inputs: Any) -> tuple[float, float]:
    """The largest difference of logits from transformers, and its share of the largest logit, of a text with images.

    Args:
        inputs: the images as the model of transformers takes them.
    """
    reference, model = load_reference_model(recipe.checkpoint_dir, config), GPT(config).eval()
    load_model(model, recipe.checkpoint_dir)
    assert model.vision is not None
    shape, draw = model.vision.shape, random.Random(recipe.seed)
    words = sorted(set(range(count_tokens(config))) - set(shape.media_tokens))
    ids = draw.choices(words, k=3)
    for grid in media.grids:
        ids += [shape.image_token] * count_places(grid, shape) + draw.choices(words, k=2)
    positions = build_media_positions(shape, ids, media.grids)[None] if config.rope_sections else None
    ids_BT = torch.tensor([ids])
    places = {} if positions is None else {"position_ids": positions.transpose(0, 1)}
    places |= {"token_type_ids": (ids_BT == shape.image_token).int()} if shape.image_blocks else {}
    inputs = {key: value for key, value in inputs.items() if key in signature(reference.forward).parameters}
    with torch.no_grad():
        expected = reference(input_ids=ids_BT, **inputs, **places, use_cache=False).logits
        actual = model(ids_BT, media=media, positions_BT=positions)
    largest = float((actual - expected).abs().max())
    return largest, largest / float(expected.abs().max())


CHECKS = (check_tensors, check_round_trip, check_settings, check_logits, check_tokenizer)
