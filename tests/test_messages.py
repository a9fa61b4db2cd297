"""A key that an error message names, or tells the user to set, is a key of a command."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from litgpt.model.transformer_config import TransformerConfig
from litgpt.recipe.build import find_aliases, list_known_keys
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
# The packages that a command uses, and the functions in them whose messages are of other commands.
PACKAGES = {
    "data inspect": ("litgpt/data/",),
    "generate": ("litgpt/store/", "litgpt/infer/", "litgpt/model/"),
}
OF_OTHER_COMMANDS = {
    ("data/modules/finetuning.py", "pick_conversation"),  # finetune
    ("data/modules/conversations.py", "pick_conversation"),
    ("store/checkpoint_load.py", "find_checkpoint"),  # all that train
    ("store/checkpoint_save.py", "commit"),
    ("store/state_dict.py", "check_state_value"),
    ("store/state_dict.py", "restore_parameter_state"),
    ("store/state_dict.py", "restore_param_groups"),
    ("store/step_folders.py", "no_checkpoint_error"),
    ("store/tensor_audit.py", "check"),  # pretrain, whose config the folder does not give
    ("store/litgpt_files.py", "write_litgpt_config"),  # convert_from_litgpt
    ("store/gguf_write.py", "write_gguf"),
    ("store/gguf_write.py", "find_architecture"),
    ("store/gguf_write.py", "check_gguf"),
    ("store/gguf_tokenizer.py", "unwritten_tokenizer"),
    ("store/adapters/vllm_lora.py", "convert_lora_to_vllm"),
}


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


def list_functions(node: ast.AST, name: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield the function that each node is in, and the node."""
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, ast.FunctionDef) else name
        yield inner, child
        yield from list_functions(child, inner)


def list_messages() -> Iterator[tuple[str, str, str]]:
    """Yield the place, the function and the text of each error, and of each line that is printed."""
    for path in sorted(ROOT.glob("litgpt/**/*.py")):
        for function, node in list_functions(ast.parse(path.read_text(encoding="utf-8"))):
            is_message = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "print_message")
            for argument in node.args if is_message else ():  # type: ignore[attr-defined]
                yield f"{path.relative_to(ROOT)}:{node.lineno}", function, format_text(argument)  # type: ignore


def list_named_keys(text: str) -> set[str]:
    """The keys that a message names."""
    return {key for key in {*CURE.findall(text), *DOTTED.findall(text)} if not key.endswith(FILES)}


def test_keys_in_messages_exist():
    known, messages = list_all_keys() | INNER, list(list_messages())
    assert len(messages) > 300
    named = [(place, key) for place, _, text in messages for key in list_named_keys(text)]
    assert len(named) > 150
    assert [(place, key) for place, key in named if key not in known] == []


@pytest.mark.parametrize("command", PACKAGES)
def test_messages_of_a_package_name_keys_of_the_commands_that_use_it(command):
    recipe = COMMANDS[command].import_recipe()
    known = {*list_keys(recipe), *find_aliases(recipe)}
    classes = tuple(f"{group}." for base, group in GROUPS.items() if group in known)
    messages = [
        (place, text)
        for place, function, text in list_messages()
        if place.startswith(PACKAGES[command])
        and (place.partition(":")[0].removeprefix("litgpt/"), function) not in OF_OTHER_COMMANDS
    ]
    assert len(messages) > 100
    named = [(place, key) for place, text in messages for key in list_named_keys(text)]
    assert [(place, key) for place, key in named if key not in known and not key.startswith(classes or ("-",))] == []
