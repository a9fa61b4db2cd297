"""Responses in the form of OpenAI's API, whole and in pieces."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from litgpt.data.token_bytes import get_token_bytes
from litgpt.data.tokenizer import Tokenizer
from litgpt.infer.requests import GeneratedToken
from litgpt.infer.server.model import Job
from litgpt.infer.server.texts import AnswerText


class ResponseWriter:
    """Writes the response, or its pieces, of one request.

    Args:
        is_chat: for a chat; False for a completion.
        name: of the model.
    """

    def __init__(self, *, is_chat: bool, name: str, tokenizer: Tokenizer, has_logprobs: bool, echo: str = "") -> None:
        self.is_chat, self.tokenizer, self.has_logprobs, self.echo = is_chat, tokenizer, has_logprobs, echo
        prefix = "chatcmpl" if is_chat else "cmpl"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def write_whole(self, job: Job) -> dict[str, Any]:
        """The response with all answers."""
        choices = []
        for index, answer in enumerate(job.answers):
            choice: dict[str, Any] = {"index": index, "finish_reason": answer.finish_reason}
            choice["logprobs"] = self._describe_logprobs(answer.tokens)
            if self.is_chat:
                content = None if answer.calls and not answer.text else answer.text
                message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
                if answer.calls:
                    message["tool_calls"] = answer.calls
                choices.append(
                    {**choice, "message": {**message, "content": message["content"] if answer.calls else answer.text}}
                )
            else:
                choices.append({**choice, "text": self.echo + answer.text})
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": count_usage(job)}

    def write_piece(
        self, index: int, answer: AnswerText, text: str, tokens: Sequence[GeneratedToken]
    ) -> dict[str, Any]:
        """One piece of an answer; the last one has its tool calls and the reason."""
        choice: dict[str, Any] = {"index": index, "finish_reason": answer.finish_reason}
        choice["logprobs"] = self._describe_logprobs(tokens)
        if self.is_chat:
            choice["delta"] = {"content": text} if text else {}
            if answer.calls:
                choice["delta"]["tool_calls"] = [{"index": n, **call} for n, call in enumerate(answer.calls)]
        else:
            choice["text"] = text
        return self._write_chunk([choice])

    def write_first(self, index: int) -> dict[str, Any]:
        """The first piece of a choice: the role in a chat, the prompt of an echoed completion."""
        start: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}} if self.is_chat else {"text": self.echo}
        return self._write_chunk([{"index": index, "finish_reason": None, "logprobs": None, **start}])

    def write_usage(self, job: Job) -> dict[str, Any]:
        """The piece with the numbers of tokens, after all others."""
        return {**self._write_chunk([]), "usage": count_usage(job)}

    def _write_chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}

    def _describe_logprobs(self, tokens: Sequence[GeneratedToken]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        if self.is_chat:
            content = [{**self._describe(t.token, t.logprob), "top_logprobs": self._describe_top(t)} for t in tokens]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self.tokenizer.decode([token.token]) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.tokenizer.decode([t]): value for t, value in token.top} for token in tokens],
        }

    def _describe(self, token: int, logprob: float | None) -> dict[str, Any]:
        content = list(get_token_bytes(self.tokenizer, token))
        return {"token": self.tokenizer.decode([token]), "logprob": logprob, "bytes": content}

    def _describe_top(self, token: GeneratedToken) -> list[dict[str, Any]]:
        return [self._describe(other, logprob) for other, logprob in token.top]


def count_usage(job: Job) -> dict[str, int]:
    """The numbers of tokens of a request: each prompt once, and all answers."""
    prompts = sum(len(prompt) for prompt in {id(r.prompt): r.prompt for r in job.requests}.values())
    answers = sum(len(answer.tokens) for answer in job.answers)
    return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}
