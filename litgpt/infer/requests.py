"""What an engine is asked for, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from litgpt.errors import UserError
from litgpt.infer.prompt_images import PromptImages
from litgpt.infer.sampling import Constraint, Sampling
from litgpt.model.audio_config import AudioShape
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.tower_config import TowerShape

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: token ids, one or more.
        max_new_tokens: the maximum number of tokens to generate.
        stop_tokens: tokens after which nothing is generated.
        seed: of this text's random numbers, which then do not depend on other requests; None for torch's generator.
        logprobs: report the log-probability of each token, and this many of the most likely ones; None for neither.
        prompt_logprobs: the same for the tokens of the prompt, except the first.
        constraint: a grammar; None for any text.
        images: in the prompt, at the places of their token; None for a prompt of text only.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    images: PromptImages | None = None

    @property
    def cached_tokens(self) -> int:
        """The number of tokens whose keys and values it may need: all but the last."""
        return len(self.prompt) + self.max_new_tokens - 1


@dataclass(frozen=True)
class GeneratedToken:
    """One token of an answer, or of a prompt.

    Attributes:
        logprob: the logarithm of its probability without temperature or other settings, or None if not asked for.
        top: (token, log-probability) of the most likely tokens, the most likely first.
        finish_reason: why it is the last; None for others. A stop token is reported too, with `stop`.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


def check_tokens(key: str, tokens: tuple[int, int], rows: int) -> None:
    """Check that a model with this number of tokens has the smallest and the largest of some token ids.

    Raises:
        UserError: naming the key of the ids and the first of the two that it does not have.
    """
    for token in tokens:
        if not 0 <= token < rows:
            raise UserError(f"{key}: has token {token}, but the model has {rows} tokens; use the model's own tokenizer")


def check_prompt(model: GPT, prompt: Sequence[int], max_new_tokens: int, *, has_images: bool = False) -> None:
    """Check that prompt and new tokens fit into the model's context, and the model has all tokens of the prompt.

    Args:
        has_images: whether the prompt has images or sounds, with their places.

    Raises:
        UserError: if they do not, the prompt is empty or has the token of an image without it, or the model is a reward
            model.
    """
    if model.config.output == "score":
        raise UserError(
            f"{model.config.name}: a reward model computes scores, not text; generate with a language model"
        )
    limit, rows = model.config.block_size, model.config.padded_vocab_size or 0
    if not prompt:
        raise UserError("prompt: has no tokens; set at least one")
    check_tokens("prompt", (min(prompt), max(prompt)), rows)
    names = name_media_tokens(model.config)
    if not has_images and (unseen := names.keys() & {*prompt}):
        token, what = min(unseen), names[min(unseen)]
        raise UserError(
            f"prompt: has token {token}, which stands for {what}, without {what}; give one, or leave it out"
        )
    if len(prompt) >= limit:
        raise UserError(f"prompt: {len(prompt)} tokens exceed the model's context of {limit}; use a shorter one")
    if max_new_tokens < 1 or len(prompt) + max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens: {max_new_tokens} after a prompt of {len(prompt)} tokens exceeds the model's context "
            f"of {limit}; set 1 to {limit - len(prompt)}"
        )


def name_media_tokens(config: Config) -> dict[int, str]:
    """What the tokens stand for at whose places a model reads features."""
    names: dict[int, str] = {}
    if config.vision is not None:  # the modules are on the first stage of a pipeline only
        shape = TowerShape.from_values(config.vision)
        names |= {token: "a video" if token == shape.video_token else "an image" for token in shape.media_tokens}
    if config.audio is not None:
        names[AudioShape.from_values(config.audio).audio_token] = "a sound"
    return names
