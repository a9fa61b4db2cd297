"""The bytes of single tokens, which may be a part of a character."""

import re

from litgpt.data.tokenizer import Tokenizer

FALLBACK_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte as a token of sentencepiece's byte fallback."""
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
OTHERS = tuple(byte for byte in range(256) if byte not in PRINTABLE)
BYTE_OF_CHARACTER = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(OTHERS)}
"""The byte that each character of a byte-level token is (GPT-2, Radford et al. 2019)."""


def get_token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token adds to a text; those of U+FFFD if its tokenizer does not say which they are."""
    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return text.encode()
    is_sentencepiece = tokenizer.backend == "sentencepiece"
    piece = tokenizer.processor.id_to_piece(token) if is_sentencepiece else tokenizer.processor.id_to_token(token)
    if match := FALLBACK_TOKEN.fullmatch(piece):
        return bytes.fromhex(match[1])
    if all(character in BYTE_OF_CHARACTER for character in piece):
        return bytes(BYTE_OF_CHARACTER[character] for character in piece)
    return text.encode()
