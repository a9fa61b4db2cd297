"""The messages of a chat, and the prompts that they make."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from litgpt.data.render.chat_template import ChatMessage
from litgpt.infer.marked_messages import build_content
from litgpt.infer.prompt_images import Prompt
from litgpt.infer.prompts import PromptEncoder

ChatMedia = Mapping[str, tuple[str, ...]]
"""The paths of the media of a message, by kind."""
NO_FILES: ChatMedia = MappingProxyType({})


class ChatExchange(NamedTuple):
    """A message of the user and the answer to it, under the system message of that time.

    Attributes:
        media: of the message.
    """

    system: str | None
    message: str
    answer: str
    media: ChatMedia = NO_FILES


class ChatHistory:
    """What was said in a chat.

    Attributes:
        system: the system message, or None.
        exchanges: since the chat began.
        media: of the next message.
        keeps_turns: whether a prompt has the earlier exchanges; otherwise each message is answered on its own.
    """

    def __init__(self, encoder: PromptEncoder, chat_template: bool | None, system: str | None = None) -> None:
        self._encoder, self._chat_template, self.system = encoder, chat_template, system
        self.exchanges: list[ChatExchange] = []
        self.media: ChatMedia = NO_FILES
        self.keeps_turns = renders_turns(encoder, chat_template)

    def encode(self, message: str) -> Prompt:
        """The prompt whose continuation is the answer to a message.

        Raises:
            UserError: if the message is not UTF-8, the format rejects the chat, or a file cannot be read.
        """
        if not self.keeps_turns:
            return self._encoder.encode(message, self.system, self._chat_template, sources=self.media)
        content = build_content(message, self.media)
        return self._encoder.encode_messages([*self._list_messages(), {"role": "user", "content": content}])

    def add_medium(self, kind: str, path: str) -> None:
        """Add an image, a video or a sound to the next message.

        Raises:
            UserError: if the model reads none, or not this one; it is not added.
        """
        self._encoder.encode("", None, False, sources={kind: [path]})
        self.media = {**self.media, kind: (*self.media.get(kind, ()), path)}

    def remove_media(self, kind: str) -> None:
        """Remove what was added of a kind to the next message."""
        self.media = {other: paths for other, paths in self.media.items() if other != kind}

    def set_system(self, system: str | None) -> None:
        """Replace the system message, also of earlier exchanges if prompts have them.

        Raises:
            UserError: if the format has none; the earlier one stays.
        """
        earlier, self.system = self.system, system
        try:
            self.encode("?")
        except BaseException:
            self.system = earlier
            raise

    def add(self, message: str, answer: str) -> None:
        """Add an exchange, with the media of the message."""
        self.exchanges.append(ChatExchange(self.system, message, answer, self.media))
        self.media = NO_FILES

    def list_rows(self) -> list[dict[str, list[ChatMessage]]]:
        """The chat as rows of the data module `Conversations`: one for each message if they are on their own."""
        if self.keeps_turns:
            return [{"messages": self._list_messages()}] if self.exchanges else []
        return [{"messages": [*list_system_messages(e.system), *list_exchange_messages(e)]} for e in self.exchanges]

    def _list_messages(self) -> list[ChatMessage]:
        turns = [message for exchange in self.exchanges for message in list_exchange_messages(exchange)]
        return [*list_system_messages(self.system), *turns]


def list_system_messages(system: str | None) -> list[ChatMessage]:
    """The system message as a list; empty for none."""
    return [] if system is None else [{"role": "system", "content": system}]


def list_exchange_messages(exchange: ChatExchange) -> list[ChatMessage]:
    """The two messages of an exchange."""
    content = build_content(exchange.message, exchange.media)
    return [{"role": "user", "content": content}, {"role": "assistant", "content": exchange.answer}]


def renders_turns(encoder: PromptEncoder, chat_template: bool | None) -> bool:
    """Whether a chat template renders the chat: that of the folder, if it has the same text as its prompt style."""
    if encoder.chat is None or not encoder.has_format(chat_template):
        return False
    return encoder.encode("?", None, chat_template) == encoder.encode_messages([{"role": "user", "content": "?"}])
