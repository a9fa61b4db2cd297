"""Rows that cannot be read."""

from typing import Any

import pytest

from litgpt.data.read.conversation import to_conversation
from litgpt.data.read.fields import BadRow


def check_fault(row: dict[str, Any], reason: str) -> None:
    """Check that a row is refused for this reason, in one line."""
    with pytest.raises(BadRow) as raised:
        to_conversation(row)
    assert raised.value.reason == reason
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
