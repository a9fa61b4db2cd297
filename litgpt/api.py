"""A model in Python: load it from a folder or by name, write text with it, call it."""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt import adapt
from litgpt.adapt.layers import iter_adapted_layers
from litgpt.adapt.quantization import quantize_for_inference
from litgpt.data.render.chat_template import ChatTemplate, read_template
from litgpt.data.render.prompt_styles import PromptStyle, has_prompt_style, load_prompt_style, save_prompt_style
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.infer.generate import check_room, generate, until
from litgpt.infer.load import (
    COMPUTE,
    TYPES,
    best_device,
    best_type,
    device_named,
    find_folder,
    inside_run,
    open_model,
    random_model,
    retype,
    texts_in,
)
from litgpt.infer.prompts import Prompts
from litgpt.infer.sampling import Sampling
from litgpt.model.gpt import GPT
from litgpt.model.surgery import wrap_forward
from litgpt.store.save_model import save_model_folder

BENCHMARK_KEYS = (
    "Seconds total",
    "Seconds to first token",
    "Tokens generated",
    "Inference speed in tokens/sec",
    "Total GPU memory allocated in GB",
)
Loss = Callable[[Tensor, Tensor], Tensor]


def told(tokens: Iterable[int], listener: Callable[[int], object]) -> Iterator[int]:
    """The same tokens; `listener` is called with each."""
    for token in tokens:
        listener(token)
        yield token


class LLM(nn.Module):
    """A language model with its tokenizer; made by `LLM.load`.

    Attributes:
        model: the decoder, `model(ids (B, T)) -> logits (B, T, V)`.
        tokenizer: text to token numbers and back.
        chat: the folder's chat template, or None.
        prompt_style: the style that the folder's prompt_style.yaml names, or None; one may be set.
        config: the model's shape.
        checkpoint_dir: the folder that it is from; None for random weights.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, chat: ChatTemplate | None, checkpoint_dir: Path | None
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.chat = chat
        self.config = model.config
        self.checkpoint_dir = checkpoint_dir
        texts = tokenizer.folder
        self.prompt_style: PromptStyle | None = load_prompt_style(texts) if has_prompt_style(texts) else None
        self.cache_size: int | None = None
        self.eval()

    @classmethod
    def load(
        cls,
        model: Path | str,
        init: Literal["pretrained", "random"] = "pretrained",
        tokenizer_dir: Path | str | None = None,
        access_token: str | None = None,
        distribute: Literal["auto"] | None = "auto",
    ) -> "LLM":
        """A model from a folder (of Hugging Face, LitGPT, a run or one of its steps, an adapter) or by name.

        Args:
            model: a folder, or the hub's org/name: downloaded into `checkpoints/` if it is not there.
            init: `random` gives a known model's shape first weights of its own.
            tokenizer_dir: a folder with another tokenizer; `random` needs one.
            access_token: for models that ask for a licence to be accepted; None takes HF_TOKEN.
            distribute: `auto` puts the model on the accelerator in bfloat16, or on the CPU if there is none; None on
                the CPU. On the CPU it keeps the type of the files.

        Raises:
            UserError: if there is no such model, or its files are damaged.
        """
        if init not in ("pretrained", "random"):
            raise UserError(f"init: {init!r} is not known; give pretrained or random")
        if distribute not in ("auto", None):
            raise UserError(f"distribute: {distribute!r} is not known; give 'auto' or None")
        device = best_device() if distribute else torch.device("cpu")
        if init == "random":
            if tokenizer_dir is None:
                raise UserError("tokenizer_dir: None, but random weights have no tokenizer; give a folder with one")
            decoder = random_model(str(model), device=device, dtype=best_type(device))
            return cls(decoder, Tokenizer(tokenizer_dir), read_template(Path(tokenizer_dir)), None)
        folder = inside_run(find_folder(model, access_token=access_token))
        texts = Path(tokenizer_dir) if tokenizer_dir else texts_in(folder)
        tokenizer, chat = Tokenizer(texts), read_template(texts)
        return cls(open_model(folder, device=device, dtype=best_type(device)), tokenizer, chat, folder)

    def distribute(
        self,
        accelerator: str = "auto",
        devices: int | Literal["auto"] = 1,
        precision: str | None = None,
        quantize: str | None = None,
        fixed_kv_cache_size: int | Literal["max_model_supported"] | None = None,
    ) -> None:
        """Move the model to another device or type of numbers.

        Args:
            accelerator: auto, cpu, cuda, gpu or mps.
            devices: 1; `auto` is 1 too.
            precision: 32-true, 16-true, bf16-true, 64-true, bf16-mixed or 16-mixed; None for bfloat16 on an accelerator
                and the model's own type on a CPU.
            quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8: keep the blocks' matrices in 4 or 8 bits.
            fixed_kv_cache_size: tokens that the cache makes room for at once; None: it grows as it is needed.

        Raises:
            UserError: if there is no such device, or it takes more than one.
        """
        if devices not in (1, "auto"):
            raise UserError(f"devices: {devices} will not do; a model is on one device here, give 1")
        if precision is not None and precision not in TYPES:
            raise UserError(f"precision: {precision!r} is not known; give {', '.join(TYPES)}")
        most = self.config.block_size
        size = most if fixed_kv_cache_size == "max_model_supported" else fixed_kv_cache_size
        if size is not None and not 1 <= size <= most:
            raise UserError(f"fixed_kv_cache_size: {size} will not do; the model reads {most} tokens, give 1 to {most}")
        if quantize and precision in COMPUTE:
            raise UserError(f"quantize: {quantize} needs numbers of one type; give precision: bf16-true, or null")
        if quantize and self.adapted:
            raise UserError(
                f"quantize: {quantize} has no place under an adapter; litgpt merge_lora first, or give null"
            )
        device = device_named(accelerator)
        dtype = TYPES[precision] if precision else best_type(device)
        if quantize:  # matrices go to the device one by one, in their few bits
            retype(self.model, torch.device("cpu"), dtype)
            quantize_for_inference(self.model, quantize, device)
        retype(self.model, device, dtype)
        self.model.__dict__.pop("forward", None)  # of an earlier mixed precision
        if precision in COMPUTE:
            wrap_forward(self.model, torch.autocast(device.type, COMPUTE[precision]))
        self.cache_size = size

    def forward(
        self, input_ids: Tensor, target_ids: Tensor | None = None, loss_fn: Loss | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V), or (logits, loss) if targets are given.

        Args:
            input_ids: (B, T).
            target_ids: (B, T), usually `input_ids` again: the loss holds each token's scores against the next target;
                -100 is left out.
            loss_fn: of logits (N, V) and targets (N,); None for mean cross-entropy in nats.
        """
        logits = self.model(input_ids)
        if target_ids is None:
            return logits
        flat, targets = logits[:, :-1].flatten(0, 1), target_ids[:, 1:].flatten()
        return logits, (loss_fn or F.cross_entropy)(flat, targets)

    def state_dict(self, *arguments: Any, **settings: Any) -> Any:
        """The decoder's own, without a prefix."""
        return self.model.state_dict(*arguments, **settings)

    def load_state_dict(self, *arguments: Any, **settings: Any) -> Any:
        """The decoder's own."""
        return self.model.load_state_dict(*arguments, **settings)

    def save(self, out_dir: Path | str, prompt_style: PromptStyle | str | None = None) -> None:
        """Write the model as a folder that transformers loads, tokenizer included, with an adapter folded in.

        Args:
            out_dir: new or empty.
            prompt_style: named in the folder; None for the model's own, if it has one.
        """
        tokenizer_dir = self.tokenizer.folder
        tensors = adapt.merge_adapter(self.model) if self.adapted else self.model.named_parameters()
        save_model_folder(out_dir, config=self.config, tensors=tensors, tokenizer_dir=tokenizer_dir)
        if style := prompt_style or self.prompt_style:
            save_prompt_style(style, Path(out_dir))

    @property
    def adapted(self) -> bool:
        """Whether an adapter lies beside the model's weights."""
        return any(iter_adapted_layers(self.model))

    def prompt_tokens(self, prompt: str, sys_prompt: str | None = None, chat_template: bool | None = None) -> list[int]:
        """The tokens that the model reads for a prompt.

        Args:
            prompt: a text to go on with or, in the form that the model was trained with, what the user says.
            sys_prompt: what the system says; needs such a form.
            chat_template: False for the prompt as it is; True for the folder's chat template; None for the prompt style
                that the folder names, else its chat template, else the prompt as it is.

        Raises:
            UserError: if a template is asked for and the folder has none, or `sys_prompt` has no place.
        """
        return self._prompts().tokens(prompt, sys_prompt, chat_template)

    def replies(self, chat_template: bool | None = None) -> bool:
        """Whether a prompt is what a user says, and what is written a reply; else the text goes on from the prompt."""
        return self._prompts().wraps(chat_template)

    def _prompts(self) -> Prompts:
        return Prompts(self.tokenizer, self.chat, self.prompt_style)

    def generate(
        self,
        prompt: str,
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        *,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        chat_template: bool | None = None,
        on_token: Callable[[int], object] = lambda token: None,
    ) -> Any:
        """What the model writes after a prompt, without the prompt.

        Args:
            prompt, sys_prompt, chat_template: as in `prompt_tokens`.
            max_new_tokens: the most tokens to write; the model may end before that.
            temperature, top_k, top_p: as in `Sampling`.
            return_as_token_ids: give int64 token numbers (T,), with those of a stop string, in place of a text.
            stream: give an iterator over pieces of the text, or over token numbers, as they come.
            stop: texts that end it; not part of the result.
            seed: the same one gives the same text; None draws from torch's own generator.
            on_token: called with every token as it is chosen.

        Returns:
            A text; a tensor with `return_as_token_ids`; an iterator over pieces of either with `stream`.

        Raises:
            UserError: if a setting will not do or the text would be longer than the model reads.
        """
        stops = [stop] if isinstance(stop, str) else list(stop or [])
        if "" in stops:
            raise UserError("stop: '' ends every text; give texts of one character or more")
        read = self.prompt_tokens(prompt, sys_prompt, chat_template)
        stop_tokens, own_stops = self._prompts().stops(chat_template)
        stops += own_stops
        sampling = Sampling(temperature, top_k, top_p)
        check_room(self.model, read, max_new_tokens)
        device = self.model.embedding.weight.device
        tokens = generate(
            self.model,
            read,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=stop_tokens,
            generator=None if seed is None else torch.Generator(device).manual_seed(seed),
            cache_size=self.cache_size,
        )
        tokens = told(tokens, on_token)
        # a reply is a text of its own, what follows a bare prompt begins with the space that belongs there
        behind = [] if self.replies(chat_template) else read
        if return_as_token_ids:
            numbers = self._tokens_until(tokens, stops, behind) if stops else tokens
            return numbers if stream else torch.tensor(list(numbers), dtype=torch.int64)
        text = until(self.tokenizer.decode_stream(tokens, behind=behind), stops)
        return text if stream else "".join(text)

    def _tokens_until(self, tokens: Iterator[int], stops: list[str], behind: list[int]) -> Iterator[int]:
        """The tokens up to the one that completes a stop string."""
        seen: list[int] = []
        given = 0
        for _ in until(self.tokenizer.decode_stream(told(tokens, seen.append), behind=behind), stops):
            yield from seen[given:]
            given = len(seen)
        yield from seen[given:]

    def benchmark(self, num_iterations: int = 1, **settings: Any) -> tuple[str, dict[str, list[float]]]:
        """The last text that `generate(**settings)` writes, and how fast each of `num_iterations` was.

        The keys are LitGPT's: seconds in all and to the first piece, tokens, tokens a second, and GPU memory in GB.
        """
        told: dict[str, list[float]] = {}
        text = ""
        for _ in range(num_iterations):
            start, first = time.perf_counter(), None
            numbers = []
            for number in self.generate(**{**settings, "stream": True, "return_as_token_ids": True}):
                first = first or time.perf_counter() - start
                numbers.append(int(number))
            seconds = time.perf_counter() - start
            text = self.tokenizer.decode(numbers)
            memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
            values = (seconds, first or seconds, len(numbers), len(numbers) / seconds, memory)
            for key, value in zip(BENCHMARK_KEYS, values, strict=True):
                told.setdefault(key, []).append(value)
        return text, told
