"""Prompts without text, which a model that writes images is trained on for guidance."""

from dataclasses import replace

from litgpt.data.read.conversation import Conversation
from litgpt.data.read.media import MEDIA_KINDS


def empty_prompt(conversation: Conversation) -> Conversation | None:
    """A conversation without the text of its question, of which the media stay; None if it has no null prompt.

    It has one if it is a question and an answer with an image.
    """
    if len(conversation.messages) != 2:
        return None
    question, answer = conversation.messages
    if question.role != "user" or answer.role != "assistant" or not answer.media:
        return None
    bare = replace(question, content="".join(MEDIA_KINDS[medium.kind].mark for medium in question.media), context="")
    return replace(conversation, messages=(bare, answer))
