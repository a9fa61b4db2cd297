"""Generate the answers of a chat."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.infer.chat.history import ChatHistory
from litgpt.infer.engine import Engine
from litgpt.infer.generate import TextStream
from litgpt.infer.prompt_images import Prompt
from litgpt.infer.requests import Request
from litgpt.infer.text_settings import TextSettings
from litgpt.model.gpt import GPT

CACHED_CONTEXTS = 4  # of the last prompt and this one, and of the blocks that they have outgrown


@dataclass
class Answer:
    """An answer, and what it took.

    Attributes:
        prompt_tokens, tokens: the number of tokens of the prompt, and of the answer with its stop token.
        end: `stop` if the model ended it, `max_new_tokens`, `context` if the model's context is full, `interrupt`.
    """

    prompt_tokens: int
    text: str = ""
    tokens: int = 0
    end: Literal["", "stop", "max_new_tokens", "context", "interrupt"] = ""


class ChatModel:
    """A model that answers messages; keys and values of the earlier ones stay in its engine's cache.

    Attributes:
        history: of the messages and answers.
        context: the maximum number of tokens of a prompt and its answer.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        history: ChatHistory,
        settings: TextSettings,
        *,
        compile: bool = False,
    ) -> None:
        self.history, self.context = history, model.config.block_size
        self._tokenizer, self._settings = tokenizer, settings
        self._engine = Engine(model, max_sequences=1, cache_tokens=CACHED_CONTEXTS * self.context, compile=compile)

    def build_request(self, message: str) -> Request:
        """The request of the answer to a message, as long as the context permits.

        Raises:
            UserError: if the message is not UTF-8, the format rejects the chat, or it exceeds the context.
        """
        prompt = self.history.encode(message)
        self._check_length(prompt)
        request = self._settings.build_request(prompt, None)
        return replace(request, max_new_tokens=min(request.max_new_tokens, self.context - len(prompt.ids)))

    def answer(
        self, message: str, request: Request, *, on_text: Callable[[str], object], is_stopped: Callable[[], bool]
    ) -> Answer:
        """Answer a message, and add both to the history unless the answer is empty.

        Args:
            request: from `build_request`.
            on_text: called with each piece of the answer.
            is_stopped: ends the answer, of which the pieces so far are kept; called between forward passes.

        Raises:
            UserError: if logits are not finite, or the constraint cannot be followed; the history is as before.
        """
        prompt = request.prompt
        stream = TextStream(self._tokenizer, prompt if self._settings.continues else (), self._settings.stops)
        answer = Answer(len(prompt))
        sequence = self._engine.submit(request)
        try:
            while not answer.end and sequence.error is None:
                if is_stopped():
                    answer.end = "interrupt"
                    break
                for _, token in self._engine.step():
                    piece = stream.push(token)
                    answer.text, answer.tokens = answer.text + piece, answer.tokens + 1
                    on_text(piece)
                    if stream.has_stop or token.finish_reason == "stop":
                        answer.end = "stop"
                    elif token.finish_reason == "length":
                        is_full = len(prompt) + answer.tokens == self.context
                        answer.end = "context" if is_full else "max_new_tokens"
        finally:
            self._engine.cancel(sequence)
        if sequence.error is not None:
            raise sequence.error
        if answer.text:
            self.history.add(message, answer.text)
        return answer

    def _check_length(self, prompt: Prompt) -> None:
        if len(prompt.ids) >= self.context:
            has_turns = self.history.keeps_turns and self.history.exchanges
            what = "the conversation with this message has" if has_turns else "this message has"
            cure = "write less, or begin again with /reset" if has_turns else "write less"
            raise UserError(f"{what} {len(prompt.ids):,} tokens, but the model's context is {self.context:,}; {cure}")
