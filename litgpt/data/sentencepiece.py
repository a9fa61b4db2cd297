"""Sentencepiece models (tokenizer.model): text to pieces and back, special tokens written in a text included."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from litgpt.errors import UserError


def read_sentencepiece(path: Path) -> Any:
    """The processor of a tokenizer.model.

    Raises:
        UserError: if sentencepiece is not installed, or the file is not one of its models.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(f"{path}: needs the package sentencepiece; `pip install litgpt[data]`") from None
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a sentencepiece model ({str(error)[:200]})") from None


class SentencePieceTokenizer:
    """Text to token numbers and back by a sentencepiece processor and the tokens that were added to it.

    Sentencepiece itself reads `</s>` in a text as four characters. Chat templates write special tokens into the text,
    so it is cut at those first, and what stands between them goes to sentencepiece.

    Args:
        processor: of `read_sentencepiece`.
        added: tokens added after training, by text.
        hidden: those of them that `decode` leaves out.
        legacy: whether a space is put before every part of the text, as before the first (older Llama tokenizers).
    """

    def __init__(self, processor: Any, added: Mapping[str, int], hidden: set[int], *, legacy: bool) -> None:
        self.processor = processor
        self.legacy = legacy
        numbers = range(processor.vocab_size())
        control = [number for number in numbers if processor.is_control(number) or processor.is_unknown(number)]
        self.special = {processor.id_to_piece(number): number for number in control} | dict(added)
        self.texts = {number: text for text, number in added.items() if number >= processor.vocab_size()}
        self.hidden = hidden | set(control)
        longest_first = sorted(self.special, key=len, reverse=True)
        self.cut = re.compile("|".join(f"({re.escape(text)})" for text in longest_first) or "(?!)")
        self.before = processor.id_to_piece(processor.unk_id())

    def encode_batch(self, strings: list[str]) -> list[list[int]]:
        """The tokens of each text; in parallel over those without special tokens."""
        whole = [string for string in strings if not self.cut.search(string)]
        encoded = iter(self.processor.encode(whole))
        return [self.encode(string) if self.cut.search(string) else next(encoded) for string in strings]

    def encode(self, string: str) -> list[int]:
        """The tokens of a text."""
        tokens: list[int] = []
        place = 0
        for match in self.cut.finditer(string):
            tokens += self._encode_part(string[place : match.start()], first=place == 0)
            tokens.append(self.special[match[0]])
            place = match.end()
        return tokens + self._encode_part(string[place:], first=place == 0)

    def _encode_part(self, text: str, *, first: bool) -> list[int]:
        if not text or first or (self.legacy and not text.startswith(" ")):
            return self.processor.encode(text) if text else []
        # a few known pieces before the text take the space that sentencepiece would put before it
        return self.processor.encode(self.before + text)[len(self.processor.encode(self.before)) :]

    def _decode_part(self, tokens: list[int], *, first: bool) -> str:
        if first or not tokens:
            return self.processor.decode(tokens)
        return self.processor.decode(self.processor.encode(self.before) + tokens)[len(self.before) :]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, without special ones and numbers that are no token."""
        size = self.processor.vocab_size()
        parts: list[list[int] | str] = [[]]
        for number in tokens:
            if number in self.hidden:
                continue
            if number < size and isinstance(parts[-1], list):
                parts[-1].append(number)
            elif number in self.texts:
                parts += [self.texts[number], []]
        return "".join(
            part if isinstance(part, str) else self._decode_part(part, first=place == 0)
            for place, part in enumerate(parts)
        )

    def token_to_id(self, token: str) -> int | None:
        """The number of a token, or None."""
        if token in self.special:
            return self.special[token]
        number = self.processor.piece_to_id(token)
        known = number != self.processor.unk_id() or token == self.before
        return number if known else None
