"""Write a conversation as the text that a model was trained on, by the template in its folder.

Templates come from the hub, so they run in jinja's sandbox, see texts and lists only, and load nothing.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.files import read_json

Message = Mapping[str, Any]

GENERATION_MARKS = ("\U000f8a31", "\U000f8a32")
"""What stands around the text of `{% generation %}` blocks where it is asked for: characters of no meaning."""


class ChatTemplate:
    """A model's chat template.

    Args:
        source: jinja, with the names and settings that the hub's templates rely on.
        where: the file that it is from, for errors.
        with_tools: the template for conversations with tools, where there is another one for them.
        date: the day that templates are told; None for today.

    Raises:
        UserError: if the template is not jinja.
    """

    def __init__(
        self, source: str, where: Path, *, with_tools: str | None = None, date: datetime | None = None
    ) -> None:
        import jinja2

        self.where, self.sources = where, (source, with_tools, date and date.isoformat())
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\b", source + (with_tools or "")) is not None
        jinja = build_environment(date)
        try:
            self._template = jinja.from_string(source)
            self._with_tools = jinja.from_string(with_tools) if with_tools is not None else self._template
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: not a chat template ({str(error)[:200]})") from None

    def render(
        self,
        messages: Sequence[Message],
        special_tokens: Mapping[str, str],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        marked: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: each with `role` (system, user, assistant or tool) and `content`, or `tool_calls`.
            special_tokens: of `Tokenizer.special_tokens`.
            tools: the functions that the model may call, as JSON schemas.
            add_generation_prompt: end where the model's reply begins.
            marked: put GENERATION_MARKS around what stands in `{% generation %}` blocks.
            variables: more that the template is told, such as `enable_thinking`.

        Raises:
            UserError: if the template refuses the conversation, such as one with a system prompt.
        """
        chat = [dict(message) for message in messages]
        values: dict[str, Any] = {**special_tokens, **(variables or {})}
        if marked:
            values |= {"generation_begins": GENERATION_MARKS[0], "generation_ends": GENERATION_MARKS[1]}
        try:
            return (self._with_tools if tools else self._template).render(
                messages=chat,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **values,
            )
        except Exception as error:  # a template is a program: what it can raise is not known
            raise UserError(f"{self.where}: refuses this conversation ({str(error)[:200]})") from None


def build_environment(date: datetime | None = None) -> Any:
    """The sandbox that templates run in; they are told this day, or today."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks what the model writes, and adds nothing to the text but marks if asked to."""

        tags = {"generation"}  # noqa: RUF012, as jinja asks for it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            before, behind = (
                nodes.Output([nodes.Name(f"generation_{side}", "load")]).set_lineno(line) for side in ("begins", "ends")
            )
            return [before, *body, behind]

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)  # jinja's own escapes HTML

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda form: (date or datetime.now()).strftime(form)
    return sandbox


def read_template(folder: Path, date: datetime | None = None) -> ChatTemplate | None:
    """The chat template in a model's folder: its own file, or the one in tokenizer_config.json; None without one.

    Args:
        date: the day that the template is told; None for today.

    Raises:
        UserError: if a file is damaged or what it holds is no template.
    """
    if (folder / "chat_template.jinja").is_file():
        more = folder / "additional_chat_templates" / "tool_use.jinja"
        with_tools = _text(more) if more.is_file() else None
        path = folder / "chat_template.jinja"
        return ChatTemplate(_text(path), path, with_tools=with_tools, date=date)
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        values = read_json(path) if path.is_file() else {}
        found = values.get("chat_template") if isinstance(values, dict) else None
        if found is None:
            continue
        named = {"default": found}
        if isinstance(found, list):  # several, by name
            named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        source, with_tools = named.get("default"), named.get("tool_use")
        if not isinstance(source, str) or not isinstance(with_tools, str | None):
            raise UserError(f"{path}: chat_template is {type(found).__name__} without a default text, not a template")
        return ChatTemplate(source, path, with_tools=with_tools, date=date)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
