"""The bodies of requests, as in OpenAI's API; fields that are not supported are refused, unless they only describe."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from litgpt.recipe.bounds import Count
from litgpt.recipe.generate import Penalty

DESCRIBING = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that clients send to describe a request; they have no effect on its answer."""


class StreamOptions(BaseModel):
    """What a stream has besides the pieces of its answers."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Body(BaseModel):
    """What all requests have in common; `model` may be left out, because a server has one."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=64)] = 1
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    max_tokens: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def drop_describing(cls, body: Any) -> Any:
        """Leave out the fields that only describe, and those that are null."""
        if not isinstance(body, dict):
            return body
        return {key: value for key, value in body.items() if key not in DESCRIBING and value is not None}

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class Completion(Body):
    """A request for the continuation of prompts: texts, or their token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class MessageBody(BaseModel):
    """One message of a chat; other fields are passed on to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class ResponseFormat(BaseModel):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class FunctionName(BaseModel):
    """The name of a function."""

    model_config = ConfigDict(extra="forbid")

    name: str


class NamedTool(BaseModel):
    """The tool that an answer must call."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionName


class ChatCompletion(Body):
    """A request for the next message of a chat."""

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: Literal[True] | None = None

    @property
    def requires_call(self) -> bool:
        """Whether the answer must be a call of a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @model_validator(mode="after")
    def check_lengths(self) -> "ChatCompletion":
        """Check that the number of tokens is given once."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are both given; leave one of them out")
        return self


class Prediction(BaseModel):
    """The body of LitGPT's own route."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
