"""Read YAML from a file, a URL or a flag into plain mappings, and say in one line what is wrong with it."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import UserError

TIMEOUT_SECONDS = 30
LARGEST_BYTES = 4 * 2**20  # of a recipe; YAML is slow to read, and a recipe is a page


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice in one mapping is an error and an alias is not followed."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not a word", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is there twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a page of aliases to aliases is a gigabyte of settings
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


def is_url(source: str) -> bool:
    """Whether `source` is to be fetched, not opened."""
    return source.startswith(("http://", "https://"))


def fetch_url(url: str) -> bytes:
    """The bytes behind a URL."""
    import requests

    try:
        answer = requests.get(url, timeout=TIMEOUT_SECONDS)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise UserError(f"{url}: cannot be fetched ({error})") from None
    return answer.content


def read_bytes(source: str) -> bytes:
    """The bytes of a file or behind a URL."""
    if is_url(source):
        return fetch_url(source)
    try:
        return Path(source).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{source}: cannot be read ({reason})") from None


def parse_text(text: str, source: str) -> Any:
    """The value that a YAML text stands for; `source` is what it is called in errors."""
    try:
        return StrictLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: not valid YAML ({error})") from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply") from None


def read_yaml(source: str) -> dict[str, Any]:
    """The mapping in a YAML file or behind a URL; an empty file is an empty one.

    Raises:
        UserError: naming the file, and the line where there is one.
    """
    data = read_bytes(source)
    if len(data) > LARGEST_BYTES:
        raise UserError(f"{source}: {len(data)} bytes are too many for a recipe")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not text in UTF-8 (byte {error.start})") from None
    tree = parse_text(text, source)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{source}: holds a {type(tree).__name__}, not keys and values such as `seed: 42`")
    return tree
