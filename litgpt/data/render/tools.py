"""Tools in plain text, for models whose chat template cannot write them: four protocols, written and read back.

hermes: schemas in <tools>, calls in <tool_call>, results in <tool_response> of a user's turn.
json: schemas as a JSON list, a call as a JSON list on a line of its own, results as JSON of a user's turn.
qwen: the words of Qwen 2's agents; calls, results and the answer to them are one turn.
react: a list of tools and the words Thought, Action, Action Input and Observation (Yao et al. 2022).
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

from litgpt.data.read.conversation import Conversation, Message
from litgpt.data.read.fields import BadRow, dump_json
from litgpt.data.render.loss_weights import WeightRule

Protocol = Literal["hermes", "json", "qwen", "react"]

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
HERMES_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
JSON_CALLS = re.compile(r"^CALLS: (\[.*\])$", re.MULTILINE)
PROTOCOL_WORDS = {"qwen": ("✿FUNCTION✿", "✿ARGS✿", "✿RESULT✿"), "react": ("Action", "Action Input", "Observation")}
"""What stands before a call's name and its arguments, and before a result."""
RETURN = "✿RETURN✿"
RESULT_MASKS = {
    "qwen": tuple(
        WeightRule(1.0, keyword=f"{word}:", following_weight=0.0 if word == "✿RESULT✿" else 1.0)
        for word in ("✿FUNCTION✿", "✿RESULT✿", RETURN)
    )
}
"""What keeps results out of the loss where they stand within an answer."""


def write_tools_as_text(conversation: Conversation, protocol: Protocol) -> Conversation:
    """The same conversation without tools: schemas in the system text, calls in answers, results in turns.

    A result is never trained; a call is, as the text that it stands with.
    """
    if not conversation.tools and not any(message.role in ("tool_call", "tool") for message in conversation.messages):
        return conversation
    system = conversation.system
    if conversation.tools:
        listed = TOOL_PROMPTS[protocol].format(**list_tools(conversation.tools, protocol))
        system = f"{system}\n\n{listed}" if system else listed
    written = list(_write_messages(conversation.messages, protocol))
    return replace(conversation, messages=tuple(written), system=system, tools=None)


def list_tools(tools: str, protocol: Protocol) -> dict[str, str]:
    """The schemas of tools as the protocol lists them, and their names."""
    functions = [tool.get("function", tool) for tool in json.loads(tools)]
    names = ", ".join(function["name"] for function in functions)
    if protocol == "json":
        return {"tools": dump_json(functions), "names": names}
    if protocol == "hermes":
        return {"tools": "\n".join(map(dump_json, functions)), "names": names}
    lines = [
        f"{one['name']}: {one.get('description', '')} Arguments: {dump_json(one.get('parameters', {}))}"
        for one in functions
    ]
    return {"tools": "\n".join(lines), "names": names}


def _write_messages(messages: Iterable[Message], protocol: Protocol) -> Iterator[Message]:
    """Runs of an answer and its calls as one answer, and runs of results as one turn or in the answer."""
    kinds = {"assistant": "answer", "tool_call": "answer", "tool": "answer" if protocol in RESULT_MASKS else "result"}
    for kind, group in itertools.groupby(messages, key=lambda message: kinds.get(message.role, message.role)):
        run = list(group)
        if kind == "answer" and any(message.role == "tool" for message in run):
            yield _merge_turn(run, protocol)
        elif kind == "result":
            yield Message("user", write_results([message.content for message in run], protocol))
        elif any(message.role == "tool_call" for message in run):
            said = "\n".join(message.content for message in run if message.role == "assistant")
            calls = [message.content for message in run if message.role == "tool_call"]
            yield replace(run[0], role="assistant", content=write_calls(said, calls, protocol))
        else:
            yield from run


def _merge_turn(run: list[Message], protocol: Protocol) -> Message:
    """Calls, their results and the answers to them as one answer.

    Raises:
        BadRow: if they are not trained alike, or a result has words of the protocol.
    """
    if len({(message.loss, message.weight) for message in run if message.role != "tool"}) > 1:
        raise BadRow("loss or weight changes between calls and answer", "set data.tool_format: hermes")
    parts, results_before = [], False
    for results, group in itertools.groupby(run, key=lambda message: message.role == "tool"):
        some = list(group)
        if results:
            texts = [message.content for message in some]
            if any("✿" in text for text in texts):
                raise BadRow("a tool's result has words of the protocol", "set data.tool_format: hermes")
            parts.append(write_results(texts, protocol))
        else:
            said = "\n".join(message.content for message in some if message.role == "assistant")
            calls = [message.content for message in some if message.role == "tool_call"]
            text = write_calls(said, calls, protocol)
            parts.append(f"{RETURN}: {text}" if results_before and said else text)
        results_before = results
    first = next((message for message in run if message.role != "tool"), run[0])
    return replace(first, role="assistant", content="\n".join(parts))


def write_calls(said: str, calls: Iterable[str], protocol: Protocol) -> str:
    """An answer with calls, each JSON with `name` and `arguments`."""
    if protocol == "hermes":
        parts = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    elif protocol == "json":
        parts = [f"CALLS: {dump_json([json.loads(call) for call in calls])}"]
    else:
        parts = [_write_action(json.loads(call), protocol) for call in calls]
    return "\n".join([*([said] if said else []), *parts])


def _write_action(call: dict[str, Any], protocol: Protocol) -> str:
    name, arguments, _ = PROTOCOL_WORDS[protocol]
    return f"{name}: {call['name']}\n{arguments}: {dump_json(call.get('arguments') or {})}"


def write_results(results: list[str], protocol: Protocol) -> str:
    """What tools gave back, as the turn that the model reads."""
    if protocol == "hermes":
        return "\n".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
    if protocol == "json":
        return f"RESULTS: {dump_json(results)}"
    return "\n".join(f"{PROTOCOL_WORDS[protocol][2]}: {result}" for result in results)


def calls_in(text: str, protocol: Protocol) -> list[dict[str, Any]]:
    """The calls in a text that a model wrote, each with `name` and `arguments`; what is no JSON is no call."""
    if protocol == "hermes":
        found = [_loaded(one) for one in HERMES_CALL.findall(text)]
    elif protocol == "json":
        found = [one for line in JSON_CALLS.findall(text) for one in _loaded(line) or []]
    else:
        name, arguments, _ = PROTOCOL_WORDS[protocol]
        pattern = rf"^{name}: (.*)\n{arguments}: (.*)$"
        pairs = [(name, _loaded(given)) for name, given in re.findall(pattern, text, re.MULTILINE)]
        found = [{"name": name, "arguments": given} for name, given in pairs if isinstance(given, dict)]
    calls = [one for one in found if isinstance(one, dict) and isinstance(one.get("name"), str)]
    return [
        {"name": one["name"], "arguments": one.get("arguments") or {}}
        for one in calls
        if isinstance(one.get("arguments") or {}, dict)
    ]


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
