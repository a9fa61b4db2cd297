"""The key and the detail of an error for users."""

import pickle
import re
from pathlib import Path

import pytest

import litgpt
from litgpt.errors import UserError
from litgpt.recipe.commands import COMMANDS
from tests.recipe.test_unknown_key import TREES, list_keys_with


@pytest.mark.parametrize(
    ("message", "key", "detail"),
    [
        ("train.max_steps: 0 is not valid; use 1: or more", "train.max_steps", "0 is not valid; use 1: or more"),
        ("out/step-00000001/manifest.json: no such file", "", "out/step-00000001/manifest.json: no such file"),
        ("seed is not a key", "", "seed is not a key"),
    ],
)
def test_an_error_has_a_key_and_a_detail(message: str, key: str, detail: str) -> None:
    error = UserError(message)
    assert (str(error), error.key, error.detail) == (message, key, detail)
    assert pickle.loads(pickle.dumps(error)).key == key


def test_an_error_is_one_line() -> None:
    assert str(UserError("a: b\n  c")) == "a: b c"


def test_each_key_that_a_message_tells_to_set_exists() -> None:
    """As text such as `set train.epochs: 1`; names of one word may be Python's own."""
    told = {
        key
        for path in Path(litgpt.__file__).parent.rglob("*.py")
        for key in re.findall(r"\b(?:set|use) ((?:[a-z_]+\.)+[a-z_]+): ", path.read_text(encoding="utf-8"))
    }
    pairs = [(command, tuple(choices.items())) for command in COMMANDS for choices in (*TREES, {"tuner": "Bone"})]
    known = {key for command, choices in pairs for key in list_keys_with(command, choices)}
    assert len(told) > 20 and not told - known
