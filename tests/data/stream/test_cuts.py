"""A step's gradient depends neither on how its samples are cut in micro-batches, nor on packing, padding or ranks."""

import json
from pathlib import Path

from tests.data.stream import cuts_worker
from tests.processes import join_ranks, start_ranks


def test_the_gradient_is_the_same_for_every_cut(tmp_path: Path) -> None:
    """All samples at once, two at a time, packed or not, on one rank or two, with uneven and fully masked samples."""
    worst = cuts_worker.compare(cuts_worker.whole(), 0, 1)
    assert join_ranks(start_ranks(cuts_worker.worker, tmp_path, folder=tmp_path, ranks=2)) == [0, 0]
    worst |= json.loads((tmp_path / "worst.json").read_text())
    assert len(worst) == 2 * (4 + 3 + 2) + 3 * (3 + 2 + 1)
    assert max(worst.values()) < 1e-10, worst


def test_a_mean_of_means_is_not() -> None:
    """What makes it so is the mean over all tokens: with a mean over micro-batches the same comparison fails."""
    mean = {"normalize": "microbatch"}
    worst = cuts_worker.compare(cuts_worker.whole(**mean), 0, 1, **mean)
    assert worst.pop("unpacked, 8 a micro-batch, (1, 1)") == 0
    at_once = "8 a micro-batch", "packed in 4, 4 a micro-batch", "packed in 2, 2 a micro-batch"
    for name, difference in worst.items():
        assert difference < 1e-10 if any(one in name for one in at_once) else difference > 1e-3, name
