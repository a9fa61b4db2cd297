"""`litgpt verify`: compare a model folder with transformers: tensors, settings, logits, tokenizer."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.data.media.codes import find_codec_folder
from litgpt.data.media.picture_settings import PROCESSOR_FILES
from litgpt.data.media.videos import has_video_settings
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import read_json_object, write_json
from litgpt.infer.code_parity import compare_codes
from litgpt.infer.media_parity import ComparedMedia, compare_images, compare_media_logits, compare_videos
from litgpt.infer.sound_parity import compare_sounds
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.registry import find_family, find_published_family, normalize_config
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
    shape = None if config.vision is None else TowerShape.from_values(config.vision)
    sees = [] if shape is None else [check_images, *([check_videos] if shape.video_processor else [])]
    hears = [] if config.audio is None else [check_sounds]
    draws = [check_codes] if has_own_codec(folder) else []
    for check in (*CHECKS, *sees, *hears, *draws):
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
    """Check the logits in float32: rows of several lengths at both ends of the context, padded to the left.

    Of a model with chunked attention, those from the start of the context, each alone.
    """
    reference_model = load_reference_model(recipe.checkpoint_dir, config)
    model = GPT(config).eval()
    load_model(model, recipe.checkpoint_dir)
    torch.manual_seed(recipe.seed)
    largest, scale, ranges = 0.0, 0.0, []
    with torch.no_grad():
        for name, positions in iter_position_ranges(config, recipe):
            lengths = list_row_lengths(positions, recipe.rows)
            rows = [torch.randint(0, count_tokens(config), (length,)) for length in lengths]
            batches = [rows] if counts_positions(config) else [[row] for row in rows]
            expected = [
                each for batch in batches for each in compute_reference_logits(reference_model, batch, positions)
            ]
            actual = [model(row[None], positions_BT=positions[None, : len(row)])[0] for row in rows]
            pairs = [drop_excluded(*pair) for pair in zip(actual, expected, strict=True)]
            differences = [float((logits - reference).abs().max()) for logits, reference in pairs]
            scale = max(scale, *(float(reference.abs().max()) for _, reference in pairs))
            largest = max(largest, *differences)
            ranges.append({"positions": name, "lengths": lengths, "differences": differences})
    share = largest / scale if scale else float("inf")
    passed = share <= recipe.tolerance
    summary = f"differ by at most {largest:.2e}, {share:.2e} of the largest, {recipe.tolerance:g} allowed"
    return Check("logits", passed, summary, {"largest": largest, "share": share, "places": ranges})


def drop_excluded(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Logits without those of tokens that the model of transformers never writes, as Chameleon's those of images."""
    is_given = reference != torch.finfo(reference.dtype).min
    return logits[is_given], reference[is_given]


def load_reference_model(folder: Path, config: Config) -> Any:
    """Load a folder with transformers, in float32 and with eager attention.

    Raises:
        UserError: if transformers cannot load the folder.
    """
    import transformers

    loader = {"logits": transformers.AutoModelForCausalLM, "score": transformers.AutoModelForSequenceClassification}
    if config.has_tower:
        loader["logits"] = transformers.AutoModelForMultimodalLM
    values = read_json_object(folder / "config.json")
    family = find_published_family(values)
    if family is not None and family.is_whole(values):  # the class of the whole computes no logits
        loader["logits"] = getattr(transformers, family.architectures[0])
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
    if counts_positions(config):
        yield "last", torch.arange(config.block_size - length, config.block_size)


def counts_positions(config: Config) -> bool:
    """Whether transformers computes all that depends on positions from those that it is given.

    The chunks and the temperatures of Llama 4 follow the number of a token in its row, padding included.
    """
    return config.window_type != "chunked"


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
    folder = recipe.checkpoint_dir
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return Check("images", None, f"no {' or '.join(PROCESSOR_FILES)} in the folder", {})
    return check_compared(recipe, config, compare_images(folder, config, recipe.seed))


def has_own_codec(folder: Path) -> bool:
    """Whether the images of the model in a folder are codes of a part of it."""
    return (folder / "tokenizer.json").is_file() and find_codec_folder(Tokenizer(folder)) == folder


def check_codes(recipe: Verify, config: Config) -> Check:
    """Check the codes of drawn images by the folder's processor; rounding may change one of two that are as near."""
    folder = recipe.checkpoint_dir
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return Check("codes", None, f"no {' or '.join(PROCESSOR_FILES)} in the folder", {})
    actual, expected = compare_codes(folder, load_reference_model(folder, config), recipe.seed)
    differing = int((actual != expected).sum())
    summary = f"{differing} of the {actual.numel():,} codes of {len(actual)} images differ, 1 in 1,000 allowed"
    return Check("codes", differing <= actual.numel() / 1000, summary, {"differing": differing})


def check_videos(recipe: Verify, config: Config) -> Check:
    """Check drawn videos: their pixels by the folder's processor, to the bit, and the logits of a text with them."""
    folder = recipe.checkpoint_dir
    if not has_video_settings(folder):
        return Check("videos", None, "no settings of a video processor in the folder", {})
    return check_compared(recipe, config, compare_videos(folder, config, recipe.seed))


def check_compared(recipe: Verify, config: Config, compared: ComparedMedia) -> Check:
    """The check of media whose pixels were compared, with the logits of a text with them."""
    reference = load_reference_model(recipe.checkpoint_dir, config)
    largest, share = compare_media_logits(reference, recipe.checkpoint_dir, config, compared, recipe.seed)
    name = f"{compared.kind}s"
    said = f"pixels of {len(compared.sizes)} {name} {'are equal to the bit' if compared.same_pixels else 'DIFFER'}"
    summary = (
        f"{said}; logits differ by at most {largest:.2e}, {share:.2e} of the largest, {recipe.tolerance:g} allowed"
    )
    figures: dict[str, Any] = {"sizes": compared.sizes, "grids": compared.media.grids}
    figures |= {"largest": largest, "share": share, "same_pixels": compared.same_pixels}
    return Check(name, compared.same_pixels and share <= recipe.tolerance, summary, figures)


def check_sounds(recipe: Verify, config: Config) -> Check:
    """Check drawn sounds: their frames by the folder's processor, to the bit, and the logits of a text with them."""
    folder = recipe.checkpoint_dir
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return Check("sounds", None, f"no {' or '.join(PROCESSOR_FILES)} in the folder", {})
    compared = compare_sounds(load_reference_model(folder, config), folder, config, recipe.seed)
    said = f"frames of {len(compared.seconds)} sounds {'are equal to the bit' if compared.same_frames else 'DIFFER'}"
    logits = f"logits differ by at most {compared.largest:.2e}, {compared.share:.2e} of the largest"
    passed = compared.same_frames and compared.share <= recipe.tolerance
    return Check("sounds", passed, f"{said}; {logits}, {recipe.tolerance:g} allowed", vars(compared))


CHECKS = (check_tensors, check_round_trip, check_settings, check_logits, check_tokenizer)
