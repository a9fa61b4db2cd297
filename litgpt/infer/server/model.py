"""The model that a server serves: requests from bodies, and answers from tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import find_surrogate
from litgpt.infer.constraint import ConstraintCompiler
from litgpt.infer.engine import Engine
from litgpt.infer.prompts import PromptEncoder
from litgpt.infer.requests import Request, check_prompt
from litgpt.infer.sampling import Constraint, Sampling
from litgpt.infer.server.errors import ApiError
from litgpt.infer.server.schemas import Body, ChatCompletion, Completion, ResponseFormat
from litgpt.infer.server.texts import AnswerText
from litgpt.model.gpt import GPT


@dataclass(frozen=True)
class Defaults:
    """Settings of requests that do not set them."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float


@dataclass(frozen=True)
class Job:
    """The requests of one body, and the texts of their answers."""

    requests: list[Request]
    answers: list[AnswerText]


class ServedModel:
    """A model with its engine, tokenizer and prompt format, under a name."""

    def __init__(self, name: str, folder: Path, engine: Engine, encoder: PromptEncoder, defaults: Defaults) -> None:
        self.name, self.folder, self.engine, self.encoder, self.defaults = name, folder, engine, encoder, defaults
        self._compiler: ConstraintCompiler | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.encoder.tokenizer

    @property
    def model(self) -> GPT:
        """The decoder."""
        return self.engine.model

    def start_completion(self, body: Completion) -> Job:
        """The requests for one text, or several, after each prompt."""
        prompts = [self._encode_prompt(prompt) for prompt in list_prompts(body.prompt)]
        stop_tokens, stops = self.encoder.get_stops(False)
        request = self._build_request(body, stop_tokens, body.max_tokens, body.logprobs)
        requests = self._repeat(request, prompts, body, None)
        return Job(
            requests, [AnswerText(self.tokenizer, r.prompt, [*stops, *body.stops], has_tools=False) for r in requests]
        )

    def _encode_prompt(self, prompt: str | list[int]) -> tuple[int, ...]:
        return tuple(self.encoder.encode(prompt, None, False) if isinstance(prompt, str) else prompt)

    def start_prediction(self, prompt: str, max_new_tokens: int) -> Job:
        """The request of LitGPT's route, in the format of the model."""
        stop_tokens, stops = self.encoder.get_stops(None)
        ids = tuple(self.encoder.encode(prompt, None, None))
        body = Completion(prompt=prompt)
        requests = self._repeat(self._build_request(body, stop_tokens, max_new_tokens, None), [ids], body, None)
        context = () if self.encoder.has_format(None) else ids
        return Job(requests, [AnswerText(self.tokenizer, context, stops, has_tools=False)])

    def start_chat(self, body: ChatCompletion) -> Job:
        """The requests for one answer, or several, in a chat."""
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
            message["content"] = join_content(message.get("content"))
        tools = None if body.tool_choice == "none" else body.tools
        ids = tuple(self.encoder.encode_messages(messages, tools))
        if tools and ids == tuple(self.encoder.encode_messages(messages)):
            raise ApiError(400, "tools: the chat template of this model does not render tools", param="tools")
        stop_tokens, stops = self.encoder.get_stops(True)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
        request = self._build_request(body, stop_tokens, body.max_completion_tokens or body.max_tokens, logprobs)
        constrain = self._prepare_constraint(body.response_format, stop_tokens)
        requests = self._repeat(request, [ids], body, constrain)
        answers = [AnswerText(self.tokenizer, (), [*stops, *body.stops], has_tools=bool(tools)) for _ in requests]
        return Job(requests, answers)

    def _build_request(
        self, body: Body, stop_tokens: Sequence[int], max_new_tokens: int | None, logprobs: int | None
    ) -> Request:
        """A request without a prompt."""
        defaults = self.defaults
        if "" in body.stops:
            raise ApiError(400, "stop: '' ends every text; set strings of one character or more", param="stop")
        sampling = Sampling(
            defaults.temperature if body.temperature is None else body.temperature,
            body.top_k or defaults.top_k,
            defaults.top_p if body.top_p is None else body.top_p,
            body.min_p,
            body.repetition_penalty,
            body.presence_penalty or 0.0,
            body.frequency_penalty or 0.0,
            body.logit_bias or {},
        )
        return Request(
            (), max_new_tokens or defaults.max_new_tokens, sampling, frozenset(stop_tokens), logprobs=logprobs
        )

    def _repeat(
        self,
        request: Request,
        prompts: Sequence[tuple[int, ...]],
        body: Body,
        constrain: Callable[[], Constraint] | None,
    ) -> list[Request]:
        """The request for each prompt and choice."""
        requests = []
        for prompt in prompts:
            check_prompt(self.model, prompt, request.max_new_tokens)
            for choice in range(body.n):
                seed = None if body.seed is None else (body.seed + choice) % 2**63
                constraint = constrain() if constrain is not None else None
                requests.append(replace(request, prompt=prompt, seed=seed, constraint=constraint))
        return requests

    def _prepare_constraint(
        self, form: ResponseFormat | None, stop_tokens: Sequence[int]
    ) -> Callable[[], Constraint] | None:
        """A function that makes the constraint of one text, or None for any text."""
        if form is None or form.type == "text":
            return None
        schema = (form.json_schema or {}).get("schema")
        if form.type == "json_schema" and not isinstance(schema, dict):
            raise ApiError(400, "response_format.json_schema.schema: is not an object", param="response_format")
        if self._compiler is None:
            rows = self.model.config.padded_vocab_size or 0
            self._compiler = ConstraintCompiler(self.tokenizer, rows, stop_tokens)
        compiler = self._compiler
        if form.type == "json_object":
            return lambda: compiler.compile("json_object", key="response_format")
        return lambda: compiler.compile("json_schema", schema, key="response_format")


def list_prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a completion: one text or list of token ids, or several."""
    if not prompt:
        raise ApiError(400, "prompt: is empty; give a text", param="prompt")
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt  # type: ignore[return-value]


def join_content(content: str | list[dict[str, Any]] | None) -> str:
    """The text of a message, whose parts are all texts.

    Raises:
        ApiError: for a part of another kind, such as an image.
    """
    if not isinstance(content, list):
        return check_surrogates(content or "")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            message = f"messages: content of type {part.get('type')!r} is not supported; use text"
            raise ApiError(400, message[:200], param="messages")
    return check_surrogates("".join(part["text"] for part in content))


def check_surrogates(text: str) -> str:
    """The same text, if UTF-8 can encode it."""
    if (position := find_surrogate(text)) is not None:
        raise UserError(f"messages: a text is not UTF-8 at character {position + 1}; give it in UTF-8")
    return text
