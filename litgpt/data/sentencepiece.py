"""Encode and decode with sentencepiece models (tokenizer.model), including special tokens written in the text."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from litgpt.errors import UserError


def read_sentencepiece(path: Path) -> Any:
    """Load the processor of a tokenizer.model.

    Raises:
        UserError: if sentencepiece is not installed, or the file is not a sentencepiece model.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(f"{path}: sentencepiece is not installed: pip install 'litgpt[data]'") from None
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a sentencepiece model ({str(error)[:200]})") from None


class SentencePieceTokenizer:
    """Encodes and decodes with a sentencepiece processor and the tokens that were added to it.

    Sentencepiece itself encodes `</s>` in a text as four characters. Chat templates write special tokens as text, so
    the text is split at those first, and sentencepiece encodes the parts between them.

    Args:
        processor: from `read_sentencepiece`.
        added: ids of the tokens added after training, by text.
        hidden: ids that `decode` leaves out.
        legacy: add a space before every part of the text, and not only the first (older Llama tokenizers).
    """

    def __init__(self, processor: Any, added: Mapping[str, int], hidden: set[int], *, legacy: bool) -> None:
        self.processor = processor
        self.legacy = legacy
        numbers = range(processor.vocab_size())
        control = [number for number in numbers if processor.is_control(number) or processor.is_unknown(number)]
        self.special = {processor.id_to_piece(number): number for number in control} | dict(added)
        self.added_texts = {number: text for text, number in added.items() if number >= processor.vocab_size()}
        self.hidden = hidden | set(control)
        longest_first = sorted(self.special, key=len, reverse=True)
        self.special_pattern = re.compile("|".join(f"({re.escape(text)})" for text in longest_first) or "(?!)")
        self.prefix = processor.id_to_piece(processor.unk_id())

    def encode_batch(self, strings: list[str]) -> list[list[int]]:
        """Encode texts; those without special tokens in parallel."""
        plain = [string for string in strings if not self.special_pattern.search(string)]
        encoded = iter(self.processor.encode(plain))
        return [self.encode(string) if self.special_pattern.search(string) else next(encoded) for string in strings]

    def encode(self, string: str) -> list[int]:
        """Encode a text."""
        tokens: list[int] = []
        position = 0
        for match in self.special_pattern.finditer(string):
            tokens += self._encode_part(string[position : match.start()], first=position == 0)
            tokens.append(self.special[match[0]])
            position = match.end()
        return tokens + self._encode_part(string[position:], first=position == 0)

    def _encode_part(self, text: str, *, first: bool) -> list[int]:
        if not text or first or (self.legacy and not text.startswith(" ")):
            return self.processor.encode(text) if text else []
        # the pieces of a known prefix take the space that sentencepiece adds before the text
        return self.processor.encode(self.prefix + text)[len(self.processor.encode(self.prefix)) :]

    def _decode_part(self, tokens: list[int], *, first: bool) -> str:
        if first or not tokens:
            return self.processor.decode(tokens)
        return self.processor.decode(self.processor.encode(self.prefix) + tokens)[len(self.prefix) :]

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode token ids, without special tokens and invalid ids."""
        size = self.processor.vocab_size()
        parts: list[list[int] | str] = [[]]
        for number in tokens:
            if number in self.hidden:
                continue
            if number < size and isinstance(parts[-1], list):
                parts[-1].append(number)
            elif number in self.added_texts:
                parts += [self.added_texts[number], []]
        return "".join(
            part if isinstance(part, str) else self._decode_part(part, first=index == 0)
            for index, part in enumerate(parts)
        )

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None."""
        if token in self.special:
            return self.special[token]
        number = self.processor.piece_to_id(token)
        is_known = number != self.processor.unk_id() or token == self.prefix
        return number if is_known else None
