"""What a rank does in the test of loading: load a sharded model, and count which values of the file are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt.model.config import Config
from litgpt.store.load_model import load_model
from litgpt.store.safetensors_files import MappedFile
from tests.store.models import random_model

mapped: dict[int, int] = {}  # where in memory the views of files begin, and their bytes


class Reads(TorchDispatchMode):
    """Counts the bytes that every operation reads from a mapped file; one that only creates a view reads none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for arg in args:
            if isinstance(arg, Tensor) and arg.device.type == "cpu" and arg.untyped_storage().data_ptr() in mapped:
                result = out if isinstance(out, Tensor) else out[0] if out else arg
                is_view = result.untyped_storage().data_ptr() == arg.untyped_storage().data_ptr()
                read = result if "index" in str(func) else arg  # indexing reads only the values that it returns
                self.bytes += 0 if is_view else read.nbytes
        return out


def watch() -> None:
    """Record the addresses of the views of every mapped file."""
    view = MappedFile.view

    def recorded_view(self: MappedFile, name: str) -> Tensor:
        values = view(self, name)
        mapped[values.untyped_storage().data_ptr()] = values.nbytes
        return values

    MappedFile.view = recorded_view  # type: ignore[method-assign]


def check_slices(folder: Path) -> None:
    """Load `<folder>/model` into a model sharded over two ranks; half of the file is looked at by each."""
    watch()
    dist.init_process_group("gloo")
    model = random_model(Config.from_checkpoint(folder / "model"), seed=1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with Reads() as reads:
        load_model(model, folder / "model")
    whole = sum(mapped.values())
    assert 0.49 < reads.bytes / whole < 0.51, (reads.bytes, whole)
    expected = random_model(Config.from_checkpoint(folder / "model"))
    for (name, local), (_, wanted) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert isinstance(local, DTensor) and torch.equal(local.full_tensor(), wanted), name
    dist.destroy_process_group()
