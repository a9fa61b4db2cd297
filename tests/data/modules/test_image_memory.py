"""Memory over epochs of images: nothing that is decoded outlives its batch."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litgpt.data import Conversations
from litgpt.data.tokenizer import Tokenizer
from litgpt.recipe.data import BatchShape
from tests.vision_model import KINDS, write_rows, write_vision_model

IMAGES, SIDE, AREA = 40, 300, 128**2
GROWTH = 16 * 2**20
"""Bytes that five epochs may add; their decoded pixels are 54 MB, and their patches 39 MB."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_memory_is_flat_over_epochs(tmp_path: Path) -> None:
    rows, generator = [], np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = generator.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
        messages = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "red"}]
        rows.append({"messages": messages, "images": [f"{number}.jpg"]})
    write_rows(tmp_path, rows)
    model = write_vision_model(tmp_path / "model", "qwen2_vl")
    processor = KINDS["qwen2_vl"]["processor"] | {"size": {"shortest_edge": AREA, "longest_edge": AREA}}
    (model / "preprocessor_config.json").write_text(json.dumps(processor))

    data = Conversations(str(tmp_path / "rows.jsonl"), val_fraction=0.0, num_workers=0, cache_dir=tmp_path / "cache")
    data.connect(Tokenizer(model), 4, 512)
    data.prepare_data()
    stream, resident = iter(data.train_stream(BatchShape(4, 4, 512))), []
    for _ in range(6):
        for _ in range(IMAGES // 4):
            batch = next(stream)
            assert batch.media is not None and sum(h * w for _, h, w in batch.media.grids) == 4 * AREA // 16
            del batch
        resident.append(read_resident())
    assert resident[-1] - resident[0] < GROWTH, resident


def read_resident() -> int:
    """The resident memory of this process in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
