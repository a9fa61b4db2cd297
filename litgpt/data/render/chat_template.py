"""Render conversations by the chat template in a model's folder.

Templates come from the hub, so they run in jinja's sandbox, get only text and lists, and cannot load files.
"""

import json
import re
from collections.abc import Container, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from litgpt.data.read.media import KINDS_OF_MARKS, MARKS
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import read_json_object, read_utf8
from litgpt.recipe.keys import find_nearest

ChatMessage = Mapping[str, Any]

GENERATION_MARKS = ("\U000f8a31", "\U000f8a32")
"""Private-use characters that surround the text of `{% generation %}` blocks on request."""
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""The files that may hold the template of a model's folder, in the order in which they are read."""
ADDITIONAL_TEMPLATES = "additional_chat_templates"
"""The folder of the templates beside the default one, such as the one for conversations with tools."""
PROBE = "\U000f8a33probe\U000f8a34"
"""A content, to find in which forms a template takes it."""
ANSWER = "\U000f8a33answer\U000f8a34"
"""Stands for an answer, to find what a template writes after it."""


CONVERSATION_VARIABLES = {
    *("messages", "tools", "documents", "add_generation_prompt"),
    *("generation_begins", "generation_ends"),
}
"""The variables of a template that are set for each conversation."""


class ChatTemplate:
    """A model's chat template.

    Args:
        source: jinja, in the environment that templates on the hub expect.
        path: the file of the template, for error messages.
        with_tools: the template for conversations with tools, if it is a different one.
        date: the current date for templates; None for today.

    Attributes:
        names: names of the fields that the template reads, of messages and others.
        variables: names of the variables that it reads.

    Raises:
        UserError: if the template is not jinja.
    """

    def __init__(self, source: str, path: Path, *, with_tools: str | None = None, date: datetime | None = None) -> None:
        import jinja2.meta

        self.path, self.sources = path, (source, with_tools, date and date.isoformat())
        self.names, self.variables = set[str](), set[str]()
        self._reads_types = "type" in source  # of the parts of a content
        self._forms: tuple[bool, ...] | None = None
        self._written: dict[str, bool] = {}
        self.marks_answers = re.search(r"\{%[-+]?\s*generation\b", source + (with_tools or "")) is not None
        jinja = build_environment(date)
        try:
            self._template = jinja.from_string(source)
            self._with_tools = jinja.from_string(with_tools) if with_tools is not None else self._template
            for text in (source, with_tools or ""):
                self.names |= find_names(jinja, text)
                self.variables |= jinja2.meta.find_undeclared_variables(jinja.parse(text))
        except jinja2.TemplateError as error:
            raise UserError(f"{path}: not a chat template ({str(error)[:200]})") from None

    def render(
        self,
        messages: Sequence[ChatMessage],
        special_tokens: Mapping[str, str],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        mark_answers: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render a conversation as text.

        Args:
            messages: each with `role` (system, user, assistant or tool) and `content`, or `tool_calls`. A text with
                marks of media is given as a list of texts and media, if the template takes one; so are all texts, if
                it takes nothing else. Marks of media that it does not write stay in the texts.
            special_tokens: from `Tokenizer.special_tokens`.
            tools: the functions that the model may call, as JSON schemas.
            add_generation_prompt: end with the header of the model's reply.
            mark_answers: put GENERATION_MARKS around the text of `{% generation %}` blocks.
            variables: extra template variables, such as `enable_thinking`.

        Raises:
            UserError: if the template rejects the conversation, such as one with a system prompt.
        """
        values: dict[str, Any] = {**special_tokens, **(variables or {})}
        if mark_answers:
            values |= {"generation_begins": GENERATION_MARKS[0], "generation_ends": GENERATION_MARKS[1]}
        shown = [self._form_content(message, special_tokens) for message in messages]
        try:
            return (self._with_tools if tools else self._template).render(
                messages=shown,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **values,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise UserError(f"{self.path}: rejects this conversation ({str(error)[:200]})") from None

    def _form_content(self, message: ChatMessage, special_tokens: Mapping[str, str]) -> dict[str, Any]:
        """A message in a form that the template takes."""
        content = message.get("content")
        if not self._reads_types or not isinstance(content, str):
            return dict(message)
        if self._forms is None:
            forms: list[Any] = [PROBE, [{"type": "text", "text": PROBE}]]
            self._forms = tuple(self._takes(form, special_tokens) for form in forms)
        takes_text, takes_list = self._forms
        if not takes_list or (takes_text and not MARKS.search(content)):
            return dict(message)
        return {**message, "content": split_content(content, self._find_written_kinds(content, special_tokens))}

    def _find_written_kinds(self, content: str, special_tokens: Mapping[str, str]) -> set[str]:
        """The kinds of the media of a content that the template writes."""
        text = {"type": "text", "text": PROBE}
        kinds = {KINDS_OF_MARKS[mark] for mark in MARKS.findall(content)}
        for kind in kinds - self._written.keys():
            without, others = (self._try([*media, text], special_tokens) for media in ([], [{"type": kind}]))
            self._written[kind] = others != without
        return {kind for kind in kinds if self._written[kind]}

    def _takes(self, content: Any, special_tokens: Mapping[str, str]) -> bool:
        """Whether the template writes the text of a content, and nothing of its structure."""
        text = self._try(content, special_tokens)
        return text is not None and PROBE in text and "'type'" not in text

    def _try(self, content: Any, special_tokens: Mapping[str, str]) -> str | None:
        """The text of a conversation of this content; None if the template rejects it."""
        messages = [{"role": "user", "content": content}]
        try:
            text: str = self._template.render(messages=messages, tools=None, documents=None, **special_tokens)
        except Exception:
            return None
        return text


def split_content(content: str, kinds: Container[str]) -> list[dict[str, str]]:
    """A text with marks of media as a list of texts and media of these kinds; marks of others stay in the texts."""
    blocks: list[dict[str, str]] = []
    for part in re.split(f"({MARKS.pattern})", content):
        if (kind := KINDS_OF_MARKS.get(part, "")) in kinds:
            blocks.append({"type": kind})
        elif blocks and blocks[-1]["type"] == "text":
            blocks[-1]["text"] += part
        elif part:
            blocks.append({"type": "text", "text": part})
    return blocks or [{"type": "text", "text": ""}]


def check_variables(template: ChatTemplate, variables: Mapping[str, Any], key: str) -> None:
    """Check that a template reads the variables that are set for it, and that they are not the conversation's own.

    Args:
        key: the recipe key of the variables, for the message.

    Raises:
        UserError: naming the first one that it does not read.
    """
    known = template.variables - CONVERSATION_VARIABLES
    for name, value in variables.items():
        if name in CONVERSATION_VARIABLES:
            raise UserError(f"{key}.{name}: {value} would replace that of each conversation; leave it out")
        if name not in known:
            near = find_nearest(name, known)
            cure = f"did you mean {near}?" if near else f"leave it out; it reads {', '.join(sorted(known)) or 'none'}"
            raise UserError(f"{key}.{name}: {value} has no effect, because {template.path} does not read it; {cure}")


def find_names(jinja: Any, source: str) -> set[str]:
    """Find the names that a template reads of objects: `message.name`, `message["name"]` or `message.get("name")`."""
    from jinja2 import nodes

    tree = jinja.parse(source)
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    keys = [node.arg for node in tree.find_all(nodes.Getitem)]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr == "get":
            keys += call.args[:1]
    return names | {key.value for key in keys if isinstance(key, nodes.Const) and isinstance(key.value, str)}


def build_environment(date: datetime | None = None) -> Any:
    """Build the sandbox that templates run in, with this date, or today's."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` blocks, which mark the model's replies; they add only the marks, on request."""

        tags = {"generation"}  # noqa: RUF012, required by jinja

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            before, after = (
                nodes.Output([nodes.Name(f"generation_{side}", "load")]).set_lineno(line) for side in ("begins", "ends")
            )
            return [before, *body, after]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)  # jinja's own escapes HTML

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda form: (date or datetime.now()).strftime(form)
    return sandbox


def read_template(folder: Path, date: datetime | None = None) -> ChatTemplate | None:
    """Read the chat template in a model's folder, from its own file or tokenizer_config.json; None without one.

    An architecture that is published without one may have its own in `chat_templates.yaml`.

    Args:
        date: the current date for the template; None for today.

    Raises:
        UserError: if a file is damaged or is not a template.
    """
    opening, path = read_opening(folder), folder / TEMPLATE_FILES[0]
    if path.is_file():
        tool_use = folder / ADDITIONAL_TEMPLATES / "tool_use.jinja"
        with_tools = opening + read_utf8(tool_use) if tool_use.is_file() else None
        return ChatTemplate(opening + read_utf8(path), path, with_tools=with_tools, date=date)
    for path in (folder / name for name in TEMPLATE_FILES[1:]):
        template = read_json_object(path).get("chat_template")
        if template is None:
            continue
        templates = {"default": template}
        if isinstance(template, list):  # several, by name
            templates = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        source, with_tools = templates.get("default"), templates.get("tool_use")
        if not isinstance(source, str) or not isinstance(with_tools, str | None):
            raise UserError(f"{path}: chat_template is {type(template).__name__} without a default template")
        with_tools = None if with_tools is None else opening + with_tools
        return ChatTemplate(opening + source, path, with_tools=with_tools, date=date)
    path = folder / "config.json"
    source = load_family_file("chat_templates.yaml").get(str(read_json_object(path).get("model_type")))
    return None if source is None else ChatTemplate(source, path, date=date)


def read_opening(folder: Path) -> str:
    """The jinja of what the published processor of a folder writes before the text of its template; empty for none."""
    kind = str(read_json_object(folder / "config.json").get("model_type"))
    parts = load_family_file("chat_openings.yaml").get(kind, [])
    settings = read_json_object(folder / "processor_config.json") if parts else {}
    return "".join(part["text"] for part in parts if part.get("when", {}).items() <= settings.items())


@cache
def load_family_file(name: str) -> dict[str, Any]:
    """Load what is beside the templates of folders, by model type."""
    entries: dict[str, Any] = yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return entries


def find_turn_ends(
    template: ChatTemplate, tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None
) -> list[int]:
    """Find the token that the template writes after an answer; empty if it writes none, or rejects a conversation."""
    if tokenizer.backend != "huggingface":
        return []
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    try:
        special = tokenizer.special_tokens()
        text = template.render(messages, special, add_generation_prompt=False, variables=variables)
    except UserError:
        return []
    after = text.rpartition(ANSWER)[2].lstrip()
    added = sorted(tokenizer.processor.get_added_tokens_decoder().items(), key=lambda item: -len(item[1].content))
    return [number for number, token in added if token.content and after.startswith(token.content)][:1]
