"""Convert the tokenizer of a GGUF file to tokenizer.json and tokenizer_config.json, and back."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.files import read_json_object, write_json
from litgpt.model.registry import load_family_files
from litgpt.store.gguf_files import GGUFFile
from litgpt.store.tokenizer_files import read_special_tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of token (llama.cpp, `llama_token_type`)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
ADDED_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
SPACE = "▁"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
GGUF_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into a folder.

    Raises:
        UserError: if it is of an unknown kind.
    """
    file = GGUFFile(path)
    model, pretokenizer = file.get_value("tokenizer.ggml.model"), file.get_value("tokenizer.ggml.pre")
    tokens = file.get_value("tokenizer.ggml.tokens")
    pretokenizers = load_family_files()["gguf"]["cuts"]
    if model == "gpt2" and pretokenizer in pretokenizers:
        content = build_byte_bpe(tokens, file.get_value("tokenizer.ggml.merges"), pretokenizers[pretokenizer])
    elif model == "llama":
        content = build_sentencepiece_bpe(
            tokens,
            file.get_value("tokenizer.ggml.scores"),
            add_prefix_space=file.get_value("tokenizer.ggml.add_space_prefix"),
        )
    else:
        raise UserError(
            f"{path}: tokenizer.ggml.pre: a {model!r} tokenizer of kind {pretokenizer!r} is not one of "
            f"{', '.join(pretokenizers)}; put the tokenizer.json of this model next to the file"
        )
    kinds = file.get_value("tokenizer.ggml.token_type")
    content["added_tokens"] = [
        {"id": number, "content": token, **ADDED_TOKEN, "special": kinds[number] != USER_DEFINED}
        for number, token in enumerate(tokens)
        if kinds[number] in (CONTROL, USER_DEFINED) or (kinds[number] == UNKNOWN and model == "llama")
    ]
    token_ids = {name: file.get_value(f"tokenizer.ggml.{key}_token_id") for name, key in GGUF_TOKENS.items()}
    named_tokens = {f"{name}_token": tokens[token_id] for name, token_id in token_ids.items() if token_id is not None}
    adds_bos = file.get_value("tokenizer.ggml.add_bos_token")
    adds_bos = model == "llama" if adds_bos is None else adds_bos
    if adds_bos and "bos_token" in named_tokens:
        content["post_processor"] = build_bos_processor(named_tokens["bos_token"], token_ids["bos"])
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    template = file.get_value("tokenizer.chat_template")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.get_model_value("context_length"),
        **named_tokens,
        **({"chat_template": template} if template else {}),
    }
    write_json(folder / "tokenizer_config.json", settings)


def build_tokenizer_json(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """Build the content of tokenizer.json for a model; other parts are null."""
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, **parts, "model": model}


def build_byte_bpe(tokens: list[str], merges: list[str], splits: list[Any]) -> dict[str, Any]:
    """Build a byte-level BPE that splits text by these regular expressions or steps, or by GPT-2's expression."""
    before = build_splits(splits)
    model = {
        "type": "BPE",
        "ignore_merges": not before["pretokenizers"][-1]["use_regex"],
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in merges],
    }
    return build_tokenizer_json(model, pre_tokenizer=before, decoder={**BYTE_LEVEL, "use_regex": True})


def build_splits(splits: list[Any]) -> dict[str, Any]:
    """Build a pre-tokenizer that splits text by these regular expressions or steps, or by GPT-2's expression."""
    steps = [
        split if isinstance(split, dict) else {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated"}
        for split in splits
    ]
    steps = [{"invert": False, **step} if step["type"] == "Split" else step for step in steps]
    splits_by_bytes = not any(step["type"] == "Split" for step in steps)
    return {"type": "Sequence", "pretokenizers": [*steps, {**BYTE_LEVEL, "use_regex": splits_by_bytes}]}


def build_sentencepiece_bpe(tokens: list[str], scores: list[float], *, add_prefix_space: bool | None) -> dict[str, Any]:
    """Build a sentencepiece BPE with byte fallback, which merges pairs in the order of their scores.

    Args:
        add_prefix_space: whether a space is added before a text; None for sentencepiece's default, true.
    """
    numbers = {token: number for number, token in enumerate(tokens)}
    merges = []
    for token, number in numbers.items():
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(left, right) for left, right in cuts if left in numbers and right in numbers]
        known.sort(key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
        merges += [(-scores[number], place, pair) for place, pair in enumerate(known)]
    merges.sort(key=lambda merge: merge[0])
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": numbers,
        "merges": [list(pair) for _, _, pair in merges],
    }
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    prefix = add_prefix_space is not False
    return build_tokenizer_json(
        model,
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}] * prefix + [space]},
        decoder={
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
            + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix,
        },
    )


def build_bos_processor(token: str, number: int) -> dict[str, Any]:
    """Build a post-processor that adds one token before every text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def collect_tokenizer_fields(folder: Path, rows: int) -> dict[str, Any]:
    """The fields of a GGUF file for the tokenizer of a model folder.

    Args:
        rows: the number of rows of the model's embedding; tokens beyond the tokenizer's are unused ones.

    Raises:
        UserError: if the tokenizer is not one that llama.cpp has.
    """
    content = read_json_object(folder / "tokenizer.json")
    model: dict[str, Any] = content.get("model", {})
    if model.get("type") != "BPE":
        raise unwritten_tokenizer(f"{folder} has no tokenizer.json with a BPE")
    added = {token["id"]: token for token in content.get("added_tokens") or []}
    texts = {number: token for token, number in model["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    if max(texts) >= rows:
        raise unwritten_tokenizer(f"the tokenizer has token {max(texts)}, but the model has {rows} tokens")
    kinds = {number: CONTROL if token["special"] else USER_DEFINED for number, token in added.items()}
    if model.get("byte_fallback"):
        kinds |= {number: BYTE for number, text in texts.items() if BYTE_TOKEN.fullmatch(text)}
        kinds |= {number: UNKNOWN for number, text in texts.items() if text == model.get("unk_token")}
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(rows)]
    kind_fields = (
        collect_sentencepiece_bpe(tokens, content) if model.get("byte_fallback") else collect_byte_bpe(content)
    )
    return {
        **kind_fields,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            kinds.get(number, NORMAL if number in texts else UNUSED) for number in range(rows)
        ],
        **collect_special_tokens(folder, model),
    }


def collect_byte_bpe(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a byte-level BPE: merges, and the name of the way in which it splits text."""
    steps = flatten_steps(content["pre_tokenizer"])
    names = load_family_files()["gguf"]["cuts"]
    matching = [name for name, splits in names.items() if steps == flatten_steps(build_splits(splits))]
    if not matching or flatten_steps(content.get("normalizer")) not in ([], [{"type": "NFC"}]):
        raise unwritten_tokenizer(f"the tokenizer splits text in none of the ways {', '.join(names)}")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": matching[0],
        "tokenizer.ggml.merges": list_merges(content["model"]),
    }


def collect_sentencepiece_bpe(tokens: list[str], content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a sentencepiece BPE, whose scores are the order of its merges."""
    merges = list_merges(content["model"])
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    scores = [-float(ranks.get(token, 0)) for token in tokens]
    prefix = any(step["type"] == "Prepend" for step in flatten_steps(content.get("normalizer")))
    rebuilt = build_sentencepiece_bpe(tokens, scores, add_prefix_space=prefix)
    same = all(
        flatten_steps(rebuilt[part]) == flatten_steps(content.get(part)) for part in ("normalizer", "pre_tokenizer")
    )
    if not same or list_merges(rebuilt["model"]) != merges:
        raise unwritten_tokenizer("the tokenizer merges otherwise than sentencepiece does")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def collect_special_tokens(folder: Path, model: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens, and whether a text begins with one."""
    from tokenizers import Tokenizer

    ids = {GGUF_TOKENS[key.removesuffix("_token_id")]: number for key, number in read_special_tokens(folder).items()}
    if model.get("unk_token") is not None:
        ids["unknown"] = model["vocab"][model["unk_token"]]
    first = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids[0]
    fields: dict[str, Any] = {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items()}
    return fields | {"tokenizer.ggml.add_bos_token": first == ids.get("bos")}


def list_merges(model: Mapping[str, Any]) -> list[str]:
    """The merges of a BPE as texts, the parts apart by a space."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def flatten_steps(step: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer without those that only group others, and without offsets."""
    if step is None:
        return []
    for key in ("pretokenizers", "normalizers"):
        if key in step:
            return [part for inner in step[key] for part in flatten_steps(inner)]
    return [{key: value for key, value in step.items() if key != "trim_offsets"}]


def unwritten_tokenizer(reason: str) -> UserError:
    """The error for a tokenizer that llama.cpp does not have."""
    return UserError(f"format: gguf: {reason}; use format: huggingface")
