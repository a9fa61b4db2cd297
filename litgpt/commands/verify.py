"""litgpt verify: a model folder held against transformers, tensor by tensor, logit by logit, text by text."""

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.errors import UserError
from litgpt.files import write_json
from litgpt.recipe.store_commands import Verify

if TYPE_CHECKING:
    from torch import Tensor

    from litgpt.model.config import Config
    from litgpt.model.gpt import GPT

PADDING = 3  # tokens put to the left of the shortest row
SAMPLE = """
the llama of Cuzco eats 12 apples, doesn't it? Größe café 你好 世界 привет 🦙 👩‍👩‍👧 def f(x): return x**2 3.14159
1,000,000 https://example.com/a?b=c&d=%20 NaN “quotes” -- ____ ### <b> </s> <|im_start|> ﬁ ½ I'll YOU'RE
snake_case CamelCase ｆｕｌｌ ทดสอบ العربية עברית नमस्ते
"""
WORDS = [*SAMPLE.split(), "\t", "\n", "\n\n", "\r\n", " ", "e\u0301", "\u200b", "\u00a0"]


@dataclass
class Check:
    """One thing that was looked at: whether it holds, None if it could not be looked at, and what was found."""

    name: str
    passed: bool | None
    found: str
    figures: dict[str, Any]


def run(recipe: Verify) -> None:
    """Make every check, print a line for each, write the report.

    Raises:
        UserError: if a check failed, or transformers is not there to compare with.
    """
    from litgpt.store.load_model import load_config

    require_transformers()
    folder = recipe.checkpoint_dir
    config = load_config(folder)
    checks = []
    for check in CHECKS:
        checks.append(made(check, recipe, config))
        word = {True: "passed", False: "FAILED", None: "skipped"}[checks[-1].passed]
        print(f"{checks[-1].name}: {word}: {checks[-1].found}", flush=True)
    failed = [check.name for check in checks if check.passed is False]
    if recipe.report:
        settings = {key: getattr(recipe, key) for key in ("rows", "length", "strings", "tolerance", "seed")}
        found = {
            "folder": str(folder),
            "passed": not failed,
            "settings": settings,
            "checks": [asdict(c) for c in checks],
        }
        write_json(recipe.report, found)
    if failed:
        raise UserError(f"{folder}: {len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    print(f"{folder}: verified")


def require_transformers() -> None:
    """Raise a UserError if the reference is not installed."""
    try:
        import transformers  # noqa: F401 - whether it is there
    except ImportError:
        raise UserError("verify compares with transformers, which is not here; pip install 'litgpt[verify]'") from None


def made(check: "Callable[[Verify, Config], Check]", recipe: Verify, config: "Config") -> Check:
    """A check's outcome; one that cannot be made to the end has failed."""
    try:
        return check(recipe, config)
    except UserError as error:
        return Check(check.__name__.removeprefix("check_"), False, str(error), {})


def check_tensors(recipe: Verify, config: "Config") -> Check:
    """Whether every published tensor is read by a rule, and every one of ours is there in its shape."""
    from litgpt.store.tensor_audit import audit_folder

    ledger = audit_folder(recipe.checkpoint_dir, config)
    wrong = [f"{name} has no rule" for name in ledger.unknown] + [f"{name} is not there" for name in ledger.missing]
    wrong += ledger.misshapen
    rules = ", ".join(f"{number} by {kind}" for kind, number in ledger.kinds().items())
    found = f"{len(ledger.source.names)} in the files: {rules}, {len(ledger.left_out)} left out"
    figures = {
        "read": {step.hf_name: [step.kind, *step.names] for step in ledger.read},
        "left_out": ledger.left_out,
        "wrong": wrong,
    }
    return Check("tensors", not wrong, "; ".join([*wrong[:3], found]), figures)


def check_round_trip(recipe: Verify, config: "Config") -> Check:
    """Whether our tensors, written back, are the published ones to the bit."""
    from litgpt.store.tensor_audit import audit_folder, find_differing

    ledger = audit_folder(recipe.checkpoint_dir, config)
    if not ledger.balanced:
        return Check("round trip", False, "the tensors do not fit, so they cannot be written back", {})
    wrong = find_differing(ledger, config)
    found = f"{', '.join(wrong[:3])} differ" if wrong else f"{len(ledger.read)} tensors come out to the bit"
    return Check("round trip", not wrong, found, {"differing": wrong})


def check_settings(recipe: Verify, config: "Config") -> Check:
    """Whether the config.json that we would write says what transformers reads in the folder's own."""
    from transformers import AutoConfig

    from litgpt.model.registry import family_of, meaning

    family = family_of(config)
    if family is None or not (recipe.checkpoint_dir / "config.json").is_file():
        return Check("settings", None, "no published architecture has this shape", {})
    again = meaning(family.read(family.config_json(config)), family.unused)
    kind = AutoConfig.from_pretrained(recipe.checkpoint_dir).model_type
    wrong = [key for key, value in meaning(config, family.unused).items() if again[key] != value]
    found = f"{', '.join(wrong)} read back otherwise" if wrong else f"config.json of {family.model_type} says the same"
    return Check("settings", not wrong, found, {"model_type": kind, "differing": wrong})


def check_logits(recipe: Verify, config: "Config") -> Check:
    """Whether logits are transformers' in float32: rows of several lengths at the end of the context, padded left."""
    import torch

    reference, model = reference_model(recipe.checkpoint_dir), our_model(recipe.checkpoint_dir, config)
    torch.manual_seed(recipe.seed)
    largest, scale, places = 0.0, 0.0, []
    with torch.no_grad():
        for name, positions in places_of(config, recipe):
            rows = [torch.randint(0, vocabulary(config), (length,)) for length in lengths_of(positions, recipe.rows)]
            theirs = padded_logits(reference, rows, positions)
            ours = [model(row[None], positions_BT=positions[None, : len(row)])[0] for row in rows]
            differences = [float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True)]
            scale = max(scale, *(float(other.abs().max()) for other in theirs))
            largest = max(largest, *differences)
            places.append({"positions": name, "lengths": [len(row) for row in rows], "differences": differences})
    share = largest / scale if scale else float("inf")
    passed = share <= recipe.tolerance
    found = f"differ by at most {largest:.2e}, {share:.2e} of the largest, {recipe.tolerance:g} allowed"
    return Check("logits", passed, found, {"largest": largest, "share": share, "places": places})


def reference_model(folder: Path) -> Any:
    """transformers' model of a folder, in float32 and with its plain attention.

    Raises:
        UserError: if transformers cannot load the folder.
    """
    import torch
    from transformers import AutoModelForCausalLM

    settings = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    except Exception as error:  # whatever it is, the folder is not one that transformers loads
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"transformers cannot load {folder} ({type(error).__name__}: {reason})") from None


def our_model(folder: Path, config: "Config") -> "GPT":
    """Our model of a folder, in float32."""
    from litgpt.model.gpt import GPT
    from litgpt.store.load_model import load_model

    model = GPT(config).eval()
    load_model(model, folder)
    return model


def vocabulary(config: "Config") -> int:
    """How many token numbers to draw from."""
    assert config.padded_vocab_size is not None
    return min(config.vocab_size, config.padded_vocab_size)


def places_of(config: "Config", recipe: Verify) -> "Iterator[tuple[str, Tensor]]":
    """Where rows begin: at the first position, and such that the longest ends with the context."""
    import torch

    length = min(recipe.length, config.block_size)
    yield "first", torch.arange(length)
    yield "last", torch.arange(config.block_size - length, config.block_size)


def lengths_of(positions: "Tensor", rows: int) -> list[int]:
    """Lengths of rows, from all positions down; the shorter ones are padded."""
    return [max(1, len(positions) - PADDING * row) for row in range(rows)]


def padded_logits(reference: Any, rows: "list[Tensor]", positions: "Tensor") -> "list[Tensor]":
    """transformers' logits of rows in one batch, padded to the left; without those of the padding."""
    import torch

    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, places = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
        places[number, longest - len(row) :] = positions[: len(row)]
    logits = reference(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    return [logits[number, longest - len(row) :] for number, row in enumerate(rows)]


def check_tokenizer(recipe: Verify, config: "Config") -> Check:
    """Whether texts become the tokens that transformers makes of them, and come back as it brings them.

    Some classes of transformers cut texts by a rule of their own whatever tokenizer.json says; where that makes the
    difference, its class that keeps to the file is the measure, and the number of texts is told.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = recipe.checkpoint_dir
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return Check("tokenizer", None, "no tokenizer.json or tokenizer.model in the folder", {})
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    wrong, note, total = differing_texts(recipe, reference), "", recipe.strings
    if wrong and (folder / "tokenizer.json").is_file():
        plain = differing_texts(recipe, PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
        if len(plain) < len(wrong):
            note = f"; {type(reference).__name__}, which does not keep to tokenizer.json, differs on {len(wrong)}"
            wrong = plain
    found = f"{len(wrong)} of {total} texts differ" + (f", first {wrong[0]!r}" if wrong else "") + note
    return Check("tokenizer", not wrong, found, {"differing": wrong, "note": note})


def differing_texts(recipe: Verify, reference: Any) -> list[str]:
    """The texts whose tokens, or what comes back of them, are not those of a tokenizer of transformers."""
    from litgpt.data.tokenizer import Tokenizer

    tokenizer, wrong = Tokenizer(recipe.checkpoint_dir), []
    for text in texts(recipe.strings, recipe.seed):
        plain = reference(text, add_special_tokens=False)["input_ids"]
        tokens, mine = reference(text)["input_ids"], tokenizer.encode(text).tolist()
        back = reference.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        same = tokenizer.encode(text, bos=False).tolist() == plain and mine == tokens[: len(mine)]
        if not same or tokenizer.decode(plain) != back:
            wrong.append(text)
    return wrong


def texts(number: int, seed: int) -> list[str]:
    """Texts of one to thirty words of many scripts, with spaces, line ends, code, numbers and special tokens."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(number)]


CHECKS = (check_tensors, check_round_trip, check_settings, check_logits, check_tokenizer)
