"""The Python API: load a model from a folder or by name, generate text with it, call it."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt import adapt
from litgpt.adapt.layers import iter_adapted_layers
from litgpt.adapt.quantization import quantize_for_inference
from litgpt.data.media.media_steps import open_media_steps
from litgpt.data.render.chat_template import ChatTemplate, read_template
from litgpt.data.render.prompt_format import build_style_files
from litgpt.data.render.prompt_styles import PromptStyle, parse_style
from litgpt.data.tokenizer import Tokenizer
from litgpt.errors import UserError
from litgpt.files import extend_checkpoint_dir
from litgpt.infer.benchmark import BENCHMARK_KEYS
from litgpt.infer.benchmark import benchmark_dict_to_markdown_table as benchmark_dict_to_markdown_table
from litgpt.infer.kept_engine import KeptEngine
from litgpt.infer.lightning_trainer import Preprocessor, load_trainer_weights
from litgpt.infer.load import (
    AUTOCAST_DTYPES,
    WEIGHT_DTYPES,
    build_random_model,
    convert_model,
    find_device,
    find_folder,
    find_format_folder,
    find_tokenizer_folder,
    open_model,
    resolve_model_folder,
    select_device,
    select_dtype,
)
from litgpt.infer.marked_messages import list_given_media
from litgpt.infer.prompt_texts import generate_list, generate_text, refuse_with_list
from litgpt.infer.prompts import PromptEncoder, find_prompt_style, open_prompt_placer
from litgpt.infer.requests import check_tokens
from litgpt.infer.text_settings import prepare_texts
from litgpt.messages import print_message
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.surgery import wrap_forward
from litgpt.store.save_model import save_model_folder

IGNORED = -100  # of targets, as in torch.nn.functional.cross_entropy
Loss = Callable[[Tensor, Tensor], Tensor]
SPLIT_COMMANDS = "the commands litgpt generate_tp and generate_sequentially"


def check_ids(key: str, ids: Tensor, config: Config) -> None:
    """Check that a model has all of these tokens, of any shape.

    Raises:
        UserError: naming the key and a token that it does not have, or if there are none.
    """
    if not ids.numel():
        raise UserError(f"{key}: has no tokens; set at least one")
    smallest, largest = torch.stack(ids.aminmax()).tolist()
    check_tokens(key, (smallest, largest), config.padded_vocab_size or 0)


class LLM(nn.Module):
    """A language model with its tokenizer; created by `LLM.load`.

    Attributes:
        model: the decoder, `model(ids (B, T)) -> logits (B, T, V)`.
        tokenizer: encodes and decodes text.
        chat: the folder's chat template, or None.
        prompt_style: the style in the folder's prompt_style.yaml, or None; may be assigned.
        config: the model's shape.
        checkpoint_dir: the folder that it was loaded from; None for random weights.
        kept_engine: makes and keeps the engine of `generate`; may be assigned.
        split_sounds: whether a sound that is longer than the model hears is split into equal pieces, each a sound of
            its own; otherwise it is an error. May be assigned.
        video_sounds: whether the sound tracks of videos are read with their frames. May be assigned.
        max_video_pixels: the pixels of all decoded frames of a video; None for any number. May be assigned.
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
        self.prompt_style: PromptStyle | None = find_prompt_style(tokenizer.folder, chat)
        self.kept_engine = KeptEngine()
        self.split_sounds = self.video_sounds = False
        self.max_video_pixels: int | None = None
        self._is_mixed = False
        tokenizer.check_rows(self.config.padded_vocab_size or 0)
        print_message(*tokenizer.warnings)
        self.eval()

    @classmethod
    def load(
        cls,
        model: Path | str,
        init: Literal["pretrained", "random"] = "pretrained",
        tokenizer_dir: Path | str | None = None,
        access_token: str | None = None,
        distribute: Literal["auto"] | None = "auto",
        *,
        base: Path | str | None = None,
    ) -> "LLM":
        """Load a model from a folder (of Hugging Face, LitGPT, a run or one of its steps, an adapter) or by name.

        Args:
            model: a folder, or the hub's org/name: downloaded into `checkpoints/` if necessary.
            init: `random` initializes a model with the shape of a known one.
            tokenizer_dir: a folder with another tokenizer; required with `random`.
            access_token: for gated models; None to use HF_TOKEN.
            distribute: `auto` to put the model on the accelerator in bfloat16, or on the CPU if there is none; None for
                the CPU. On the CPU it keeps the type of the files.
            base: folder or name of the model that was finetuned, for an adapter, or a folder without a tokenizer; None
                for the one that the adapter names.

        Raises:
            UserError: if the model is not found, or its files are damaged.
        """
        if init not in ("pretrained", "random"):
            raise UserError(f"init: {init!r} is not known; set pretrained or random")
        if distribute not in ("auto", None):
            raise UserError(f"distribute: {distribute!r} is not known; set 'auto' or None")
        device = select_device() if distribute else torch.device("cpu")
        if init == "random":
            if tokenizer_dir is None:
                raise UserError("tokenizer_dir: None, but random weights have no tokenizer; set a folder with one")
            decoder = build_random_model(str(model), device=device, dtype=select_dtype(device))
            folder = extend_checkpoint_dir(Path(tokenizer_dir))
            return cls(decoder, Tokenizer(folder), read_template(folder), None)
        folder = resolve_model_folder(find_folder(model, access_token=access_token))
        base = resolve_model_folder(find_folder(base, access_token=access_token)) if base else None
        given = extend_checkpoint_dir(Path(tokenizer_dir)) if tokenizer_dir else None
        tokenizer_folder = given or find_tokenizer_folder(folder, base)
        format_folder = given or find_format_folder(folder, base)
        tokenizer, chat = Tokenizer(tokenizer_folder), read_template(format_folder)
        llm = cls(open_model(folder, device=device, dtype=select_dtype(device), base=base), tokenizer, chat, folder)
        llm.prompt_style = find_prompt_style(format_folder, chat)
        return llm

    def distribute(
        self,
        accelerator: str = "auto",
        devices: int | Literal["auto"] = 1,
        precision: str | None = None,
        quantize: str | None = None,
        generate_strategy: str | None = None,
        fixed_kv_cache_size: int | Literal["max_model_supported"] | None = None,
    ) -> None:
        """Move the model to another device, or convert it to another type.

        Args:
            accelerator: auto, cpu, cuda, gpu or mps.
            devices: 1; `auto` is 1 too.
            precision: 32-true, 16-true, bf16-true, 64-true, bf16-mixed or 16-mixed; None for bfloat16 on an accelerator
                and the model's own type on a CPU.
            quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq, bnb.int8 or int8 for the blocks' matrices in few bits.
            generate_strategy: None, because LitGPT's sequential and tensor_parallel are for several devices.
            fixed_kv_cache_size: number of tokens to allocate the cache for; None for a cache that grows.

        Raises:
            UserError: if there is no such device, or a setting is not supported.
        """
        if generate_strategy is not None:
            raise UserError(
                f"generate_strategy: {generate_strategy!r} with devices: {devices} is not supported, because an LLM "
                f"runs on one device; set None and devices: 1, or use {SPLIT_COMMANDS}"
            )
        if devices not in (1, "auto"):
            raise UserError(
                f"devices: {devices} is not supported, because an LLM runs on one; set 1, or use {SPLIT_COMMANDS}"
            )
        if precision is not None and precision not in WEIGHT_DTYPES:
            raise UserError(f"precision: {precision!r} is not known; set {', '.join(WEIGHT_DTYPES)}")
        limit = self.config.block_size
        size = limit if fixed_kv_cache_size == "max_model_supported" else fixed_kv_cache_size
        if size is not None and not 1 <= size <= limit:
            raise UserError(f"fixed_kv_cache_size: {size} is not within the model's context; set 1 to {limit}")
        if quantize and precision in AUTOCAST_DTYPES:
            raise UserError(
                f"quantize: {quantize} is not supported with {precision}; set precision: bf16-true, or null"
            )
        if quantize and self.adapted:
            raise UserError(f"quantize: {quantize} is not supported with an adapter; merge it first, or set null")
        self._convert(find_device(accelerator), precision, quantize)
        self.kept_engine = KeptEngine(size)

    def _convert(self, device: torch.device, precision: str | None, quantize: str | None) -> None:
        dtype = WEIGHT_DTYPES[precision] if precision else select_dtype(device)
        if quantize:  # matrices are moved to the device one by one, as they are quantized
            convert_model(self.model, torch.device("cpu"), dtype)
            quantize_for_inference(self.model, quantize, device)
        convert_model(self.model, device, dtype)
        if self._is_mixed:
            self.model.__dict__.pop("forward")
        self._is_mixed = precision in AUTOCAST_DTYPES
        if precision in AUTOCAST_DTYPES:
            wrap_forward(self.model, torch.autocast(device.type, AUTOCAST_DTYPES[precision]))

    def forward(
        self, input_ids: Tensor, target_ids: Tensor | None = None, loss_fn: Loss | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, T, V), or (logits, loss) if targets are given.

        Args:
            input_ids: (B, T).
            target_ids: (B, T), usually `input_ids` again: the logits of each token are compared with the next target;
                -100 is ignored.
            loss_fn: of logits (N, V) and targets (N,); None for mean cross-entropy in nats.

        Raises:
            UserError: if there are no tokens, or the model does not have one of them.
        """
        check_ids("input_ids", input_ids, self.config)
        if target_ids is not None and len(trained := target_ids[target_ids != IGNORED]):
            check_ids("target_ids", trained, self.config)
        rows = {}
        if target_ids is not None and self.config.has_prompt_blocks:  # a prompt ends at the first target
            rows = {"prompts_BT": (target_ids != IGNORED).cumsum(1) == 0}
        logits = self.model(input_ids, **rows)
        if target_ids is None:
            return logits
        flat, targets = logits[:, :-1].flatten(0, 1), target_ids[:, 1:].flatten().long()
        return logits, (loss_fn or F.cross_entropy)(flat, targets)

    @property
    def preprocessor(self) -> Preprocessor:
        """Encodes and decodes text, on the device of the model."""
        return Preprocessor(self.tokenizer, self.model.embedding.weight.device)

    def trainer_setup(self, trainer_ckpt: Path | str | None = None) -> None:
        """Prepare the model for Lightning's Trainer; call it in `LightningModule.setup`.

        Args:
            trainer_ckpt: a checkpoint of a Trainer with the weights to start from; None for those that are loaded.

        Raises:
            UserError: if the checkpoint is damaged, or does not have the weights of this model.
        """
        self.train()
        if trainer_ckpt is not None:
            load_trainer_weights(self.model, Path(trainer_ckpt))

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """The state dict of `model`, without a prefix; of a module that contains this one, with its own names."""
        if prefix:
            return super().state_dict(*args, prefix=prefix, **kwargs)
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the state dict of `model`."""
        return self.model.load_state_dict(*args, **kwargs)

    def save(self, out_dir: Path | str, prompt_style: PromptStyle | str | None = None) -> None:
        """Save the model and its tokenizer as a Hugging Face folder; an adapter is merged.

        Args:
            out_dir: new or empty.
            prompt_style: saved in the folder; None for the model's own, if it has one.
        """
        tokenizer_dir = self.tokenizer.folder
        tensors = adapt.merge_adapter(self.model) if self.adapted else self.model.named_parameters()
        style = prompt_style or self.prompt_style
        files = build_style_files(parse_style(style), self.tokenizer) if style else None
        save_model_folder(out_dir, config=self.config, tensors=tensors, tokenizer_dir=tokenizer_dir, prompt_files=files)

    @property
    def adapted(self) -> bool:
        """Whether the model has an adapter."""
        return any(iter_adapted_layers(self.model))

    def prompt_tokens(self, prompt: str, sys_prompt: str | None = None, chat_template: bool | None = None) -> list[int]:
        """The token ids of a prompt in the format of the model.

        Args:
            prompt: the user's message or, without a chat template, a text to continue.
            sys_prompt: the system's message; requires a chat template or prompt style.
            chat_template: False for the prompt as it is; True for the folder's chat template; None for the folder's
                prompt style, else its chat template, else the prompt as it is.

        Raises:
            UserError: if a template is requested and the folder has none, or `sys_prompt` is not supported.
        """
        return list(self.prompt_encoder().encode(prompt, sys_prompt, chat_template).ids)

    def replies(self, chat_template: bool | None = None) -> bool:
        """Whether the generated text is a reply to the prompt; otherwise it continues the prompt."""
        return self.prompt_encoder().has_format(chat_template)

    def prompt_encoder(self) -> PromptEncoder:
        """The formats of prompts.

        Raises:
            UserError: if `split_sounds` is set for a model that does not hear, or `video_sounds` for one that does not
                hear videos.
        """
        placer = partial(open_prompt_placer, self.tokenizer, self.config, max_video_pixels=self.max_video_pixels)
        steps = open_media_steps(
            self.tokenizer.folder, self.config, split_sounds=self.split_sounds, video_sounds=self.video_sounds
        )
        return PromptEncoder(self.tokenizer, self.chat, self.prompt_style, placer, steps)

    def generate(
        self,
        prompt: str | Sequence[str],
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
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        json_schema: str | dict[str, Any] | None = None,
        regex: str | None = None,
        chat_template: bool | None = None,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        on_token: Callable[[int], object] | None = None,
    ) -> Any:
        """The text that the model generates after a prompt, without the prompt; or after each of several prompts.

        Args:
            prompt, sys_prompt, chat_template: a prompt, or a list of them; the others as in `prompt_tokens`.
            max_new_tokens: the maximum number of tokens; the model may stop earlier.
            temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty: as in `Sampling`.
            json_schema, regex: what the text is valid under or matches; see `ConstraintCompiler.compile`.
            return_as_token_ids: return int64 token ids (T,), including those of a stop string, instead of a text.
            stream: return an iterator over pieces of the text, or over token ids, of a single prompt.
            stop: strings that end the text; not part of the result.
            images, videos, audios: lists of paths, bytes or PIL images, for tags (`<image>`) or before the prompt.
            seed: of the random numbers, seed + 1 for the second of several texts, ...; None for torch's generator.
            on_token: called with each token id as it is sampled, of a single prompt.

        Returns:
            A text; a tensor with `return_as_token_ids`; an iterator with `stream`; a list for a list of prompts.

        Raises:
            UserError: if a setting is out of range, or the text would exceed the model's context.
        """
        encoder = self.prompt_encoder()
        given: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        given |= {"repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty, "stop": stop}
        given |= {"frequency_penalty": frequency_penalty, "max_new_tokens": max_new_tokens, "regex": regex}
        given |= {"json_schema": json_schema, "chat_template": chat_template}
        settings = prepare_texts(encoder, rows=self.config.padded_vocab_size or 0, **given)
        media = {"image": images, "video": videos, "audio": audios}
        if isinstance(prompt, str):
            encoded = encoder.encode(prompt, sys_prompt, chat_template, sources=list_given_media(media))
            given = {"as_token_ids": return_as_token_ids, "stream": stream, "on_token": on_token, "seed": seed}
            return generate_text(self.kept_engine, self.model, self.tokenizer, encoded, settings, **given)
        refuse_with_list(stream=stream, on_token=on_token)
        prompts = encoder.encode_list(prompt, sys_prompt, chat_template, media)
        texts = generate_list(self.kept_engine, self.model, self.tokenizer, prompts, settings, seed=seed)
        return [torch.tensor(text.ids, dtype=torch.int64) if return_as_token_ids else text.text for text in texts]

    def benchmark(self, num_iterations: int = 1, **settings: Any) -> tuple[str, dict[str, list[float]]]:
        """Call `generate(**settings)` repeatedly; returns the last text and, for each call, the figures of LitGPT.

        They are seconds in total and to the first token, number of tokens, tokens per second, and GPU memory in GB.
        """
        figures: dict[str, list[float]] = {}
        text = ""
        for _ in range(num_iterations):
            start, first = time.perf_counter(), None
            tokens = []
            for token in self.generate(**{**settings, "stream": True, "return_as_token_ids": True}):
                first = first or time.perf_counter() - start
                tokens.append(int(token))
            seconds = time.perf_counter() - start
            text = self.tokenizer.decode(tokens)
            memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
            values = (seconds, first or seconds, len(tokens), len(tokens) / seconds, memory)
            for key, value in zip(BENCHMARK_KEYS, values, strict=True):
                figures.setdefault(key, []).append(value)
        return text, figures
