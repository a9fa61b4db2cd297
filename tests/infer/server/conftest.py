"""The server of these tests."""

from collections.abc import Iterator

import pytest

from litgpt.infer.server.app import Server
from litgpt.recipe.serve import Serve
from tests.infer.server.tiny_server import KEY, run_server, write_tiny_model


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    """The address of a server with a small random model, and the server."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    write_tiny_model(folder)
    with run_server(
        Serve(checkpoint_dir=folder, api_key=KEY, max_waiting=40, max_sequences=8, max_new_tokens=12)
    ) as started:
        yield started
