"""Write the tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json."""

import json
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.files import write_json
from litgpt.model.registry import load_family_files
from litgpt.store.gguf_files import GGUFFile

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of token (llama.cpp, `llama_token_type`)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
ADDED_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
SPACE = "▁"
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
    steps = [
        split if isinstance(split, dict) else {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated"}
        for split in splits
    ]
    steps = [{"invert": False, **step} if step["type"] == "Split" else step for step in steps]
    splits_by_bytes = not any(step["type"] == "Split" for step in steps)
    steps.append({**BYTE_LEVEL, "use_regex": splits_by_bytes})
    model = {
        "type": "BPE",
        "ignore_merges": not splits_by_bytes,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in merges],
    }
    before = {"type": "Sequence", "pretokenizers": steps}
    return build_tokenizer_json(model, pre_tokenizer=before, decoder={**BYTE_LEVEL, "use_regex": True})


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
