"""The settings of servers: what is refused before a model is loaded."""

from pathlib import Path
from typing import Any

import pytest

from litgpt.errors import UserError
from litgpt.recipe.board import Board
from litgpt.recipe.serve import Serve


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_key": ""}, "api_key: is empty or not printable ASCII; use letters and digits, or leave it out"),
        ({"api_key": "a\nb"}, "api_key: is empty or not printable ASCII"),
        ({"adapters": {"model": Path("lora")}}, "adapters: model is the name of the model itself"),
        ({"devices": 2}, "devices: 2 is not supported, because a server uses one device; set 1"),
        ({"generate_strategy": "sequential"}, "generate_strategy: sequential is not supported, .*; leave it out"),
        ({"api_path": "/v1/x"}, "api_path: /v1/x is not a path of its own; set /predict, for example"),
        ({"openai_spec": True, "stream": True}, "stream: true has no effect with openai_spec: true"),
    ],
)
def test_servers_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Serve(checkpoint_dir=Path("model"), **settings)


@pytest.mark.parametrize("key", ["", "é"])
def test_the_board_refuses_keys_that_no_browser_can_send(key: str) -> None:
    with pytest.raises(UserError, match="api_key: is empty or not printable ASCII"):
        Board(api_key=key)
