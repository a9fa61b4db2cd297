"""The text of one answer, as its tokens arrive, and the tool calls in it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from litgpt.data.tokenizer import Tokenizer
from litgpt.infer.generate import StopTruncator, TextStream
from litgpt.infer.requests import GeneratedToken
from litgpt.infer.server.tool_calls import CallFormat, Tools, read_required_calls, read_tool_calls


@dataclass(frozen=True)
class CallReader:
    """Reads the calls in an answer.

    Attributes:
        form: the format of the model's calls; None if it is not known.
        tools: that may be called.
        is_required: whether the answer is nothing but calls, by `build_call_schema`.
    """

    form: CallFormat | None
    tools: Tools
    is_required: bool = False

    @property
    def arguments(self) -> str:
        """The name of the arguments in the JSON object of a call."""
        return self.form.arguments if self.form else "arguments"

    def read(self, text: str) -> list[dict[str, Any]]:
        """The calls in the end of an answer, from the first one on; none if they are not as they should be."""
        if self.is_required:
            return read_required_calls(text, self.arguments)
        return read_tool_calls(text, self.form, self.tools) if self.form and text else []

    def may_begin_bare(self, text: str) -> bool:
        """Whether an answer that begins with this text may be a call that nothing marks."""
        is_bare = self.form is not None and self.form.is_bare
        return self.is_required or (is_bare and text.lstrip()[:1] in ("", "{"))


class AnswerText:
    """The text of an answer up to a stop string, and before a tool call.

    Args:
        context: the tokens that it continues; none for a chat message.
        stops: strings that end it.
        reader: of tool calls: the text from the first one on is held back for `calls`; None without tools.

    Attributes:
        finish_reason: as in OpenAI's API; None as long as it is not finished.
        calls: the tool calls, once it is finished.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int], stops: Sequence[str], reader: CallReader | None = None
    ) -> None:
        self._tokenizer, self._stops, self._reader = tokenizer, stops, reader
        self._stream = TextStream(tokenizer, context, stops)
        form = reader.form if reader else None
        self._hidden = find_hidden_tokens(tokenizer, (form.start, form.end) if form else ())
        self._tools = StopTruncator([form.start] if form else [])
        self._whole, self._shown = "", ""
        self._read = self._sent = 0
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
        text = self._decode(token)
        self._whole += text
        if self._reader is None or not self._reader.may_begin_bare(self._whole):
            self._shown += self._tools.push(self._whole[self._read :])
            self._read = len(self._whole)
        if self._stream.has_stop or token.finish_reason is not None:
            self._finish("stop" if self._stream.has_stop else str(token.finish_reason))
        piece, self._sent = self._shown[self._sent :], len(self._shown)
        return piece

    def _decode(self, token: GeneratedToken) -> str:
        """The text that one more token completes; also that of a special token of calls, which decoding leaves out."""
        mark = self._hidden.get(token.token)
        if mark is None or token.finish_reason == "stop":
            return self._stream.push(token)
        text = self._stream.push(replace(token, finish_reason="stop"))  # what the stream held back
        if self._stream.has_stop:
            return text
        self._stream = TextStream(self._tokenizer, (), self._stops)
        return text + mark

    def _finish(self, reason: str) -> None:
        """End the answer: what was held back is tool calls, or text."""
        self.calls = self._reader.read(self._whole[len(self._shown) :]) if self._reader else []
        self.finish_reason = "tool_calls" if self.calls else reason
        if not self.calls:
            self._shown = self._whole


def find_hidden_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[int, str]:
    """The special tokens among texts, which decoding leaves out, by id."""
    ids = {tokenizer.find_token(text): text for text in texts if text}
    return {number: text for number, text in ids.items() if number is not None and not tokenizer.decode([number])}
