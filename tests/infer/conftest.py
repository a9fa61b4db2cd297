"""Fixtures of the engine."""

from collections.abc import Sequence
from typing import Any

import pytest

from litgpt.infer import engine as engine_module
from litgpt.infer.packed_step import Chunk


@pytest.fixture
def processed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each forward pass."""
    counts: list[int] = []
    run = engine_module.run_packed

    def count(model: Any, chunks: Sequence[Chunk], *args: Any, **settings: Any) -> Any:
        counts.append(sum(len(chunk.ids) for chunk in chunks))
        return run(model, chunks, *args, **settings)

    monkeypatch.setattr(engine_module, "run_packed", count)
    return counts
