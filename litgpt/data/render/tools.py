"""Write tools and calls as plain text, for models whose chat template does not support them, in four formats.

hermes: schemas in <tools>, calls in <tool_call>, results in <tool_response> of a user's turn.
json: schemas as a JSON list, calls as a JSON list on one line, results as JSON of a user's turn.
qwen: the words of Qwen 2's agents; calls, results and the answer to them are one turn.
react: a list of tools and the words Thought, Action, Action Input and Observation (Yao et al. 2022).
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow, dump_json
from litgpt.data.read.message import Message, list_fields
from litgpt.data.render.loss_weights import WeightRule

ToolFormat = Literal["hermes", "json", "qwen", "react"]

TOOL_PROMPTS = {
    "hermes": (
        "You can call functions. Their schemas are listed between <tools> and </tools>, one a line:\n<tools>\n{tools}\n"
        "</tools>\nTo call one, write its name and arguments as a JSON object:\n<tool_call>\n"
        '{{"name": "...", "arguments": {{...}}}}\n</tool_call>'
    ),
    "json": (
        "You can call these functions:\n{tools}\nTo call some of them, end your answer with a line that begins with "
        '"CALLS: " and goes on with a JSON list of objects with "name" and "arguments".'
    ),
    "qwen": (
        "You can use these tools:\n{tools}\nTo use one, write these lines, as often as you need them:\n"
        "✿FUNCTION✿: one of {names}\n✿ARGS✿: the tool's arguments as a JSON object\n✿RESULT✿: what the tool gave back\n"
        "When you know the answer, write:\n✿RETURN✿: the answer"
    ),
    "react": (
        "You can use these tools:\n{tools}\nAnswer in these steps, as often as you need them:\nThought: what to do next"
        "\nAction: one of {names}\nAction Input: the tool's arguments as a JSON object\nObservation: what the tool "
        "gave back\nWhen you know the answer, write:\nThought: why you are done\nFinal Answer: the answer"
    ),
}
FORMAT_WORDS = {"qwen": ("✿FUNCTION✿", "✿ARGS✿", "✿RESULT✿"), "react": ("Action", "Action Input", "Observation")}
"""The words before the name of a call, its arguments, and a result."""
RETURN = "✿RETURN✿"
RESULT_MASKS = {
    "qwen": tuple(
        WeightRule(1.0, keyword=f"{word}:", following_weight=0.0 if word == "✿RESULT✿" else 1.0)
        for word in ("✿FUNCTION✿", "✿RESULT✿", RETURN)
    )
}
"""Loss weights that exclude results which are part of an answer."""


def write_tools_as_text(conversation: Conversation, tool_format: ToolFormat) -> Conversation:
    """Convert a conversation to one without tools: schemas in the system message, calls in answers, results in turns.

    Results are never trained; calls are trained like the answer that they are part of.
    """
    if not conversation.tools and not any(message.role in ("tool_call", "tool") for message in conversation.messages):
        return conversation
    system = conversation.system
    if conversation.tools:
        prompt = TOOL_PROMPTS[tool_format].format(**list_tools(conversation.tools, tool_format))
        system = f"{system}\n\n{prompt}" if system else prompt
    messages = tuple(_write_messages(conversation.messages, tool_format))
    kept = list_fields(messages)
    lost = [name for name in list_fields(conversation.messages) if name not in kept]
    return replace(conversation, messages=messages, system=system, tools=None, unread=(*conversation.unread, *lost))


def list_tools(tools: str, tool_format: ToolFormat) -> dict[str, str]:
    """List the schemas of tools in the given format, and their names."""
    functions = [tool.get("function", tool) for tool in json.loads(tools)]
    names = ", ".join(function["name"] for function in functions)
    if tool_format == "json":
        return {"tools": dump_json(functions), "names": names}
    if tool_format == "hermes":
        return {"tools": "\n".join(map(dump_json, functions)), "names": names}
    lines = [
        f"{function['name']}: {function.get('description', '')} Arguments: {dump_json(function.get('parameters', {}))}"
        for function in functions
    ]
    return {"tools": "\n".join(lines), "names": names}


def _write_messages(messages: Iterable[Message], tool_format: ToolFormat) -> Iterator[Message]:
    """Merge an answer and its calls into one answer, and consecutive results into one turn or the answer."""
    result = "answer" if tool_format in RESULT_MASKS else "result"
    kinds = {"assistant": "answer", "tool_call": "answer", "tool": result}
    for kind, group in itertools.groupby(messages, key=lambda message: kinds.get(message.role, message.role)):
        run = list(group)
        if kind == "answer" and any(message.role == "tool" for message in run):
            yield _merge_turn(run, tool_format)
        elif kind == "result":
            yield Message("user", write_results([message.content for message in run], tool_format))
        elif any(message.role == "tool_call" for message in run):
            text = "\n".join(message.content for message in run if message.role == "assistant")
            calls = [message.content for message in run if message.role == "tool_call"]
            content = write_calls(text, calls, tool_format)
            yield replace(run[0], role="assistant", content=content, fields=_merge_fields(run))
        else:
            yield from run


def _merge_turn(run: list[Message], tool_format: ToolFormat) -> Message:
    """Merge calls, their results and the answers to them into one answer.

    Raises:
        BadRow: if their loss settings differ, or a result contains the format's special words.
    """
    if len({(message.loss, message.weight) for message in run if message.role != "tool"}) > 1:
        raise BadRow("loss or weight differs between calls and answer", "set data.tool_format: hermes")
    parts, after_results = [], False
    for is_result, group in itertools.groupby(run, key=lambda message: message.role == "tool"):
        messages = list(group)
        if is_result:
            texts = [message.content for message in messages]
            if any("✿" in text for text in texts):
                raise BadRow("tool result contains words of the tool format", "set data.tool_format: hermes")
            parts.append(write_results(texts, tool_format))
        else:
            text = "\n".join(message.content for message in messages if message.role == "assistant")
            calls = [message.content for message in messages if message.role == "tool_call"]
            written = write_calls(text, calls, tool_format)
            parts.append(f"{RETURN}: {written}" if after_results and text else written)
        after_results = is_result
    first = next((message for message in run if message.role != "tool"), run[0])
    return replace(first, role="assistant", content="\n".join(parts), fields=_merge_fields(run))


def _merge_fields(run: Iterable[Message]) -> dict[str, Any]:
    """Merge the fields of answers, without those of calls and results, which have no place in a text."""
    answers = [message.fields for message in run if message.role == "assistant"]
    return {name: value for answer in answers for name, value in answer.items() if name != "content"}


def write_calls(text: str, calls: Iterable[str], tool_format: ToolFormat) -> str:
    """Write an answer with calls, each JSON with `name` and `arguments`."""
    if tool_format == "hermes":
        parts = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    elif tool_format == "json":
        parts = [f"CALLS: {dump_json([json.loads(call) for call in calls])}"]
    else:
        name, arguments, _ = FORMAT_WORDS[tool_format]
        parts = [
            f"{name}: {call['name']}\n{arguments}: {dump_json(call.get('arguments') or {})}"
            for call in map(json.loads, calls)
        ]
    return "\n".join([text, *parts] if text else parts)


def write_results(results: list[str], tool_format: ToolFormat) -> str:
    """Write the results of tools as a turn."""
    if tool_format == "hermes":
        return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
    if tool_format == "json":
        return f"RESULTS: {dump_json(results)}"
    return "\n".join(f"{FORMAT_WORDS[tool_format][2]}: {result}" for result in results)
