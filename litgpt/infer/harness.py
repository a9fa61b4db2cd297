"""A model for the Language Model Evaluation Harness (lm-eval), named `litgpt` there.

`python -m litgpt.infer.harness run --model litgpt --model_args pretrained=FOLDER ...` is the command line of lm-eval
with this model.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string

from litgpt.data.render.chat_template import ChatTemplate, find_turn_ends, read_template
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.infer.engine import Engine
from litgpt.infer.likelihood import Continuation, compute_likelihoods
from litgpt.infer.load import (
    find_folder,
    find_format_folder,
    find_tokenizer_folder,
    open_model,
    parse_batch_size,
    parse_device,
    parse_dtype,
    resolve_model_folder,
    select_dtype,
)
from litgpt.infer.perplexity import iter_windows
from litgpt.infer.prompt_files import generate_texts
from litgpt.infer.requests import Request
from litgpt.infer.sampling import Sampling
from litgpt.messages import print_message
from litgpt.model.gpt import GPT
from litgpt.phases import phase

MAX_SEQUENCES = 32
"""The maximum number of texts that are generated at a time with `batch_size: auto`."""
DEFAULT_NEW_TOKENS = 256
"""The maximum number of tokens of a text, if the task does not set it; that of lm-eval."""
SAMPLING_KEYS = ("top_k", "top_p", "min_p", "repetition_penalty")
"""The settings of a task, `generation_kwargs`, that are those of `Sampling`."""
MODEL_ARGS = ("pretrained", "dtype", "device", "batch_size", "max_batch_size", "access_token")


@register_model("litgpt")
class HarnessModel(TemplateLM):
    """Scores and generates texts for the tasks of lm-eval.

    Args:
        chat: the chat template, or None.
        batch_size: the maximum number of texts of a forward pass; None for as many as fit into the memory that the
            engine and `compute_likelihoods` set aside. It does not change the results.
        reorder: as in `Engine`; False for a model that is being trained.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        chat: ChatTemplate | None,
        *,
        batch_size: int | None = None,
        reorder: bool = True,
    ) -> None:
        super().__init__()
        self.reorder = reorder
        self.model, self.tokenizer, self.chat, self.batch_size = model, tokenizer, chat, batch_size

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        batch_size: int | None = None,
        access_token: str | None = None,
    ) -> "HarnessModel":
        """The model of any folder that litgpt loads, an adapter with its base too, or of the hub's org/name.

        Raises:
            UserError: if there is none, or its files are damaged.
        """
        folder = resolve_model_folder(find_folder(folder, access_token=access_token))
        tokenizer, chat = Tokenizer(find_tokenizer_folder(folder)), read_template(find_format_folder(folder))
        model = open_model(folder, device=device, dtype=dtype or select_dtype(device))
        tokenizer.check_rows(model.config.padded_vocab_size or 0)
        print_message(*tokenizer.warnings)
        return cls(model, tokenizer, chat, batch_size=batch_size)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """The model of lm-eval's `--model_args`.

        Raises:
            UserError: for an unknown argument or value.
        """
        config = {key: value for key, value in (additional_config or {}).items() if value is not None}
        if config.get("device") == "cuda:0" and not torch.cuda.is_available():
            del config["device"]  # lm-eval's default, not the user's choice
        values = config | arg_dict
        if unknown := [key for key in values if key not in MODEL_ARGS]:
            raise UserError(f"model_args: {unknown[0]} is not known; use {', '.join(MODEL_ARGS)}")
        if "pretrained" not in values:
            raise UserError("model_args: pretrained is missing; set pretrained=FOLDER")
        sizes = [parse_batch_size(values[key]) for key in ("batch_size", "max_batch_size") if key in values]
        return cls.open(
            values["pretrained"],
            device=parse_device(values.get("device")),
            dtype=parse_dtype(values.get("dtype")),
            batch_size=min((size for size in sizes if size is not None), default=None),
            access_token=values.get("access_token"),
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """As `create_from_arg_obj`, of `key=value,...`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.embedding.weight.device

    @property
    def max_length(self) -> int:
        """The number of tokens of the model's context."""
        return self.model.config.block_size

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            UserError: if the tokenizer has none.
        """
        if self.tokenizer.eos_id is None:
            raise UserError(f"{self.tokenizer.folder}: the tokenizer has no eos token; set it in tokenizer_config.json")
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: bos, or else eos."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests distinguishes tokenizers and chat templates by."""
        return self.tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, with bos if the tokenizer adds it by default, unless the text begins with it."""
        return self.tokenizer.encode(string, bos=add_special_tokens).tolist()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each (context, continuation), its log-probability in nats, and whether it is what greedy decoding gives.

        Raises:
            UserError: for a continuation without tokens.
        """
        for request in requests:
            if not request.args[1]:
                raise UserError(f"{request.task_name}: a continuation is empty; correct doc_to_target or doc_to_choice")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        continuations = [Continuation(tuple(context), tuple(tokens)) for _, context, tokens in requests]
        answers: dict[int, tuple[float, bool]] = {}
        with phase("scoring", len(requests)) as entry:
            for number, likelihood in compute_likelihoods(self.model, continuations, max_contexts=self.batch_size):
                answers[number] = likelihood.logprob, likelihood.is_greedy
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                entry.advance()
        return [answers[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """For each (text,), its log-probability in nats: every token once, in windows of the model's context."""
        del disable_tqdm
        owners: list[int] = []
        windows: list[Continuation] = []
        for number, request in enumerate(requests):
            ids, size = self.tok_encode(request.args[0]), self.max_length
            parts = list(iter_windows(ids, self.prefix_token_id, size=size, stride=size))
            owners += [number] * len(parts)
            windows += parts
        totals = [0.0] * len(requests)
        with phase("scoring", len(windows)) as entry:
            for number, likelihood in compute_likelihoods(self.model, windows, max_contexts=self.batch_size):
                totals[owners[number]] += likelihood.logprob
                entry.advance()
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """For each (prompt, settings), the text that follows, up to a stop string.

        Raises:
            UserError: for an unknown setting, or if no room is left for a prompt.
        """
        del disable_tqdm
        groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
        built: list[Callable[[], Request]] = []
        for number, request in enumerate(requests):
            prompt, settings = request.args
            values: dict[str, Any] = dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
            groups[tuple(stop for stop in values.pop("until") if stop)].append(number)
            built.append(partial(self._build_request, prompt, values))
        engine = Engine(self.model, max_sequences=self.batch_size or MAX_SEQUENCES, reorder=self.reorder)
        texts: dict[int, str] = {}
        with phase("generating", len(requests)) as entry:
            for stops, numbers in groups.items():
                written = generate_texts(engine, [built[number] for number in numbers], self.tokenizer, stops)
                for number, text in zip(numbers, written, strict=True):
                    texts[number] = text.text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text.text)
                    entry.advance()
        return [texts[number] for number in range(len(requests))]

    def _build_request(self, prompt: str, settings: Mapping[str, Any]) -> Request:
        """A request of a task; a prompt that is too long is cut at its start."""
        values = dict(settings)
        new_tokens, samples = int(values.pop("max_gen_toks")), values.pop("do_sample")
        temperature = float(values.pop("temperature", 1.0))
        filters = {key: values.pop(key) for key in SAMPLING_KEYS if key in values}
        sampling = Sampling(temperature if samples else 0.0, **filters)
        if values:
            raise UserError(f"generation_kwargs: {next(iter(values))} is not supported; leave it out")
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(
                f"generation_kwargs: max_gen_toks: {new_tokens} leaves no room for a prompt in the model's context of "
                f"{self.max_length}; set less"
            )
        ends = [*self.tokenizer.stop_ids, *(find_turn_ends(self.chat, self.tokenizer) if self.chat else [])]
        ids = tuple(self.tok_encode(prompt)[-room:]) or (self.prefix_token_id,)
        return Request(ids, new_tokens, sampling, frozenset(ends))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat template, which lm-eval's cache depends on."""
        return self._require_chat().sources[0] if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text.

        Args:
            add_generation_prompt: end with the header of a reply; otherwise the last message is the beginning of one.
        """
        special = self.tokenizer.special_tokens()
        text = self._require_chat().render(chat_history, special, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        beginning = chat_history[-1]["content"].strip()
        return text[: text.rindex(beginning) + len(beginning)]

    def _require_chat(self) -> ChatTemplate:
        if self.chat is None:
            raise UserError(f"chat_template: true, but {self.tokenizer.folder} has none; set false")
        return self.chat


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
