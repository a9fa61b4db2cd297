"""The settings of `litgpt generate` and of its relatives."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Fraction, Seed, check_numbers
from litgpt.recipe.effect import check_effects
from litgpt.recipe.parallel import ParallelArgs

Penalty = Annotated[float, Ge(-2.0), Le(2.0)]
LogprobCount = Annotated[int, Ge(0), Le(1000)]
Temperature = Annotated[float, Ge(0.0), Le(1e6)]
InferenceQuantFormat = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8", "int8", "int4"]
InferencePrecision = Literal["32-true", "16-true", "bf16-true", "64-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The model of a command that generates text, and how its texts are generated."""

    sys_prompt: str | None = None
    """The system's message; for models with a chat template."""
    chat_template: bool | None = None
    """Apply the folder's chat template to the prompt: false for never, null for its prompt style or template if any."""
    max_new_tokens: Count = 50
    """Maximum number of tokens of a text; the model may stop earlier."""
    top_k: Count | None = 50
    """Sample among this many of the most likely tokens; null for all."""
    top_p: Fraction = 1.0
    """Sample among the most likely tokens whose probabilities sum to this; 0 for the most likely one."""
    temperature: Temperature = 0.8
    """Sampling temperature: below 1 for more likely tokens, above 1 for more varied ones; 0 for the most likely one."""
    min_p: Fraction = 0.0
    """Sample among the tokens whose probability is at least this share of the largest."""
    repetition_penalty: Annotated[float, Ge(0.01), Le(100.0)] = 1.0
    """Make the tokens of prompt and text less likely: positive logits are divided by it, negative ones multiplied."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logit of each token that is in the text."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from the logit of a token for each time that it is in the text."""
    json_schema: str | None = None
    """A JSON schema that each text is valid under, or the path of a file with one."""
    regex: str | None = None
    """A regular expression that each text matches."""
    stop: str | list[str] | None = None
    """A string or a list of strings at which a text ends; they are not printed."""
    split_sounds: bool = False
    """Split a sound that is longer than the model hears into equal pieces, each a sound of its own; else it is an
    error."""
    video_sounds: bool = False
    """Read the sound tracks of videos with their frames, by a model that hears videos."""
    seed: Seed = 1234
    """Random seed of the sampling."""
    quantize: InferenceQuantFormat | None = None
    """Quantize the matrices of the blocks to 4 or 8 bits: with bitsandbytes, or int8 and int4 without a package."""
    precision: InferencePrecision | None = None
    """Precision; null for bf16-true on an accelerator, and for the dtype of the files on a CPU."""
    compile: bool = False
    """Compile the blocks with torch.compile: a minute slower to start, then faster; not for mixtures of experts."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.json_schema is not None and self.regex is not None:
            raise UserError("regex: a text follows either json_schema or regex; leave one of them out")


MEDIA_NOUNS = {"image": "an image", "video": "a video", "audio": "a sound"}
"""What the paths of media are of, by the field that holds them."""


@dataclass(frozen=True, kw_only=True)
class WrittenTexts(GenerationSettings):
    """The prompts of a command that writes their texts."""

    prompt: str = "What food do llamas eat?"
    """The user's message or, without a chat template, the text to continue."""
    image: Path | list[Path] | None = None
    """An image or a list of images, for the tags <image> in the prompt, or before it; for models that see."""
    video: Path | list[Path] | None = None
    """A video or a list of videos, for the tags <video> in the prompt, or before it; for models that read videos."""
    audio: Path | list[Path] | None = None
    """A sound or a list of sounds, for the tags <audio> in the prompt, or before it; for models that hear."""
    prompts: Path | None = None
    """A file of prompts instead: a .txt with one a line, or a .jsonl with `prompt` or `messages` in each row."""
    output: Path | None = None
    """The .jsonl file for the texts of `prompts`, in their order; null for stdout."""
    logprobs: LogprobCount | None = None
    """Write the log-probability of each token and of this many of the most likely ones, with `prompts`."""
    num_samples: Count = 1
    """Number of texts to generate, one after the other."""
    stream: bool = True
    """Print the text as it is generated; false to print it when it is complete."""

    def __post_init__(self) -> None:
        super().__post_init__()
        has_file = self.prompts is not None
        other, cure = "a single prompt", "set prompts: FILE too"
        check_effects(self, "", "output", "logprobs", have_effect=has_file, other=other, cure=cure)
        keys = ("stream", "prompt", "image", "video", "audio")
        check_effects(self, "", *keys, have_effect=not has_file, other="prompts", cure="leave it out")
        for kind, paths in self.media.items():
            for path in paths:
                if not path.is_file():
                    raise UserError(f"{kind}: {path} is not a file; give the path of {MEDIA_NOUNS[kind]}")
        if self.prompts is not None and not self.prompts.is_file():
            raise UserError(f"prompts: {self.prompts} is not a file; use a .txt with one prompt a line, or a .jsonl")

    @property
    def media(self) -> dict[str, list[Path]]:
        """The images, videos and sounds of the prompt, by kind; without kinds that it has none of."""
        given = {kind: getattr(self, kind) for kind in MEDIA_NOUNS}
        return {kind: value if isinstance(value, list) else [value] for kind, value in given.items() if value}


@dataclass(frozen=True)
class GenerateWithModel(WrittenTexts):
    """The model of a command that generates text with it."""

    checkpoint_dir: Path
    """Folder of a model, of a run or of one of its steps, or org/name on the hub (downloaded if necessary)."""


@dataclass(frozen=True)
class Generate(GenerateWithModel):
    """Generate text, or images, with a model."""

    image_out: Path | None = field(default=None, kw_only=True)
    """The PNG file of an image that the model writes in reply, instead of a text; with num_samples: 2 or more, files
    with a number before the suffix. For models that write images."""
    guidance: Annotated[float, Ge(0.0), Le(100.0)] = field(default=1.0, kw_only=True)
    """Guidance of the image: above 1 it follows the prompt more closely, at twice the work; 3 is usual. Needs a model
    trained with data.null_prompt, or Janus (5 is usual)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        draws = self.image_out is not None
        check_effects(self, "", "guidance", have_effect=draws, other="a text", cure="set image_out: FILE.png too")
        names = ("prompts", "max_new_tokens", "json_schema", "regex", "stop", "stream", "compile")
        check_effects(self, "", *names, have_effect=not draws, other="image_out", cure="leave it out")
        if self.image_out is not None and self.image_out.suffix.lower() != ".png":
            raise UserError(f"image_out: {self.image_out} does not end in .png; set {self.image_out.stem}.png")


@dataclass(frozen=True)
class GenerateFinetuned(WrittenTexts):
    """Generate text with a finetuned model."""

    weights_key: ClassVar[str]
    """The key of the folder of the finetuned weights."""
    needs_adapter: ClassVar[bool] = False
    """Whether they are those of an adapter."""

    checkpoint_dir: Path
    """Folder of the model that was finetuned, or org/name on the hub (downloaded if necessary)."""
    input: str = ""
    """More text for the prompt, which a prompt style such as alpaca's writes apart."""
    max_new_tokens: Count = field(default=100, kw_only=True)
    """Maximum number of tokens of a text; the model may stop earlier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        has_prompt = self.prompts is None
        check_effects(self, "", "input", have_effect=has_prompt, other="prompts", cure="leave it out")
        if self.input and self.chat_template is not None:
            value = str(self.chat_template).lower()
            raise UserError(
                f"input: needs the folder's prompt style, not chat_template: {value}; leave one of them out"
            )

    @property
    def weights_folder(self) -> Path:
        """The folder of the finetuned weights; LitGPT's names of its files, such as lit_model.pth, need not exist."""
        path: Path = getattr(self, self.weights_key)
        return path.parent if path.name.startswith("lit_model") and not path.is_dir() else path


@dataclass(frozen=True)
class GenerateFull(GenerateFinetuned):
    """Generate text with a model whose weights were all finetuned."""

    weights_key = "finetuned_path"

    finetuned_path: Path = Path("out/finetune/full/final")
    """Folder of the finetuned weights, or their file; tokenizer and prompt format are its own, if it has them."""


@dataclass(frozen=True)
class GenerateAdapter(GenerateFinetuned):
    """Generate text with an adapter and its base model."""

    weights_key = "adapter_path"
    needs_adapter = True

    adapter_path: Path = Path("out/finetune/adapter/final")
    """Folder of the adapter, or its file; tokenizer and prompt format are its own, if it has them."""


@dataclass(frozen=True)
class GenerateAdapterV2(GenerateAdapter):
    """Generate text with an adapter and its base model."""

    adapter_path: Path = Path("out/finetune/adapter-v2/final")
    """Folder of the adapter, or its file; tokenizer and prompt format are its own, if it has them."""


@dataclass(frozen=True)
class GenerateSpeculatively(WrittenTexts):
    """Generate text with a model, faster by the proposals of a smaller one."""

    draft_model_checkpoint_dir: Path
    """Folder or name of the small model, which has the same tokenizer."""
    target_model_checkpoint_dir: Path
    """Folder or name of the model whose texts are generated."""
    speculative_k: Annotated[int, Ge(1), Le(64)] = 3
    """Number of tokens that the small model proposes in a step."""


@dataclass(frozen=True)
class GenerateSplit(GenerateWithModel, ABC):
    """Generate text with a model that is split over devices."""

    devices: int | Literal["auto"] = "auto"
    """Number of devices of this machine; auto or -1 for all GPUs, or one CPU process without GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.devices not in ("auto", -1) and not 1 <= int(self.devices) <= 2**16:
            raise UserError(f"devices: {self.devices} is not valid; use auto or a number from 1")

    @abstractmethod
    def lay_out(self, devices: int) -> ParallelArgs:
        """The layout of the model on several devices."""


@dataclass(frozen=True)
class GenerateTP(GenerateSplit):
    """Generate text with a model whose matrices are split over devices (tensor parallelism)."""

    def lay_out(self, devices: int) -> ParallelArgs:
        """Tensor parallelism, for any number of tokens."""
        return ParallelArgs(tensor=devices, sequence=False)


@dataclass(frozen=True)
class GenerateSequentially(GenerateSplit):
    """Generate text with a model whose layers are split over devices, which compute one after the other."""

    def lay_out(self, devices: int) -> ParallelArgs:
        """A stage of a pipeline on each device."""
        return ParallelArgs(pipeline=devices)
