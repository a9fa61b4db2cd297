"""Adapters of a model sharded over two ranks are those of one process."""

from pathlib import Path

import pytest
import torch

from tests.adapt import layout_worker
from tests.processes import join_ranks, start_ranks


@pytest.mark.slow
def test_two_ranks_compute_train_and_merge_as_one(tmp_path: Path) -> None:
    for name in layout_worker.SETTINGS:
        torch.save(layout_worker.compute_results(name, 1), tmp_path / f"{name}.pt")
    codes = join_ranks(start_ranks(layout_worker.compare, tmp_path, folder=tmp_path, ranks=2))
    assert codes == [0, 0], (tmp_path / "rank-0.log").read_text()[-2000:]
