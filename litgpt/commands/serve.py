"""`litgpt serve`: load a model and answer requests until a signal."""

from pathlib import Path

from litgpt.api import LLM
from litgpt.errors import UserError
from litgpt.infer.engine import Engine
from litgpt.infer.shared_weights import share_weights
from litgpt.messages import print_message
from litgpt.recipe.serve import Serve

try:
    from litgpt.infer.server.app import Server, ServerSettings, build_app
    from litgpt.infer.server.contents import MediaLimits
    from litgpt.infer.server.engine_thread import EngineThread
    from litgpt.infer.server.listener import open_socket, run_app
    from litgpt.infer.server.model import Defaults, ServedModel
    from litgpt.infer.server.url_files import FetchLimits
except ImportError as error:
    raise UserError(f"serve: {error.name} is not installed: pip install 'litgpt[serve]'") from None


def run(recipe: Serve) -> None:
    """Load the model and serve it."""
    listener = open_socket(recipe.host, recipe.port)
    app = build_app(build_server(recipe))
    listener.listen()  # before the address is printed, so that a client at once is not refused
    address, port = listener.getsockname()[:2]
    print_message(f"Serving a chat page at http://{address}:{port}; OpenAI clients use http://{address}:{port}/v1")
    run_app(app, listener, grace_seconds=recipe.grace_seconds)


def build_server(recipe: Serve) -> Server:
    """The server of a model and its adapters."""
    base = LLM.load(recipe.checkpoint_dir, access_token=recipe.access_token, distribute=None)
    fetch_limits = build_fetch_limits(recipe, base)
    if recipe.adapters:
        base.distribute(accelerator="cpu", precision=recipe.precision)
    adapted = {name: load_adapted(name, folder, base, recipe) for name, folder in recipe.adapters.items()}
    models = []
    for name, llm in {recipe.model_name: base, **adapted}.items():
        llm.distribute(accelerator=recipe.accelerator, precision=recipe.precision, quantize=recipe.quantize)
        llm.split_sounds, llm.video_sounds = recipe.split_sounds, recipe.video_sounds
        llm.max_video_pixels = recipe.max_video_pixels
        models.append(build_model(name, recipe.adapters.get(name, recipe.checkpoint_dir), llm, recipe))
    settings = ServerSettings(
        api_key=recipe.api_key,
        max_body_bytes=recipe.max_body_bytes,
        timeout=recipe.timeout,
        predict_path=None if recipe.openai_spec else recipe.api_path,
        stream=recipe.stream,
        fetch_limits=fetch_limits,
    )
    return Server(models, EngineThread([model.engine for model in models], recipe.max_waiting), settings)


def build_fetch_limits(recipe: Serve, llm: LLM) -> FetchLimits | None:
    """The limits of files at URLs; None to fetch none.

    Raises:
        UserError: if they are to be fetched for a model that reads no media.
    """
    if not recipe.fetch_urls:
        return None
    if llm.prompt_encoder().open_placer() is None:
        raise UserError("fetch_urls: true has no effect on a model that reads no media; leave it out")
    return FetchLimits(recipe.max_fetch_mb, recipe.fetch_seconds, recipe.max_fetches, recipe.max_waiting)


def load_adapted(name: str, folder: Path, base: LLM, recipe: Serve) -> LLM:
    """The model with an adapter, whose other weights are those of its base in memory.

    Raises:
        UserError: if the folder is not an adapter of this base.
    """
    try:
        llm = LLM.load(folder, access_token=recipe.access_token, distribute=None)
    except UserError as error:
        raise UserError(f"adapters: {name}: {error.detail}") from None
    if not share_weights(llm.model, base.model):
        raise UserError(
            f"adapters: {name}: {folder} is not an adapter of {recipe.checkpoint_dir}; serve it with its own base"
        )
    return llm


def build_model(name: str, folder: Path, llm: LLM, recipe: Serve) -> ServedModel:
    """A model with an engine of its own, because keys and values of models differ."""
    counts = {"image": recipe.max_images, "video": recipe.max_videos, "audio": recipe.max_audios}
    limits = MediaLimits(counts, recipe.max_image_pixels, recipe.max_video_pixels)
    defaults = Defaults(recipe.max_new_tokens, recipe.temperature, recipe.top_k, recipe.top_p, limits)
    engine = Engine(
        llm.model,
        max_sequences=recipe.max_sequences,
        cache_tokens=recipe.cache_tokens,
        prefill_chunk=recipe.prefill_chunk,
    )
    return ServedModel(name, folder, engine, llm.prompt_encoder(), defaults)
