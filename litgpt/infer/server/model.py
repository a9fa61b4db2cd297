"""The model that a server serves: requests from bodies, and answers from tokens."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.infer.constraint import ConstraintCompiler, build_text_constraint
from litgpt.infer.engine import Engine
from litgpt.infer.prompt_images import Prompt
from litgpt.infer.prompts import PromptEncoder
from litgpt.infer.requests import Request, check_prompt
from litgpt.infer.sampling import Constraint, Sampling
from litgpt.infer.server.contents import MediaLimits, check_request_media, parse_contents
from litgpt.infer.server.errors import ApiError
from litgpt.infer.server.schemas import Body, ChatCompletion, Completion, NamedTool, ResponseFormat
from litgpt.infer.server.texts import AnswerText, CallReader
from litgpt.infer.server.tool_calls import build_call_schema, find_call_format, parse_arguments
from litgpt.model.gpt import GPT

NONE_FETCHED: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class Defaults:
    """Settings of requests that do not set them."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    media: MediaLimits


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
        self._text_constraint = build_text_constraint(encoder.tokenizer, engine.model.config.padded_vocab_size or 0)
        self._decoding = Lock()  # frames and pixels take much more memory than their file

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
            requests, [AnswerText(self.tokenizer, request.prompt, [*stops, *body.stops]) for request in requests]
        )

    def _encode_prompt(self, prompt: str | list[int]) -> Prompt:
        return self.encoder.encode(prompt, None, False) if isinstance(prompt, str) else Prompt(tuple(prompt))

    def start_prediction(self, prompt: str, max_new_tokens: int) -> Job:
        """The request of LitGPT's route, in the format of the model."""
        stop_tokens, stops = self.encoder.get_stops(None)
        encoded = self.encoder.encode(prompt, None, None)
        body = Completion(prompt=prompt)
        requests = self._repeat(self._build_request(body, stop_tokens, max_new_tokens, None), [encoded], body, None)
        context = () if self.encoder.has_format(None) else encoded.ids
        return Job(requests, [AnswerText(self.tokenizer, context, stops)])

    def start_chat(self, body: ChatCompletion, files: Mapping[str, bytes] = NONE_FETCHED) -> Job:
        """The requests for one answer, or several, in a chat.

        Args:
            files: of its media at URLs, if they were fetched.
        """
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
        media, reader = parse_contents(messages, files), self._prepare_tools(body)
        with self._decoding if media else nullcontext():
            check_request_media(media, self.defaults.media)
            prompt = self._encode_chat(messages, reader)
        stop_tokens, stops = self.encoder.get_stops(True)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
        request = self._build_request(body, stop_tokens, body.max_completion_tokens or body.max_tokens, logprobs)
        constrain = self._prepare_constraint(body.response_format, stop_tokens)
        if reader and reader.is_required:
            name = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
            schema = build_call_schema(reader.tools, name, reader.form)
            constrain = self._prepare_schema(schema, stop_tokens, key="tools")
        requests = self._repeat(request, [prompt], body, constrain)
        return Job(requests, [AnswerText(self.tokenizer, (), [*stops, *body.stops], reader) for _ in requests])

    def _prepare_tools(self, body: ChatCompletion) -> CallReader | None:
        """The reader of the calls of an answer; None without tools."""
        if body.requires_call and not body.tools:
            raise ApiError(400, "tool_choice: needs tools; give them, or set tool_choice: none", param="tool_choice")
        if body.requires_call and body.response_format and body.response_format.type != "text":
            message = "response_format: is not supported with a required call; leave it out, or set tool_choice: auto"
            raise ApiError(400, message, param="response_format")
        if not body.tools or body.tool_choice == "none" or self.encoder.chat is None:
            return None
        return CallReader(find_call_format(self.encoder.chat), body.tools, body.requires_call)

    def _encode_chat(self, messages: Sequence[dict[str, Any]], reader: CallReader | None) -> Prompt:
        """The prompt of a chat, with the beginning of a call if one is required."""
        tools = reader.tools if reader else None
        parsed = [parse_arguments(message) for message in messages]
        try:
            prompt = self.encoder.encode_messages(parsed, tools)
        except UserError:
            if parsed == messages:
                raise
            parsed = list(messages)  # a template that joins texts
            prompt = self.encoder.encode_messages(messages, tools)
        if tools and prompt == self.encoder.encode_messages(parsed):
            raise ApiError(400, "tools: the chat template of this model does not render tools", param="tools")
        opening = reader.form.opening if reader and reader.form and reader.is_required else ""
        more = self.tokenizer.encode(opening, bos=False).tolist() if opening else ()
        return replace(prompt, ids=(*prompt.ids, *more))

    def _build_request(
        self, body: Body, stop_tokens: Sequence[int], max_new_tokens: int | None, logprobs: int | None
    ) -> Request:
        """A request without a prompt."""
        defaults = self.defaults
        if "" in body.stops:
            raise ApiError(400, "stop: '' ends every text; set strings of one character or more", param="stop")
        sampling = Sampling(
            defaults.temperature if body.temperature is None else body.temperature,
            defaults.top_k if body.top_k is None else max(body.top_k, 0) or None,
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
        prompts: Sequence[Prompt],
        body: Body,
        constrain: Callable[[], Constraint] | None,
    ) -> list[Request]:
        """The request for each prompt and choice."""
        requests = []
        for prompt in prompts:
            check_prompt(self.model, prompt.ids, request.max_new_tokens, has_images=bool(prompt.media))
            with self._decoding:
                filled = replace(request, prompt=prompt.ids, images=prompt.load_images())
            for choice in range(body.n):
                seed = None if body.seed is None else (body.seed + choice) % 2**63
                constraint = constrain() if constrain is not None else self._text_constraint
                requests.append(replace(filled, seed=seed, constraint=constraint))
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
        return self._prepare_schema(schema if form.type == "json_schema" else None, stop_tokens, key="response_format")

    def _prepare_schema(
        self, schema: dict[str, Any] | None, stop_tokens: Sequence[int], *, key: str
    ) -> Callable[[], Constraint]:
        """A function that makes the constraint of one text to a schema; None for any JSON object."""
        if self._compiler is None:
            rows = self.model.config.padded_vocab_size or 0
            self._compiler = ConstraintCompiler(self.tokenizer, rows, stop_tokens)
        return partial(self._compiler.compile, "json_object" if schema is None else "json_schema", schema, key=key)


def list_prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a completion: one text or list of token ids, or several."""
    if not prompt:
        raise ApiError(400, "prompt: is empty; give a text", param="prompt")
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return prompt  # type: ignore[return-value]
