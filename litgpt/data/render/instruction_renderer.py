"""Render conversations by a prompt style: an instruction, its answer, and the eos token."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.message import list_fields
from litgpt.data.render.example import Example, Renderer
from litgpt.data.render.prompt_styles import PromptStyle
from litgpt.data.tokenizer import Tokenizer


class InstructionRenderer(Renderer):
    """Renders an instruction by a prompt style, followed by its answer.

    A style is plain text, and inference tokenizes the prompt alone. So the prompt is tokenized separately here too,
    then the answer with the eos token; the turns of a conversation are concatenated.

    Args:
        tokenizer: the model's tokenizer.
        style: writes the prompt.
        mask_prompt: train the answers only.
    """

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle, *, mask_prompt: bool = False) -> None:
        self.tokenizer, self.style, self.mask_prompt = tokenizer, style, mask_prompt

    def fingerprint_parts(self) -> list[Any]:
        """Everything that the samples depend on besides the conversations, as JSON values."""
        prompts = [self.style.apply("a", sys_prompt=system, input=text) for system in (None, "b") for text in ("", "c")]
        return [self.tokenizer.fingerprint(), type(self.style).__name__, prompts, self.mask_prompt]

    def build_examples(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Tokenize each conversation, in parallel; a BadRow for one that cannot be rendered."""
        rendered = [self.try_render(conversation) for conversation in conversations]
        texts = [text for turns in rendered if not isinstance(turns, BadRow) for turn in turns for text in turn[:2]]
        encoded = iter(self.tokenizer.encode_batch(texts))
        return [
            turns
            if isinstance(turns, BadRow)
            else self._build_example([(next(encoded), next(encoded), weight) for *_, weight in turns], conversation)
            for turns, conversation in zip(rendered, conversations, strict=True)
        ]

    def list_unread(self, conversation: Conversation) -> list[str]:
        """List the names of all fields: a prompt style writes only texts."""
        return list_fields(conversation.messages)

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Tokens of the first prompt; empty for plain text."""
        prompt = self.render(conversation)[0][0]
        return self.tokenizer.encode(prompt).tolist() if prompt else []

    def render(self, conversation: Conversation) -> list[tuple[str, str, float]]:
        """Render each turn as prompt, answer and loss weight of the answer.

        Raises:
            BadRow: for tools, and for messages that do not alternate between question and answer.
        """
        messages = conversation.messages
        if conversation.media:
            kind = conversation.media[0].kind
            raise BadRow(f"{kind}s are not supported with a prompt style", "use the model's chat template")
        if conversation.tools or any(message.role in ("tool_call", "tool") for message in messages):
            raise BadRow("tools are not supported with a prompt style", "use the model's chat template")
        if conversation.is_text:
            return [("", messages[0].content, messages[0].weight)]
        if [message.role for message in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise BadRow("question and answer do not alternate", ", ".join(message.role for message in messages)[:80])
        turns = []
        for index, (question, answer) in enumerate(zip(messages[::2], messages[1::2], strict=True)):
            system = conversation.system if index == 0 else None
            prompt = self.style.apply(question.content, sys_prompt=system, input=question.context)
            turns.append((prompt, answer.content, answer.weight * (answer.loss is not False)))
        return turns

    def _build_example(self, turns: list[tuple[np.ndarray, np.ndarray, float]], conversation: Conversation) -> Example:
        ids, weights = list[np.ndarray](), list[np.ndarray]()
        has_eos = self.tokenizer.eos_id is not None
        for index, (prompt, answer, weight) in enumerate(turns):
            prompt = self.tokenizer.frame(prompt, bos=None if index == 0 else False) if len(prompt) else prompt
            answer = self.tokenizer.frame(answer, bos=None if conversation.is_text else False, eos=has_eos)
            ids += [prompt, answer]
            weights += [
                np.full(len(prompt), not self.mask_prompt, np.float32),
                np.full(len(answer), weight, np.float32),
            ]
        scale = np.float32(conversation.weight)
        return Example(np.concatenate(ids), np.concatenate(weights) * scale, conversation.channel)
