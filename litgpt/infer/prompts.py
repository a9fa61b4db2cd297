"""Encode a prompt for a model, as plain text or in the format that the model was trained with."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from litgpt.data.media.reader import build_media_reader
from litgpt.data.read.conversation import Conversation
from litgpt.data.read.fields import BadRow
from litgpt.data.read.media import MARKS, Medium
from litgpt.data.read.message import Message
from litgpt.data.read.row_media import MediaSources, MediaStep
from litgpt.data.render.chat_template import ChatTemplate, find_turn_ends
from litgpt.data.render.code_places import CodePlacer
from litgpt.data.render.feature_places import FeaturePlacer
from litgpt.data.render.placers import build_feature_placer, open_placer
from litgpt.data.render.prompt_styles import PromptStyle, has_prompt_style, load_prompt_style
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import find_surrogate
from litgpt.infer.marked_messages import list_given_by_prompt, mark_media, name_kinds
from litgpt.infer.prompt_images import Prompt
from litgpt.messages import print_message
from litgpt.model.config import Config

TOWERS_OF_KINDS = {"image": ("vision", "sees"), "video": ("vision", "sees"), "audio": ("audio", "hears")}
"""The tower that reads media of a kind, and what a model with one does."""
NO_MEDIA: MediaSources = MappingProxyType({})
MediaWriter = FeaturePlacer | CodePlacer
"""What writes the places or codes of media."""


@dataclass(frozen=True)
class PromptEncoder:
    """The formats of a model's prompts.

    Attributes:
        chat: the chat template in its folder, or None.
        style: the prompt style that its folder names, or None; it takes precedence, because the last training used it.
        open_placer: opens what writes the places or codes of images; returns None for a model that reads none.
        media_steps: change messages when their media have files, such as long sounds into pieces.
        variables: extra variables of the chat template.
    """

    tokenizer: Tokenizer
    chat: ChatTemplate | None
    style: PromptStyle | None
    open_placer: Callable[[], MediaWriter | None] = lambda: None
    media_steps: Sequence[MediaStep] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)

    def has_format(self, chat_template: bool | None) -> bool:
        """Whether the prompt is a user's message and the text a reply; otherwise the text continues the prompt.

        Args:
            chat_template: False for the prompt as it is; True for the folder's template; None for the folder's format.

        Raises:
            UserError: if a chat template is requested and the folder has none.
        """
        if chat_template and self.chat is None:
            raise UserError(f"chat_template: true, but {self.tokenizer.folder} has none; set false or null")
        if chat_template is None and self.style is not None:
            return self._has_style(chat_template)
        return chat_template is not False and self.chat is not None

    def _has_style(self, chat_template: bool | None) -> bool:
        return chat_template is None and self.style is not None and self.style.apply("x") != "x"

    def encode(
        self,
        prompt: str,
        sys_prompt: str | None,
        chat_template: bool | None,
        *,
        sources: MediaSources = NO_MEDIA,
        folder: Path | None = None,
    ) -> Prompt:
        """Encode a prompt.

        Args:
            sources: of media by kind, as in the rows of training: for the tags, such as `<image>`, in the prompt, or
                before it.
            folder: that their paths are relative to and may not leave; None for any paths.

        Raises:
            UserError: if a text is not UTF-8, the format has no system prompt, or the template rejects the prompt; or
                if the model does not read these media, or one cannot be read.
        """
        for key, text in (("prompt", prompt), ("sys_prompt", sys_prompt or "")):
            if (position := find_surrogate(text)) is not None:
                raise UserError(f"{key}: {text[:40]!r} is not UTF-8 at character {position + 1}; give it in UTF-8")
        system = [] if sys_prompt is None else [{"role": "system", "content": sys_prompt}]
        marked, media = mark_media([*system, {"role": "user", "content": prompt}], sources, folder, self.media_steps)
        placer = self.open_placer() if media else None
        *_, message = self._write_around_media(marked, media, placer)
        prompt = message["content"]
        if not self.has_format(chat_template):
            if sys_prompt is not None:
                raise unsupported_system_prompt(sys_prompt, f"{self.tokenizer.folder} without a chat template")
            return self._tokenize(prompt, media, placer)
        if self._has_style(chat_template):
            assert self.style is not None
            text = self.style.apply(prompt, sys_prompt=sys_prompt)
            if sys_prompt and text == self.style.apply(prompt):
                raise unsupported_system_prompt(sys_prompt, f"the prompt style {type(self.style).__name__}")
            return self._tokenize(text, media, placer)
        assert self.chat is not None
        return self._encode_marked([*system, message], media, placer)

    def encode_list(
        self,
        prompts: Sequence[str],
        sys_prompt: str | None,
        chat_template: bool | None,
        media: Mapping[str, Any],
    ) -> list[Prompt]:
        """Encode several prompts, each with its media; as `encode`.

        Args:
            media: as `list_given_by_prompt` takes them.
        """
        lists = list_given_by_prompt(media, len(prompts))
        return [
            self.encode(prompt, sys_prompt, chat_template, sources=sources)
            for prompt, sources in zip(prompts, lists, strict=True)
        ]

    def encode_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        sources: MediaSources = NO_MEDIA,
        folder: Path | None = None,
    ) -> Prompt:
        """Encode a chat, with the header of the model's next message.

        Args:
            messages: media are blocks of their contents, or tags, such as `<image>`, for `sources`.
            tools: the functions that the model may call, as JSON schemas.
            sources, folder: as in `encode`.

        Raises:
            UserError: if there is no chat template, or it rejects the chat; or if the model does not read these
                media, or one cannot be read.
        """
        marked, media = mark_media(messages, sources, folder, self.media_steps)
        placer = self.open_placer() if media else None
        return self._encode_marked(self._write_around_media(marked, media, placer), media, placer, tools)

    def _write_around_media(
        self, messages: Sequence[Mapping[str, Any]], media: Sequence[Medium], placer: MediaWriter | None
    ) -> Sequence[Mapping[str, Any]]:
        """The messages with the texts that the model has around media."""
        if placer is None:
            return messages
        rest, written = iter(media), []
        for message in messages:
            content = message.get("content")
            if isinstance(content, str):
                of_message = tuple(itertools.islice(rest, len(MARKS.findall(content))))
                try:
                    marked = placer.write_marks(Conversation((Message("user", content, media=of_message),)))
                except BadRow as error:
                    raise UserError(f"{name_kinds(medium.kind for medium in media)}: {error}") from None
                message = {**message, "content": marked.messages[0].content}
            written.append(message)
        return written

    def _encode_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        media: Sequence[Medium],
        placer: MediaWriter | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        if self.chat is None:
            raise UserError(f"messages: {self.tokenizer.folder} has no chat template; give a prompt instead")
        special = self.tokenizer.special_tokens()
        text = self.chat.render(messages, special, tools=tools, variables=self.variables)
        return self._tokenize(text, media, placer, bos=False)

    def _tokenize(
        self, text: str, media: Sequence[Medium], placer: MediaWriter | None, *, bos: bool | None = None
    ) -> Prompt:
        """The tokens of a text with marks of media."""
        if not media:
            return Prompt(tuple(self.tokenizer.encode(text, bos=bos).tolist()))
        if placer is None:
            kind, (tower, verb) = media[0].kind, TOWERS_OF_KINDS[media[0].kind]
            raise UserError(f"{kind}: the model has no {tower} tower; leave it out, or use a model that {verb}")
        tokens = self.tokenizer.encode(placer.write_places(text), bos=bos).numpy()
        try:
            conversation = Conversation((Message("user", "", media=tuple(media)),))
            example = placer.write_images(tokens, np.zeros(len(tokens), np.float32), conversation)
        except BadRow as error:
            raise UserError(f"{name_kinds(medium.kind for medium in media)}: {error}") from None
        ids, reader = tuple(example.ids.tolist()), placer.media_reader
        return Prompt(ids) if reader is None else Prompt(ids, example.media, reader)

    def get_stops(self, chat_template: bool | None) -> tuple[list[int], list[str]]:
        """The stop tokens, and the stop strings."""
        sequences = [[token] for token in self.tokenizer.stop_ids]
        if self._has_style(chat_template):
            assert self.style is not None
            sequences += [list(sequence) for sequence in self.style.stop_tokens(self.tokenizer) if sequence]
        elif self.has_format(chat_template):
            assert self.chat is not None
            sequences += [[token] for token in find_turn_ends(self.chat, self.tokenizer)]
        texts = [self.tokenizer.decode(sequence) for sequence in sequences if len(sequence) > 1]
        return [sequence[0] for sequence in sequences if len(sequence) == 1], [text for text in texts if text]


def open_prompt_placer(
    tokenizer: Tokenizer, config: Config, *, max_video_pixels: int | None = None
) -> MediaWriter | None:
    """What writes the places or codes of a model's media; None for a model that reads none.

    Args:
        max_video_pixels: as of `MediaReader`.

    Raises:
        UserError: if the folder of the tokenizer has no settings of a processor, or they are not supported; or if its
            codec is damaged.
    """
    reader = build_media_reader(tokenizer.folder, config, max_video_pixels=max_video_pixels)
    return open_placer(tokenizer, None) if reader is None else build_feature_placer(reader, tokenizer)


def find_prompt_style(folder: Path, chat: ChatTemplate | None) -> PromptStyle | None:
    """The prompt style of a folder; None without one, or if only its chat template can be used, which is printed.

    Raises:
        UserError: if the style cannot be loaded, such as a class of the user's own, and there is no chat template.
    """
    if not has_prompt_style(folder):
        return None
    try:
        return load_prompt_style(folder)
    except UserError as error:
        if chat is None:
            raise
        print_message(f"{error}; the chat template of the folder is used")
        return None


def unsupported_system_prompt(sys_prompt: str, where: str) -> UserError:
    """The error for a system prompt that the format has no field for."""
    return UserError(f"sys_prompt: {sys_prompt[:40]!r} is not supported with {where}; add it to the prompt")
