"""Restrict the tokens of a text: to a JSON schema, a regular expression or a grammar, with llguidance, or to no codes.

Axes: V vocabulary.
"""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from litgpt.data.media.codes import list_unwritten_ids
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError

if TYPE_CHECKING:
    from llguidance import LLMatcher

Form = Literal["json_schema", "json_object", "regex", "lark"]
WHITESPACE = r"(\n[ ]{0,32}|[ ]{1,2})"
"""Between the parts of a JSON text: limited, since a model may otherwise write spaces until the end."""


class GrammarConstraint:
    """What may follow in one text; see `Constraint`. Objects are made by `ConstraintCompiler`."""

    def __init__(self, key: str, matcher: "LLMatcher", rows: int) -> None:
        self.key, self._matcher, self._rows = key, matcher, rows

    def allowed(self) -> Tensor:
        """The tokens that may follow, (V,) boolean on the CPU; at the end of the text, the stop tokens.

        Raises:
            UserError: if the text has exceeded a limit of the grammar's parser.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        known = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._rows]).bool()
        self._check()
        mask = torch.zeros(self._rows, dtype=torch.bool)
        mask[: len(known)] = known
        return mask

    def accept(self, token: int) -> None:
        """Continue after this token.

        Raises:
            UserError: if it may not follow, or the text has exceeded a limit of the grammar's parser.
        """
        if not self._matcher.consume_token(token):
            raise grammar_error(self.key, f"token {token}", self._matcher.get_error(), "set a simpler one")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise grammar_error(self.key, "the text", self._matcher.get_error(), "set a simpler one")


class TextConstraint:
    """Any text without some tokens; see `Constraint`."""

    def __init__(self, excluded: Sequence[int], rows: int) -> None:
        self._mask_V = torch.ones(rows, dtype=torch.bool)
        self._mask_V[list(excluded)] = False

    def allowed(self) -> Tensor:
        """The tokens that may follow, (V,) boolean on the CPU."""
        return self._mask_V

    def accept(self, token: int) -> None:
        """Continue after this token; all texts have the same."""


def build_text_constraint(tokenizer: Tokenizer, rows: int) -> TextConstraint | None:
    """What a text follows without a grammar: no codes of images if the model writes none (Chameleon); else None.

    Args:
        rows: V, the number of tokens of the model.
    """
    excluded = [token for token in list_unwritten_ids(tokenizer) if token < rows]
    return TextConstraint(excluded, rows) if excluded else None


class ConstraintCompiler:
    """Makes the constraints of texts of one model.

    Args:
        rows: V, the number of tokens of the model, of which those that the tokenizer does not have are never allowed.
        stop_tokens: allowed where a text may end.

    Raises:
        UserError: if llguidance is not installed, there is no stop token, or the folder has no tokenizer.json.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int, stop_tokens: Iterable[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise UserError("json_schema: llguidance is not installed: pip install 'litgpt[serve]'") from None
        if not (ends := list(stop_tokens)):
            raise UserError(f"{tokenizer.folder}: has no stop token, which ends a JSON text; set eos_token_id")
        if tokenizer.backend != "huggingface":
            raise UserError(
                f"{tokenizer.folder}: a JSON schema or regular expression needs tokenizer.json; only tokenizer.model "
                "was found"
            )
        self._library, self._rows = llguidance, rows
        self._tokens = llguidance.LLTokenizer(
            tokenizer.processor.to_str(),
            n_vocab=max(tokenizer.id_limit, *(token + 1 for token in ends)),
            eos_token=ends,
        )

    def compile(self, form: Form, source: Any = None, *, key: str | None = None) -> GrammarConstraint:
        """The constraint of one text.

        Args:
            form: of `source`: `json_schema`, a JSON text or the object that it describes; `json_object`, any JSON
                object, without `source`; `regex`, a regular expression that the whole text matches, in the syntax of
                the crate regex of Rust; `lark`, a grammar in llguidance's variant of Lark.
            key: named in errors; None for `form`.

        Raises:
            UserError: if the grammar has an error or a feature that llguidance does not support.
        """
        key = key or form
        grammar = self._write_grammar(form, source, key)
        matcher = self._library.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise grammar_error(key, str(source), matcher.get_error(), "set another one")
        return GrammarConstraint(key, matcher, self._rows)

    def _write_grammar(self, form: Form, source: Any, key: str) -> str:
        """The grammar in llguidance's own form."""
        matcher = self._library.LLMatcher
        if form == "regex":
            return matcher.grammar_from_regex(source)
        if form == "lark":
            return matcher.grammar_from_lark(source)
        try:
            schema = {"type": "object"} if form == "json_object" else read_schema(source)
            return matcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})
        except ValueError as error:
            raise grammar_error(key, str(source), str(error), "set an object such as {'type': 'object'}") from None


def read_schema(source: Any) -> dict[str, Any]:
    """The JSON schema in a JSON text, or an object as it is.

    Raises:
        ValueError: if it is neither.
    """
    schema = json.loads(source) if isinstance(source, str) else source
    if not isinstance(schema, dict):
        raise ValueError("not a JSON object")
    return schema


def grammar_error(key: str, source: str, message: str, cure: str) -> UserError:
    """The error for a grammar, with the beginning of llguidance's message, which may have many lines."""
    reason = " ".join(message.partition("<state>")[0].split())[:200]
    return UserError(f"{key}: {source[:60]!r}: {reason}; {cure}")
