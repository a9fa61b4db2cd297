"""The gradient of a global batch depends neither on how it is cut nor on how it is spread over ranks."""

import json
from pathlib import Path

from tests.layouts import gradient_worker
from tests.processes import join_ranks, start_ranks


def test_gradient_is_the_same_for_every_cut_and_layout(tmp_path: Path) -> None:
    gradient_worker.save_reference(tmp_path)
    worst = gradient_worker.compare_layouts(tmp_path, 0, 1)
    for ranks in (2, 4):
        assert join_ranks(start_ranks(gradient_worker.worker, tmp_path, folder=tmp_path, ranks=ranks)) == [0] * ranks
        worst |= json.loads((tmp_path / f"{ranks}.json").read_text())
    assert len(worst) == 4 + 2 * 3 + 3 * 2
    assert max(worst.values()) < 1e-12, worst
