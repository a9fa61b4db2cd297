"""Prompt styles: how an instruction is formatted for a model. The formats are in prompt_styles.yaml."""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import yaml

from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import read_mapping, write_text
from litgpt.model.config import Config
from litgpt.recipe.choices import import_class
from litgpt.recipe.keys import find_nearest

PROMPT_STYLE_FILE = "prompt_style.yaml"
PROMPTS_MODULE = "litgpt.prompts"
Messages = Sequence[Mapping[str, str]]


class PromptStyle(ABC):
    """How an instruction is formatted; base class of custom styles."""

    @abstractmethod
    def apply(self, prompt: str | Messages, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """Format the prompt of a model.

        Args:
            prompt: the instruction.
            sys_prompt: the system prompt; None or empty for the default of the style.
            kwargs: other columns of a row, such as `input`.
        """

    def stop_tokens(self, tokenizer: Tokenizer) -> tuple[list[int], ...]:
        """Return the sequences of tokens that end a reply."""
        return ([] if tokenizer.eos_id is None else [tokenizer.eos_id],)

    @classmethod
    def from_name(cls, name: str) -> "PromptStyle":
        """Return the style with a name such as `alpaca`.

        Raises:
            UserError: naming the most similar one, if there is none.
        """
        if name not in load_styles():
            near = find_nearest(name, load_styles())
            what = f"did you mean {near}?" if near else f"give {', '.join(load_styles())}"
            raise UserError(f"prompt_style: {name!r} is not known; {what}")
        return build_style_class(name)()

    @classmethod
    def from_config(cls, config: Config) -> "PromptStyle":
        """Return the style that a named model was trained with, or else the one that adds nothing."""
        return model_name_to_prompt_style(config.name)


def model_name_to_prompt_style(model_name: str) -> PromptStyle:
    """Return the style that a named model was trained with, or else the one that adds nothing."""
    names = (name for name, row in load_styles().items() if "models" in row and re.search(row["models"], model_name))
    return PromptStyle.from_name(next(names, "default"))


class TableStyle(PromptStyle):
    """A style of the table."""

    row: ClassVar[dict[str, Any]]
    init_args: Mapping[str, Any] = MappingProxyType({})
    """Arguments of the class that give the same style; prompt_style.yaml holds them."""

    def apply(self, prompt: str | Messages, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """Format the prompt of a model; only some styles use `input`.

        Raises:
            UserError: for a list of messages, if the style supports single instructions only.
        """
        if not isinstance(prompt, str):
            return self._format_turns(prompt, sys_prompt)
        text, system = self.row["text"], self.row.get("system", "")
        if kwargs.get("input") and "text_with_input" in self.row:
            text, system = self.row["text_with_input"], self.row["system_with_input"]
        elif sys_prompt:
            text = self.row.get("text_with_system", text)
        return fill_text(text, prompt=prompt, system=sys_prompt or system, input=kwargs.get("input") or "")

    def _format_turns(self, messages: Messages, sys_prompt: str | None) -> str:
        turns = self.row.get("turns")
        if turns is None:
            raise UserError(f"prompt_style: {type(self).__name__} does not support lists of messages; use llama3")
        roles_texts = [(message["role"], message["content"]) for message in messages]
        if not roles_texts or roles_texts[0][0] != "system":
            roles_texts = [("system", sys_prompt or self.row["system"]), *roles_texts]
        for number, (role, _) in enumerate(roles_texts):
            if role not in ("system", "user", "assistant") or (role == "system") != (number == 0):
                raise UserError(f"prompt_style: message {number} has role {role!r}; alternate user and assistant")
        parts = [fill_text(turns[role], prompt=text.strip(), system=text.strip()) for role, text in roles_texts]
        return "".join([turns["begin"], *parts, turns["reply"]])

    def stop_tokens(self, tokenizer: Tokenizer) -> tuple[list[int], ...]:
        """Return the sequences of tokens that end a reply: the tokenizer's eos token, and those of the style."""
        stops = self.row.get("stops", [])
        style_stops = [
            [part if isinstance(part, int) else tokenizer.find_token(part) for part in stop] for stop in stops
        ]
        # a tokenizer that lacks a token never ends a reply with it
        known = [[part for part in stop if part is not None] for stop in style_stops if None not in stop]
        return (*super().stop_tokens(tokenizer), *known)


class ChatML(TableStyle):
    """ChatML with an optional default system message."""

    def __init__(self, system_message: str | None = None) -> None:
        self.init_args = {"system_message": system_message} if system_message else {}
        row = load_styles()["qwen3"] | {"system": system_message or ""}
        self.row = row | {"text": row["text_with_system"]} if system_message else row  # type: ignore[misc]


def fill_text(text: str, **values: str) -> str:
    """Replace {prompt}, {system} and {input} in a text, in one pass."""
    return re.sub(r"\{(prompt|system|input)\}", lambda match: values[match[1]], text)


@cache
def load_styles() -> dict[str, dict[str, Any]]:
    """Load the table, by name, in the order in which models are looked up."""
    path = Path(__file__).with_name("prompt_styles.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@cache
def build_style_class(name: str) -> type[TableStyle]:
    """Build the class of a named style."""
    row = load_styles()[name]
    doc = f"The prompt style `{name}`."
    return type(row["class"], (TableStyle,), {"row": row, "__doc__": doc, "__module__": PROMPTS_MODULE})


@cache
def build_style_classes() -> dict[str, type[PromptStyle]]:
    """Build all style classes, by their names in litgpt.prompts."""
    styles: dict[str, type[PromptStyle]] = {
        row["class"]: build_style_class(name) for name, row in load_styles().items()
    }
    return styles | {"ChatML": ChatML}


def parse_style(value: "str | PromptStyle | dict[str, Any]", key: str = "prompt_style") -> PromptStyle:
    """Parse the style of a recipe: a name, a class, or class_path and init_args; `key` is its key in the recipe.

    Raises:
        UserError: if it is neither a named style nor a subclass of PromptStyle.
    """
    if isinstance(value, PromptStyle):
        return value
    path, arguments = (
        (value.get("class_path"), value.get("init_args") or {}) if isinstance(value, dict) else (value, {})
    )
    if not isinstance(path, str):
        raise UserError(f"{key}: {value!r} is not a style; use a name such as alpaca")
    module, _, last = path.rpartition(".")
    if last in build_style_classes() and module in ("", PROMPTS_MODULE):
        cls = build_style_classes()[last]
    elif module and path not in load_styles():
        cls = import_class(path, key)
        if not issubclass(cls, PromptStyle):
            raise UserError(f"{key}: {path} is not a PromptStyle; use a name such as alpaca")
    else:
        try:
            return PromptStyle.from_name(path)
        except UserError as error:
            raise UserError(f"{key}: {error.detail}") from None
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UserError(f"{key}: {path} does not accept init_args {arguments} ({error})") from None


def dump_prompt_style(style: PromptStyle) -> str:
    """Write the text of prompt_style.yaml: the class path of a style and, if it has any, its arguments."""
    module = PROMPTS_MODULE if type(style).__name__ in build_style_classes() else type(style).__module__
    values: dict[str, Any] = {"class_path": f"{module}.{type(style).__name__}"}
    if arguments := dict(getattr(style, "init_args", {})):
        values["init_args"] = arguments
    return yaml.safe_dump(values, allow_unicode=True)


def save_prompt_style(style: str | PromptStyle, checkpoint_dir: Path) -> None:
    """Write prompt_style.yaml, which holds the class path of a style."""
    style = PromptStyle.from_name(style) if isinstance(style, str) else style
    write_text(checkpoint_dir / PROMPT_STYLE_FILE, dump_prompt_style(style))


def has_prompt_style(checkpoint_dir: Path) -> bool:
    """Whether a folder has a prompt_style.yaml."""
    return (checkpoint_dir / PROMPT_STYLE_FILE).is_file()


def load_prompt_style(checkpoint_dir: Path) -> PromptStyle:
    """Load the style of a folder.

    Raises:
        UserError: if the file is damaged, or names a class that is neither in litgpt.prompts nor imported already;
            nothing is imported here, because a folder could name any code.
    """
    path = checkpoint_dir / PROMPT_STYLE_FILE
    try:
        config = read_mapping(path, "class_path: litgpt.prompts.Alpaca")
        name, arguments = config["class_path"], config.get("init_args") or {}
    except KeyError:
        raise UserError(f"{path}: no class_path such as litgpt.prompts.Alpaca") from None
    known = build_style_classes()
    module, _, last = str(name).rpartition(".")
    style = known.get(last) if module == PROMPTS_MODULE else getattr(sys.modules.get(module), last, None)
    if not (isinstance(style, type) and issubclass(style, PromptStyle)):
        raise UserError(
            f"{path}: {name!r} is not a class of litgpt.prompts such as Alpaca; import the module of your own style "
            "before the model is loaded, or remove the file"
        )
    try:
        return style(**arguments)
    except TypeError as error:
        raise UserError(f"{path}: {last} does not accept init_args {arguments} ({error})") from None
