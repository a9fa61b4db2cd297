"""Render preferences: the two answers that a sample is scored by, each with its prompt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.preference import Preference, list_sides
from litgpt.data.render.example import Example, Renderer, join_answers


class PreferenceRenderer(Renderer):
    """Renders both conversations of a preference by a renderer of conversations."""

    answers_per_sample = 2

    def __init__(self, renderer: Renderer) -> None:
        self.renderer, self.has_weights = renderer, renderer.has_weights

    def fingerprint_parts(self) -> list[Any]:
        """Everything that the samples depend on besides the conversations, as JSON values."""
        return ["both answers", *self.renderer.fingerprint_parts()]

    def render(self, conversation: Conversation) -> Any:
        """Render the first conversation of a preference."""
        return self.renderer.render(conversation)

    def list_unread(self, conversation: Conversation) -> list[str]:
        """List the fields of messages and calls of both conversations that the samples do not depend on."""
        return list(
            dict.fromkeys(name for side in list_sides(conversation) for name in self.renderer.list_unread(side))
        )

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Tokens of the prompt of the first answer."""
        return self.renderer.encode_prompt(conversation)

    def build_examples(self, conversations: Sequence[Conversation]) -> list[Example | BadRow]:
        """Tokenize both answers of each preference; a BadRow if one cannot be rendered, or has no trained token."""
        preferences = [item for item in conversations if isinstance(item, Preference)]
        built = iter(self.renderer.build_examples([side for item in preferences for side in list_sides(item)]))
        return [join_sides(item, next(built), next(built)) for item in preferences]


def join_sides(preference: Preference, first: Example | BadRow, second: Example | BadRow) -> Example | BadRow:
    """Join the samples of both answers to one; a BadRow if one is faulty, has no trained token or equals the other."""
    if isinstance(first, BadRow) or isinstance(second, BadRow):
        return first if isinstance(first, BadRow) else second
    first_side, *others = list_sides(preference)
    is_compared = all(other.messages != first_side.messages for other in others)
    if is_compared and np.array_equal(first.ids, second.ids):
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
