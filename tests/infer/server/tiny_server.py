"""A server with a small random model, in this process."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import uvicorn

from litgpt.commands.serve import build_server
from litgpt.data.tokenizer import train_tokenizer
from litgpt.infer.server.app import Server, build_app
from litgpt.infer.server.listener import open_socket
from litgpt.model.config import Config
from litgpt.model.gpt import GPT
from litgpt.model.init import initialize
from litgpt.recipe.serve import Serve
from litgpt.store.save_model import save_model_folder

TEMPLATE = (
    "{% if tools %}{{ tools | length }} tools{% endif %}{% for message in messages %}<|bos|>{{ message.role }}: "
    "{{ message.content }}<|eos|>{% endfor %}{% if add_generation_prompt %}<|bos|>assistant: {% endif %}"
)
SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "intermediate_size": 48, "block_size": 256, "padded_vocab_size": 400}
KEY = "secret"


def write_tiny_model(folder: Path, seed: int = 1) -> None:
    """Write the folder of a model, with a tokenizer and a chat template."""
    text = "the fox jumps over a lazy dog and the dog does not mind it because dogs are kind to foxes"
    train_tokenizer([text] * 20, "bpe", 300, folder.parent / "tokenizer")
    settings = json.loads((folder.parent / "tokenizer" / "tokenizer_config.json").read_text())
    (folder.parent / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": TEMPLATE})
    )
    config = Config.from_name("pythia-14m", **SHAPE)
    model = GPT(config)
    initialize(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that texts vary
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    save_model_folder(folder, config=config, tensors=tensors, tokenizer_dir=folder.parent / "tokenizer")


@contextlib.contextmanager
def run_server(recipe: Serve) -> Iterator[tuple[str, Server]]:
    """The address of a server, and the server, which is stopped at the end."""
    server = build_server(recipe)
    listener = open_socket("127.0.0.1", 0)
    uvicorn_server = uvicorn.Server(uvicorn.Config(build_app(server), log_level="warning"))
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
    listener.listen()
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    uvicorn_server.should_exit = True
    thread.join(20)
    assert not thread.is_alive() and not server.thread.is_alive()


def wait_until_idle(server: Server) -> None:
    end = time.monotonic() + 10
    while server.thread.has_work and time.monotonic() < end:
        time.sleep(0.02)
    assert not server.thread.has_work
