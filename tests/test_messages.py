"""A key that an error message names, or tells the user to set, is a key of a command."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from litgpt.model.transformer_config import TransformerConfig
from litgpt.recipe.build import list_known_keys
from litgpt.recipe.choices import CLASS_PATHS, import_class
from litgpt.recipe.commands import COMMANDS
from litgpt.recipe.data import DataModule
from litgpt.recipe.keys import list_keys
from litgpt.recipe.optimizer import Optimizer
from litgpt.recipe.tuner import Tuner

ROOT = Path(__file__).parents[1]
GROUPS = {DataModule: "data", Optimizer: "optimizer", Tuner: "tuner"}
CURE = re.compile(r"\b(?:set|use|or) ([a-z]\w*(?:\.\w+)*): ")
TOP = "train|eval|log|loss|data|tuner|optimizer|parallel|recompute|checkpoint|guard|model_config|tokenizer"
DOTTED = re.compile(rf"(?<![\w./{{}}-])((?:{TOP})\.[a-z_]\w*(?:\.\w+)*)")
FILES = (".json", ".yaml", ".model", ".pre")
# Keys inside of values: of an entry of a list, and of a class.
INNER = {"data.weights.keyword", "data.weights.regex", "optimizer.init_args"}


def list_all_keys() -> set[str]:
    known = {key for command in COMMANDS.values() for key in list_known_keys(command.import_recipe(), {})}
    for base, group in GROUPS.items():
        for path in CLASS_PATHS[base].values():
            if path.startswith("litgpt."):
                known |= {key for key in list_keys(import_class(path, group), f"{group}.")}
    return known | {f"model_config.{name}" for name in TransformerConfig.__dataclass_fields__}


def format_text(node: ast.AST) -> str:
    """The text of an expression, with `{}` for what it formats."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(format_text, parts))
        case ast.BinOp(left=left, right=right):
            return format_text(left) + format_text(right)
        case ast.IfExp(body=body, orelse=other):
            return f"{format_text(body)} {format_text(other)}"
    return "{}"


def list_messages() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each error."""
    for path in sorted(ROOT.glob("litgpt/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                yield f"{path.relative_to(ROOT)}:{node.lineno}", format_text(node.args[0])


def test_keys_in_messages_exist():
    known, messages = list_all_keys() | INNER, list(list_messages())
    assert len(messages) > 300
    named = [(place, key) for place, text in messages for key in {*CURE.findall(text), *DOTTED.findall(text)}]
    assert len(named) > 150
    assert [(place, key) for place, key in named if key not in known and not key.endswith(FILES)] == []
