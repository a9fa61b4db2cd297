"""Conversations written by a prompt style: an instruction, its answer, and the token that ends a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.render.labels import Example
from litgpt.data.render.prompt_styles import PromptStyle
from litgpt.data.tokenizer import Tokenizer


class InstructionRenderer:
    """Writes an instruction by a prompt style, and its answer behind it.

    A style is plain text, and inference tokenizes the prompt alone. So the prompt is tokenized by itself here too, and
    the answer after it, with the token that ends a text; several turns follow one another in this way.

    Args:
        tokenizer: of the model.
        style: writes the prompt; the row's `input` goes to it as such.
        mask_prompt: train the answers only.
    """

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle, *, mask_prompt: bool = False) -> None:
        self.tokenizer, self.style, self.mask_prompt = tokenizer, style, mask_prompt

    @property
    def weighs(self) -> bool:
        """It gives no part of an answer a weight of its own."""
        return False

    def fingerprint_parts(self) -> list[Any]:
        """All that decides what becomes of a conversation."""
        written = [self.style.apply("a", sys_prompt=system, input=more) for system in (None, "b") for more in ("", "c")]
        return [self.tokenizer.fingerprint(), type(self.style).__name__, written, self.mask_prompt]

    def examples(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Each conversation as tokens, or what is wrong with it; the texts are tokenized in parallel."""
        written = [self._try_render(conversation) for conversation in conversations]
        texts = [text for one in written if not isinstance(one, BadRow) for pair in one for text in pair[:2]]
        encoded = iter(self.tokenizer.encode_batch(texts))
        return [
            one
            if isinstance(one, BadRow)
            else self._example([(next(encoded), next(encoded), weight) for *_, weight in one], conversation)
            for one, conversation in zip(written, conversations, strict=True)
        ]

    def question(self, conversation: Conversation) -> list[int]:
        """The tokens of the first prompt; none of a text without one."""
        prompt = self.write(conversation)[0][0]
        return self.tokenizer.encode(prompt).tolist() if prompt else []

    def _try_render(self, conversation: Conversation) -> list[tuple[str, str, float]] | BadRow:
        try:
            return self.write(conversation)
        except BadRow as fault:
            return fault

    def write(self, conversation: Conversation) -> list[tuple[str, str, float]]:
        """The prompt, the answer and its weight, turn by turn.

        Raises:
            BadRow: for tools, and for messages that are not question and answer in turn.
        """
        messages = conversation.messages
        if conversation.tools or any(message.role in ("tool_call", "tool") for message in messages):
            raise BadRow("tools in a prompt style", "which cannot write them; use the model's chat template")
        if conversation.is_text:
            return [("", messages[0].content, messages[0].weight)]
        if [message.role for message in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise BadRow("not question and answer in turn", ", ".join(message.role for message in messages)[:80])
        turns = []
        for place, (question, answer) in enumerate(zip(messages[::2], messages[1::2], strict=True)):
            system = conversation.system if place == 0 else None
            prompt = self.style.apply(question.content, sys_prompt=system, input=question.context)
            turns.append((prompt, answer.content, answer.weight * (answer.loss is not False)))
        return turns

    def _example(self, turns: list[tuple[np.ndarray, np.ndarray, float]], conversation: Conversation) -> Example:
        ids, weights = list[np.ndarray](), list[np.ndarray]()
        ends = self.tokenizer.eos_id is not None
        for place, (prompt, answer, weight) in enumerate(turns):
            prompt = self.tokenizer.frame(prompt, bos=None if place == 0 else False) if len(prompt) else prompt
            answer = self.tokenizer.frame(answer, bos=None if conversation.is_text else False, eos=ends)
            ids += [prompt, answer]
            weights += [
                np.full(len(prompt), not self.mask_prompt, np.float32),
                np.full(len(answer), weight, np.float32),
            ]
        scale = np.float32(conversation.weight)
        return Example(np.concatenate(ids), np.concatenate(weights) * scale, conversation.channel)
