"""Prompt styles: how an instruction is written for a model. What is written stands in prompt_styles.yaml."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import yaml

from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import write_text
from litgpt.model.config import Config
from litgpt.recipe.choices import import_class
from litgpt.recipe.keys import find_nearest

PROMPT_STYLE_FILE = "prompt_style.yaml"
PROMPTS_MODULE = "litgpt.prompts"
Messages = Sequence[Mapping[str, str]]


class PromptStyle(ABC):
    """How an instruction is written; the base of styles of your own."""

    @abstractmethod
    def apply(self, prompt: str | Messages, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """The text that a model reads before it answers.

        Args:
            prompt: the instruction.
            sys_prompt: what the assistant is told of itself; None or empty for the style's own.
            kwargs: more columns of a row, such as `input`.
        """

    def stop_tokens(self, tokenizer: Tokenizer) -> tuple[list[int], ...]:
        """Sequences of tokens that end a reply."""
        return ([] if tokenizer.eos_id is None else [tokenizer.eos_id],)

    @classmethod
    def from_name(cls, name: str) -> "PromptStyle":
        """The style of a name, such as `alpaca`.

        Raises:
            UserError: naming the nearest, if there is none.
        """
        if name not in rows():
            near = find_nearest(name, rows())
            what = f"did you mean {near}?" if near else f"give {', '.join(rows())}"
            raise UserError(f"prompt_style: {name!r} is not known; {what}")
        return style_class(name)()

    @classmethod
    def from_config(cls, config: Config) -> "PromptStyle":
        """The style that a model of a named shape was trained with, or else the one that adds nothing."""
        found = (name for name, row in rows().items() if "models" in row and re.search(row["models"], config.name))
        return cls.from_name(next(found, "default"))


class TableStyle(PromptStyle):
    """A style out of the table."""

    row: ClassVar[dict[str, Any]]

    def apply(self, prompt: str | Messages, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """The text that a model reads before it answers; `input` is used by styles that have a place for it.

        Raises:
            UserError: for a list of messages, where the style writes single instructions only.
        """
        if not isinstance(prompt, str):
            return self._turns(prompt, sys_prompt)
        text, system = self.row["text"], self.row.get("system", "")
        if kwargs.get("input") and "text_with_input" in self.row:
            text, system = self.row["text_with_input"], self.row["system_with_input"]
        elif sys_prompt:
            text = self.row.get("text_with_system", text)
        return fill_text(text, prompt=prompt, system=sys_prompt or system, input=kwargs.get("input") or "")

    def _turns(self, messages: Messages, sys_prompt: str | None) -> str:
        turns = self.row.get("turns")
        if turns is None:
            raise UserError(f"prompt_style: {type(self).__name__} writes a text, not a list of messages; llama3 does")
        said = [(message["role"], message["content"]) for message in messages]
        if not said or said[0][0] != "system":
            said = [("system", sys_prompt or self.row["system"]), *said]
        for number, (role, _) in enumerate(said):
            if role not in ("system", "user", "assistant") or (role == "system") != (number == 0):
                raise UserError(f"prompt_style: message {number} of role {role!r}; give user and assistant in turn")
        written = [fill_text(turns[role], prompt=text.strip(), system=text.strip()) for role, text in said]
        return "".join([turns["begin"], *written, turns["reply"]])

    def stop_tokens(self, tokenizer: Tokenizer) -> tuple[list[int], ...]:
        """Sequences of tokens that end a reply: the tokenizer's end of text, and the style's own."""
        stops = self.row.get("stops", [])
        own = [[part if isinstance(part, int) else tokenizer.token_to_id(part) for part in stop] for stop in stops]
        return (*super().stop_tokens(tokenizer), *own)


class ChatML(TableStyle):
    """ChatML with a system message of its own, if it is given one."""

    def __init__(self, system_message: str | None = None) -> None:
        ours = rows()["qwen3"]
        text = ours["text_with_system"] if system_message else ours["text"]
        with_system = ours["text_with_system"]
        self.row = {"text": text, "text_with_system": with_system, "system": system_message or ""}  # type: ignore[misc]


def fill_text(text: str, **values: str) -> str:
    """A text with its {prompt}, {system} and {input} filled in, all at once."""
    return re.sub(r"\{(prompt|system|input)\}", lambda found: values[found[1]], text)


@cache
def rows() -> dict[str, dict[str, Any]]:
    """The table, by name, in the order in which models are looked up."""
    path = Path(__file__).with_name("prompt_styles.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@cache
def style_class(name: str) -> type[TableStyle]:
    """The class of a named style."""
    row = rows()[name]
    about = f"The prompt style `{name}`."
    return type(row["class"], (TableStyle,), {"row": row, "__doc__": about, "__module__": PROMPTS_MODULE})


@cache
def classes() -> dict[str, type[PromptStyle]]:
    """Every class of styles by its name in litgpt.prompts."""
    found: dict[str, type[PromptStyle]] = {row["class"]: style_class(name) for name, row in rows().items()}
    return found | {"ChatML": ChatML}


def parse_style(value: "str | PromptStyle | dict[str, Any]") -> PromptStyle:
    """The style that a recipe asks for: by name, by class, or by class_path and init_args.

    Raises:
        UserError: if it is none of ours and no subclass of PromptStyle.
    """
    if isinstance(value, PromptStyle):
        return value
    path, arguments = (
        (value.get("class_path"), value.get("init_args") or {}) if isinstance(value, dict) else (value, {})
    )
    if not isinstance(path, str):
        raise UserError(f"prompt_style: {value!r} will not do; give a name such as alpaca")
    module, _, last = path.rpartition(".")
    if last in classes() and module in ("", PROMPTS_MODULE):
        made = classes()[last]
    elif module and path not in rows():
        made = import_class(path, "prompt_style")
        if not issubclass(made, PromptStyle):
            raise UserError(f"prompt_style: {path} is no PromptStyle; give a name such as alpaca")
    else:
        return PromptStyle.from_name(path)
    try:
        return made(**arguments)
    except TypeError as error:
        raise UserError(f"prompt_style: {path} cannot be made of {arguments} ({error})") from None


def save_prompt_style(style: str | PromptStyle, checkpoint_dir: Path) -> None:
    """Write prompt_style.yaml, which names the class of a style."""
    style = PromptStyle.from_name(style) if isinstance(style, str) else style
    module = PROMPTS_MODULE if type(style).__name__ in classes() else type(style).__module__
    write_text(checkpoint_dir / PROMPT_STYLE_FILE, yaml.safe_dump({"class_path": f"{module}.{type(style).__name__}"}))


def has_prompt_style(checkpoint_dir: Path) -> bool:
    """Whether a folder names a style."""
    return (checkpoint_dir / PROMPT_STYLE_FILE).is_file()


def load_prompt_style(checkpoint_dir: Path) -> PromptStyle:
    """The style that a folder names.

    Raises:
        UserError: if the file is damaged, or names a class that is not ours: a folder must not make us run its code.
    """
    path = checkpoint_dir / PROMPT_STYLE_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        name = config["class_path"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
        raise UserError(f"{path}: names no class_path such as litgpt.prompts.Alpaca") from None
    known = classes()
    module, _, last = str(name).rpartition(".")
    if module != PROMPTS_MODULE or last not in known:
        raise UserError(f"{path}: {name!r} is no class of litgpt.prompts, and no other is run; Alpaca is one")
    return known[last]()
