"""Read YAML from a file, a URL or a flag into plain mappings."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from litgpt.errors import UserError
from litgpt.files import decode_source, parse_yaml

TIMEOUT_SECONDS = 30
MAX_BYTES = 4 * 2**20  # of a recipe, because YAML is slow to parse


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader without duplicate keys, keys that are not strings, aliases and dates, which are strings."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping after a check that its keys are unique strings."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not a string", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node that is not an alias."""
        if self.check_event(yaml.AliasEvent):  # nested aliases expand a small file to gigabytes
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def is_url(source: str) -> bool:
    """Return whether `source` is an HTTP URL."""
    return source.startswith(("http://", "https://"))


def fetch_url(url: str) -> bytes:
    """Download the bytes at a URL."""
    import requests

    try:
        response = requests.get(url, timeout=TIMEOUT_SECONDS)
        response.raise_for_status()
    except requests.RequestException as error:
        raise UserError(f"{url}: cannot be downloaded ({error})") from None
    return response.content


def read_bytes(source: str) -> bytes:
    """Read the bytes of a file or a URL."""
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
    """Parse the YAML text of a recipe; `source` is its name in error messages."""
    return parse_yaml(text, source, StrictLoader)


def read_yaml(source: str) -> dict[str, Any]:
    """Read the mapping in a YAML file or at a URL; an empty file is an empty mapping.

    Raises:
        UserError: naming the file, and the line if known, if it cannot be read or is not a YAML mapping.
    """
    data = read_bytes(source)
    if len(data) > MAX_BYTES:
        raise UserError(f"{source}: {len(data)} bytes exceed the maximum size of a recipe, {MAX_BYTES} bytes")
    tree = parse_text(decode_source(data, source), source)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{source}: contains a {type(tree).__name__}; use keys and values such as `seed: 42`")
    return tree
