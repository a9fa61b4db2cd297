"""Write a conversation as the text that a model was trained on, by the template in its folder.

Templates come from the hub, so they run in jinja's sandbox, see texts and lists only, and load nothing.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.files import read_json

Message = Mapping[str, str]


class ChatTemplate:
    """A model's chat template.

    Args:
        source: jinja, with the names and settings that the hub's templates rely on.
        where: the file that it is from, for errors.

    Raises:
        UserError: if the template is not jinja.
    """

    def __init__(self, source: str, where: Path) -> None:
        import jinja2

        self.where = where
        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: not a chat template ({str(error)[:200]})") from None

    def render(
        self,
        messages: Sequence[Message],
        special_tokens: Mapping[str, str],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: each with `role` (system, user or assistant) and `content`.
            special_tokens: of `Tokenizer.special_tokens`.
            add_generation_prompt: end where the model's reply begins.

        Raises:
            UserError: if the template refuses the conversation, such as one with a system prompt.
        """
        chat = [dict(message) for message in messages]
        try:
            return self._template.render(
                messages=chat,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except Exception as error:  # a template is a program: what it can raise is not known
            raise UserError(f"{self.where}: refuses this conversation ({str(error)[:200]})") from None


def environment() -> Any:
    """The sandbox that templates run in."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks what the model writes, and adds nothing to the text."""

        tags = {"generation"}  # noqa: RUF012, as jinja asks for it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)  # jinja's own escapes HTML

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return sandbox


def read_template(folder: Path) -> ChatTemplate | None:
    """The chat template in a model's folder: its own file, or the one in tokenizer_config.json; None without one.

    Raises:
        UserError: if a file is damaged or what it holds is no template.
    """
    if (folder / "chat_template.jinja").is_file():
        try:
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{folder / 'chat_template.jinja'}: not UTF-8 text") from None
        return ChatTemplate(source, folder / "chat_template.jinja")
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        values = read_json(path) if path.is_file() else {}
        found = values.get("chat_template") if isinstance(values, dict) else None
        if isinstance(found, list):  # several, by name
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        if found is not None:
            if not isinstance(found, str):
                raise UserError(f"{path}: chat_template is {type(found).__name__}, not a text")
            return ChatTemplate(found, path)
    return None
