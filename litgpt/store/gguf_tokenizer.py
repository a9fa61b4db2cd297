"""The tokenizer inside a GGUF file, written as tokenizer.json and tokenizer_config.json."""

import json
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.files import write_json
from litgpt.model.registry import load_family_files
from litgpt.store.gguf_files import GGUFFile

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # kinds of token (llama.cpp, `llama_token_type`)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPACE = "▁"
NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into a folder.

    Raises:
        UserError: if it is of a kind that is not known here.
    """
    file = GGUFFile(path)
    kind, cut = file.setting("tokenizer.ggml.model"), file.setting("tokenizer.ggml.pre")
    tokens = file.setting("tokenizer.ggml.tokens")
    cuts = load_family_files()["gguf"]["cuts"]
    if kind == "gpt2" and cut in cuts:
        content = build_byte_bpe(tokens, file.setting("tokenizer.ggml.merges"), cuts[cut])
    elif kind == "llama":
        content = build_sentencepiece_bpe(
            tokens, file.setting("tokenizer.ggml.scores"), spaced=file.setting("tokenizer.ggml.add_space_prefix")
        )
    else:
        raise UserError(
            f"{path}: tokenizer.ggml.pre: a {kind!r} tokenizer of kind {cut!r} is not one of {', '.join(cuts)}; "
            "put the tokenizer.json of this model beside the file"
        )
    kinds = file.setting("tokenizer.ggml.token_type")
    content["added_tokens"] = [
        build_added_token(number, token, special=kinds[number] != USER_DEFINED)
        for number, token in enumerate(tokens)
        if kinds[number] in (CONTROL, USER_DEFINED) or (kinds[number] == UNKNOWN and kind == "llama")
    ]
    numbers = {name: file.setting(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in NAMED.items()}
    named = {f"{name}_token": tokens[number] for name, number in numbers.items() if number is not None}
    begins = file.setting("tokenizer.ggml.add_bos_token")
    begins = kind == "llama" if begins is None else begins
    if begins and "bos_token" in named:
        content["post_processor"] = build_bos_processor(named["bos_token"], numbers["bos"])
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    template = file.setting("tokenizer.chat_template")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": begins,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.of_kind("context_length"),
        **named,
        **({"chat_template": template} if template else {}),
    }
    write_json(folder / "tokenizer_config.json", settings)


def build_tokenizer_json(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json around a model; parts that are not given are left empty."""
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, **parts, "model": model}


def build_byte_bpe(tokens: list[str], merges: list[str], cuts: list[Any]) -> dict[str, Any]:
    """A byte-level BPE; texts are cut by these expressions or steps, by GPT-2's own expression where there is none."""
    steps = [
        cut if isinstance(cut, dict) else {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated"}
        for cut in cuts
    ]
    steps = [{"invert": False, **step} if step["type"] == "Split" else step for step in steps]
    cut_by_bytes = not any(step["type"] == "Split" for step in steps)
    steps.append({**BYTE_LEVEL, "use_regex": cut_by_bytes})
    model = {
        "type": "BPE",
        "ignore_merges": not cut_by_bytes,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in merges],
    }
    before = {"type": "Sequence", "pretokenizers": steps}
    return build_tokenizer_json(model, pre_tokenizer=before, decoder={**BYTE_LEVEL, "use_regex": True})


def build_sentencepiece_bpe(tokens: list[str], scores: list[float], *, spaced: bool | None) -> dict[str, Any]:
    """A sentencepiece BPE with bytes to fall back on; pairs are merged in the order of their pieces' scores.

    Args:
        spaced: whether a text gets a space before it, as sentencepiece does unless told; None is yes.
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
    prefix = spaced is not False
    return build_tokenizer_json(
        model,
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}] * prefix + [space]},
        decoder={
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
            + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix,
        },
    )


def build_added_token(number: int, token: str, *, special: bool) -> dict[str, Any]:
    """An entry of tokenizer.json for a token that is found in a text before it is cut."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": special}


def build_bos_processor(token: str, number: int) -> dict[str, Any]:
    """A post-processor that puts one token before every text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
