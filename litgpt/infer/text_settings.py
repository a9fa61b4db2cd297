"""How texts are generated and where they end; the same for all prompts of a call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from litgpt.errors import UserError
from litgpt.files import read_utf8
from litgpt.infer.constraint import ConstraintCompiler, build_text_constraint
from litgpt.infer.prompt_images import Prompt
from litgpt.infer.prompts import PromptEncoder
from litgpt.infer.requests import Request
from litgpt.infer.sampling import Constraint, Sampling
from litgpt.recipe.generate import GenerationSettings

TEXT_KEYS = (
    *("max_new_tokens", "stop", "regex", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


@dataclass(frozen=True)
class TextSettings:
    """What the texts after several prompts have in common.

    Attributes:
        stops: strings that end a text and are not part of it.
        constrain: makes the constraint of one more text, or None.
        continues: whether a text continues its prompt; otherwise it is a reply.
        logprobs: as in `Request`.
    """

    max_new_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    stops: tuple[str, ...]
    constrain: Callable[[], Constraint | None]
    continues: bool
    logprobs: int | None = None

    def build_request(self, prompt: Prompt, seed: int | None) -> Request:
        """The request of the text after a prompt, whose images are decoded now.

        Raises:
            UserError: if one cannot be decoded.
        """
        settings: dict[str, Any] = {"logprobs": self.logprobs, "constraint": self.constrain()}
        settings |= {"images": prompt.load_images()}
        return Request(prompt.ids, self.max_new_tokens, self.sampling, self.stop_tokens, seed, **settings)


def prepare_texts(
    encoder: PromptEncoder,
    *,
    rows: int,
    chat_template: bool | None,
    max_new_tokens: int,
    stop: str | Sequence[str] | None = None,
    json_schema: str | dict[str, Any] | None = None,
    regex: str | None = None,
    logprobs: int | None = None,
    **sampling: Any,
) -> TextSettings:
    """Settings of texts, with the stop tokens and stop strings of the prompts' format.

    Args:
        rows: the number of the model's tokens.
        stop: more strings that end a text.
        sampling: the arguments of `Sampling`.

    Raises:
        UserError: if a setting is out of range, both a schema and an expression are given, or one of them is wrong.
    """
    stops = [stop] if isinstance(stop, str) else list(stop or [])
    if "" in stops:
        raise UserError("stop: '' ends every text; set strings of one character or more")
    stop_tokens, format_stops = encoder.get_stops(chat_template)
    constrain = prepare_constraint(encoder, rows, stop_tokens, json_schema=json_schema, regex=regex)
    constrain()  # a wrong one is refused before anything is generated
    return TextSettings(
        max_new_tokens,
        Sampling(**sampling),
        frozenset(stop_tokens),
        (*stops, *format_stops),
        constrain,
        continues=not encoder.has_format(chat_template),
        logprobs=logprobs,
    )


def prepare_constraint(
    encoder: PromptEncoder,
    rows: int,
    stop_tokens: Sequence[int],
    *,
    json_schema: str | dict[str, Any] | None = None,
    regex: str | None = None,
) -> Callable[[], Constraint | None]:
    """A function that makes the constraint of one more text; it may return None if it is given no schema or expression.

    Raises:
        UserError: if both are given, or the tokenizer has no stop tokens; from the function: if one is wrong.
    """
    if json_schema is None and regex is None:
        constraint = build_text_constraint(encoder.tokenizer, rows)  # which all texts may share
        return lambda: constraint
    if json_schema is not None and regex is not None:
        raise UserError("regex: a text follows either json_schema or regex; leave one of them out")
    compiler = ConstraintCompiler(encoder.tokenizer, rows, stop_tokens)
    if regex is not None:
        return partial(compiler.compile, "regex", regex)
    return partial(compiler.compile, "json_schema", json_schema)


def get_text_settings(recipe: GenerationSettings) -> dict[str, Any]:
    """The settings of texts, as arguments of `prepare_texts`."""
    return {**{key: getattr(recipe, key) for key in TEXT_KEYS}, "json_schema": read_json_schema(recipe)}


def read_json_schema(recipe: GenerationSettings) -> str | None:
    """The JSON schema of a recipe, which may be in a file."""
    schema = recipe.json_schema
    if schema is None or schema.lstrip().startswith("{"):
        return schema
    if not Path(schema).is_file():
        raise UserError(f"json_schema: {schema} is neither a JSON object nor a file; set one of them")
    return read_utf8(Path(schema))
