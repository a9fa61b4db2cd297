"""The settings of `litgpt serve`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from litgpt.errors import UserError
from litgpt.recipe.bounds import Count, Fraction, Position, check_numbers
from litgpt.recipe.effect import check_effects
from litgpt.recipe.generate import InferencePrecision, InferenceQuantFormat, Temperature

Port = Annotated[int, Ge(0), Le(65535)]
Seconds = Annotated[float, Ge(0.001), Le(1e6)]
VideoPixels = Annotated[int, Ge(1), Le(10**15)]


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP, with the routes of OpenAI's API."""

    checkpoint_dir: Path
    """Folder of a model, of a run or of one of its steps, an adapter, or org/name on the hub."""
    quantize: InferenceQuantFormat | None = None
    """Quantize the matrices of the blocks to 4 or 8 bits: with bitsandbytes, or int8 and int4 without a package."""
    precision: InferencePrecision | None = None
    """Precision; null for bf16-true on an accelerator, and for the dtype of the files on a CPU."""
    temperature: Temperature = 0.8
    """Temperature of requests that do not set it."""
    top_k: Count | None = 50
    """Number of most likely tokens to sample among, of requests that do not set it; null for all."""
    top_p: Fraction = 1.0
    """Sum of probabilities to sample among, of requests that do not set it."""
    max_new_tokens: Count = 50
    """Maximum number of tokens of requests that do not set it."""
    devices: Count = 1
    """Number of devices: 1."""
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto"
    """The kind of device."""
    host: str = "127.0.0.1"
    """Address to listen on: this machine only; 0.0.0.0 for every network."""
    port: Port = 8000
    """Port to listen on; 0 for a free one."""
    api_key: str | None = field(default=None, repr=False)
    """The key that clients send as a bearer token; null for none."""
    stream: bool = False
    """Answer in pieces at `api_path`; OpenAI's routes do so by request."""
    openai_spec: bool = False
    """Serve only OpenAI's routes, and not `api_path`."""
    access_token: str | None = field(default=None, repr=False)
    """Hugging Face access token for gated models; null for HF_TOKEN or the token of `hf auth login`."""
    api_path: str = "/predict"
    """LitGPT's own route, which answers {"prompt": TEXT} with {"output": TEXT}."""
    timeout: Seconds = 30.0
    """Seconds that a request waits for its first token."""
    generate_strategy: Literal["sequential", "tensor_parallel"] | None = None
    """How several devices share a model: null, for one device."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """Folders of adapters of this model, by the names that clients choose them by."""
    served_model_name: str | None = None
    """Name of the model for clients; null for the name of its folder."""
    max_sequences: Count = 32
    """Maximum number of texts that are generated at a time, with each adapter too."""
    max_waiting: Count = 128
    """Maximum number of texts that wait; more requests are answered with status 429."""
    cache_tokens: Count | None = None
    """Maximum number of tokens whose keys and values are in memory, with each adapter too; null for max_sequences texts
    of the context."""
    prefill_chunk: Count = 512
    """Maximum number of prompt tokens that are processed between two tokens of the other texts."""
    max_body_bytes: Count = 4_000_000
    """Larger requests are refused."""
    max_images: Count = 16
    """Maximum number of images of a request, for models that see."""
    max_image_pixels: Count = 2**25
    """Maximum number of pixels of an image."""
    max_videos: Count = 4
    """Maximum number of videos of a request, for models that read videos."""
    max_video_pixels: VideoPixels = 2**33
    """Maximum number of pixels of all frames of a video together: two minutes of 1080p by default."""
    max_audios: Count = 16
    """Maximum number of sounds of a request, for models that hear."""
    split_sounds: bool = False
    """Split a sound that is longer than the model hears into equal pieces, each a sound of its own; else it is an
    error."""
    video_sounds: bool = False
    """Read the sound tracks of videos with their frames, by a model that hears videos."""
    fetch_urls: bool = False
    """Fetch images, videos and sounds at http and https URLs in messages; only from public addresses, and not through
    a proxy."""
    max_fetch_mb: Annotated[float, Ge(0.001), Le(1e5)] = 20.0
    """Most MB of all files at URLs of a request together, which are in memory."""
    fetch_seconds: Annotated[float, Ge(0.01), Le(86400)] = 30.0
    """Most time for all files at URLs of a request, with their redirects and three attempts each."""
    max_fetches: Annotated[int, Ge(1), Le(256)] = 8
    """Maximum number of requests whose files at URLs are fetched or read at a time; others wait."""
    grace_seconds: Position = 30
    """Seconds that running requests have to finish after SIGTERM or Ctrl-C."""

    @property
    def model_name(self) -> str:
        """Name of the model for clients."""
        return self.served_model_name or self.checkpoint_dir.name

    def __post_init__(self) -> None:
        check_numbers(self)
        check_api_key(self.api_key)
        names, other, cure = (
            ("max_fetch_mb", "fetch_seconds", "max_fetches"),
            "fetch_urls: false",
            "set fetch_urls: true",
        )
        check_effects(self, "", *names, have_effect=self.fetch_urls, other=other, cure=cure)
        if self.model_name in self.adapters:
            raise UserError(f"adapters: {self.model_name} is the name of the model itself; set served_model_name")
        if self.adapters and self.quantize is not None:
            raise UserError(f"quantize: {self.quantize} is not supported with adapters; leave it out")
        if self.devices != 1 or self.generate_strategy is not None:
            key = "devices" if self.devices != 1 else "generate_strategy"
            value, cure = getattr(self, key), "set 1" if key == "devices" else "leave it out"
            raise UserError(f"{key}: {value} is not supported, because a server uses one device; {cure}")
        if not self.api_path.startswith("/") or self.api_path.startswith(("/v1/", "/health", "/metrics")):
            raise UserError(f"api_path: {self.api_path} is not a path of its own; set /predict, for example")
        if self.openai_spec and self.stream:
            raise UserError("stream: true has no effect with openai_spec: true; leave it out")


def check_api_key(api_key: str | None) -> None:
    """Check that a key can be sent as a bearer token.

    Raises:
        UserError: if it is empty, or has characters that a header cannot have.
    """
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise UserError("api_key: is empty or not printable ASCII; use letters and digits, or leave it out")
