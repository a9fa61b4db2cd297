"""Render preferences: the two answers that a sample is scored by, each with its prompt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.preference import Preference
from litgpt.data.render.example import Example, Renderer, join_answers


class PreferenceRenderer(Renderer):
    """Renders both conversations of a preference by a renderer of conversations.

    The second answer of a rated conversation is that of the next one with another prompt, after its own prompt: KTO
    estimates by it how far the policy is from the reference (Ethayarajh et al. 2024, section 4.2).
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer

    def fingerprint_parts(self) -> list[Any]:
        """Everything that the samples depend on besides the conversations, as JSON values."""
        return ["two answers", *self.renderer.fingerprint_parts()]

    def render(self, conversation: Conversation) -> Any:
        """Render the first conversation of a preference."""
        return self.renderer.render(conversation)

    def list_unread(self, conversation: Conversation) -> list[str]:
        """List the fields of messages and calls of both conversations that the samples do not depend on."""
        other = conversation.rejected if isinstance(conversation, Preference) else None
        sides = [conversation] if other is None else [conversation, other]
        return list(dict.fromkeys(name for side in sides for name in self.renderer.list_unread(side)))

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Tokens of the prompt of the first answer."""
        return self.renderer.encode_prompt(conversation)

    def build_examples(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Tokenize both answers of each preference; a BadRow if one cannot be rendered, or has no trained token."""
        preferences = [item for item in conversations if isinstance(item, Preference)]
        others = [
            item.rejected if item.rejected is not None else borrow_answer(preferences, index)
            for index, item in enumerate(preferences)
        ]
        built = self.renderer.build_examples([*preferences, *others])
        return [
            join_sides(item, first, second)
            for item, first, second in zip(
                preferences, built[: len(preferences)], built[len(preferences) :], strict=True
            )
        ]


def borrow_answer(preferences: Sequence[Preference], index: int) -> Conversation:
    """The conversation of a rated answer, with the answer of the next conversation that has another prompt.

    If there is none, the answer stays.
    """
    rated = preferences[index]
    for step in range(1, len(preferences)):
        other = preferences[(index + step) % len(preferences)]
        if other.messages[:-1] != rated.messages[:-1] and other.messages[-1].role == rated.messages[-1].role:
            return replace(rated, messages=(*rated.messages[:-1], other.messages[-1]))
    return rated


def join_sides(preference: Preference, first: Example | BadRow, second: Example | BadRow) -> Example | BadRow:
    """Join the samples of both answers to one; a BadRow if one is faulty, has no trained token or equals the other."""
    if isinstance(first, BadRow) or isinstance(second, BadRow):
        return first if isinstance(first, BadRow) else second
    if preference.rejected is not None and np.array_equal(first.ids, second.ids):
        return BadRow("identical answers", "as tokens")
    if preference.is_text:
        first, second = mask_common_start(first, second)
    joined = join_answers(first, second, value=preference.value)
    return joined if joined.has_targets else BadRow("answer without trained tokens")


def mask_common_start(first: Example, second: Example) -> tuple[Example, Example]:
    """Do not train the tokens that two texts have in common at their start, which are their prompt."""
    size = min(len(first.ids), len(second.ids))
    common = int(np.argmax(np.append(first.ids[:size] != second.ids[:size], True)))
    masked = [
        replace(side, weights=np.where(np.arange(len(side.ids)) < common, 0, side.weights).astype(np.float32))
        for side in (first, second)
    ]
    return masked[0], masked[1]
