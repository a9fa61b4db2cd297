"""A step that is not finite on one rank is taken by none."""

from pathlib import Path

import pytest

from tests.layouts import not_finite_worker
from tests.processes import join_ranks, start_ranks


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)], ids=["ddp", "fsdp"])
def test_a_nan_on_one_rank_changes_nothing_on_any(tmp_path: Path, degrees: tuple[int, int]) -> None:
    processes = start_ranks(not_finite_worker.worker, tmp_path, degrees, folder=tmp_path, ranks=2)
    assert join_ranks(processes) == [0, 0], "".join(path.read_text() for path in tmp_path.glob("rank-*.log"))
    assert len(list(tmp_path.glob("done-*"))) == 2
