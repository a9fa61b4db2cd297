"""The key and the detail of an error for users."""

import pickle

import pytest

from litgpt.errors import UserError


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
