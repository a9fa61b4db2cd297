"""The text of one answer, as its tokens arrive, and the tool calls in it."""

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from litgpt.data.tokenizer import Tokenizer
from litgpt.infer.generate import StopTruncator, TextStream
from litgpt.infer.requests import GeneratedToken

TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
TOOL_MARK = "<tool_call>"
"""Before a call in the format of Hermes and Qwen models: a JSON object with `name` and `arguments`."""


class AnswerText:
    """The text of an answer up to a stop string, and before a tool call.

    Args:
        context: the tokens that it continues; none for a chat message.
        stops: strings that end it.
        has_tools: hold back the text from a tool call on, for `calls`.

    Attributes:
        finish_reason: as in OpenAI's API; None as long as it is not finished.
        calls: the tool calls, once it is finished.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stops: Sequence[str], *, has_tools: bool) -> None:
        self._stream = TextStream(tokenizer, context, stops)
        self._tools = StopTruncator([TOOL_MARK] if has_tools else [])
        self._whole, self._shown, self._sent = "", "", 0
        self.tokens: list[GeneratedToken] = []
        self.finish_reason: str | None = None
        self.calls: list[dict[str, Any]] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return self._shown

    def push(self, token: GeneratedToken) -> str:
        """The text that one more token completes."""
        self.tokens.append(token)
        text = self._stream.push(token)
        self._whole += text
        self._shown += self._tools.push(text)
        if self._stream.has_stop or token.finish_reason is not None:
            self._finish("stop" if self._stream.has_stop else str(token.finish_reason))
        piece, self._sent = self._shown[self._sent :], len(self._shown)
        return piece

    def _finish(self, reason: str) -> None:
        """End the answer: what was held back is tool calls, or text."""
        self.calls = read_tool_calls(self._whole[len(self._shown) :])
        self.finish_reason = "tool_calls" if self.calls else reason
        if not self.calls:
            self._shown = self._whole


def read_tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls in a text, in OpenAI's form; those that are not JSON objects with a name are left in the text."""
    calls = []
    for match in TOOL_CALL.finditer(text):
        try:
            call = json.loads(match.group(1))
        except json.JSONDecodeError:
            return []
        if not isinstance(call.get("name"), str):
            return []
        function = {"name": call["name"], "arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    return calls
