"""Family files with a tower: the entries of one family for each pair of a decoder and a tower that they name."""

from collections.abc import Iterator, Mapping
from typing import Any

from litgpt.mappings import drop_nulls

PASSED_ON = ("architectures", "model_type", "nested", "whole", "carried", "image_head", "starts", "module_starts")
"""The entries of a file that those of each pair have as they are."""
TOWER_PARTS = ("vision", "audio")
"""The entries of a file that have those of its towers, in the order in which a model numbers their features."""
INHERITED_BY_KEY = ("config", "missing", "tensors", "starts", "module_starts")
"""The entries of a file that one `like` another inherits key by key, except those set to null; others as a whole."""


def merge_parent_file(files: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The entries of the file of a tower, or of a family with one, with those of the file that it is `like`."""
    data = files[name]
    if "like" not in data:
        return data
    base = merge_parent_file(files, data["like"])
    merged = {key: {**base[key], **data.get(key, {})} for key in INHERITED_BY_KEY if key in base}
    return {**base, **data, **{key: drop_nulls(entries) for key, entries in merged.items()}}


def expand_tower_family(
    data: dict[str, Any], decoders: Mapping[str, dict[str, Any]], towers: Mapping[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The entries of a family for each pair of a decoder and a tower.

    Args:
        data: the file: `decoders` are families and the model types that they have in `text_config`, `towers` are files
            in `towers/` and further entries of `vision`, or `audio`; `decoder_names` maps the starts of a decoder's
            tensor names to those here, `tower_names` is the start of the tower's. In a file with both, `audio` has the
            `tower` and `tower_names` of the second tower, which all pairs have.
        decoders: the entries of the decoders' families, inherited ones included, by name.
        towers: those of the files of towers.
    """
    pairs = [(decoder, tower) for decoder in data["decoders"] for tower in data["towers"]]
    for decoder, tower in pairs:
        name = data["name"] if len(pairs) == 1 else f"{data['name']}-{decoder}-{tower}"
        yield {"name": name, **merge_decoder(data, decoders[decoder], decoder, towers, tower)}


def merge_decoder(
    data: dict[str, Any],
    decoder: dict[str, Any],
    decoder_name: str,
    towers: Mapping[str, dict[str, Any]],
    tower_name: str,
) -> dict[str, Any]:
    """The entries of one pair: the decoder's with those of the file over them, and the towers."""
    tensors = {rename_start(name, data["decoder_names"]): line for name, line in decoder["tensors"].items()}
    module_names, ignored = dict(decoder.get("module_names", {})), list(decoder.get("ignored", []))
    keys = []
    for part in (part for part in TOWER_PARTS if part in data):
        entries = {"tower": tower_name, "tower_names": data.get("tower_names", ""), **data[part]}
        tower, start = merge_parent_file(towers, entries["tower"]), entries["tower_names"]
        tensors |= {start + name: line for name, line in tower["tensors"].items()}
        module_names |= tower.get("module_names", {})
        ignored += [start.replace(".", r"\.") + each for each in tower.get("ignored", [])]
        settings = {} if "tower" in data[part] else data["towers"][tower_name] or {}
        decoder_type = data["decoders"][decoder_name]
        keys.append(merge_tower(entries, tower) | {"part": part, "decoder_type": decoder_type, **settings})
    text = data.get("text", {})
    merged = {
        key: drop_nulls({**decoder.get(key, {}), **text.get(key, {})})
        for key in ("fixed", "config", "translated", "expect", "missing")
    }
    return {
        **{key: data[key] for key in PASSED_ON if key in data},
        **{key: decoder[key] for key in ("unused", "divisible", "transposed_in_peft") if key in decoder},
        "module_names": module_names,
        **merged,
        "order": 2,
        "tensors": drop_nulls({**tensors, **data["tensors"]}),
        "ignored": ignored,
        "towers": keys,
    }


def merge_tower(entries: Mapping[str, Any], tower: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `TowerKeys` that a tower has: those of its file, with the `entries` of a family over them."""
    return {
        "tower_type": tower["model_type"],
        "fixed": {**tower["fixed"], **entries.get("fixed", {})},
        "config": {**tower["config"], **entries.get("config", {})},
        "outside": entries["outside"],
        "translated": [*tower.get("translated", []), *entries.get("translated", [])],
        "missing": {**tower["missing"], **entries.get("missing", {})},
        "missing_outside": entries["missing_outside"],
        "expect_inside": tower.get("expect", {}),
        "ties": entries.get("ties", "outside"),
    }


def rename_start(name: str, starts: Mapping[str, str]) -> str:
    """A published name with its start replaced by the first that matches."""
    return next((new + name[len(old) :] for old, new in starts.items() if name.startswith(old)), name)
