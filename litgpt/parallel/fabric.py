"""Lightning Fabric, without the imports of `lightning` itself: its Trainer and torchmetrics, which take 3 s and 0.3 GB.

`lightning` is imported in full when something else of it is first used, by a data module of the user for example.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any


def defer_package(name: str) -> None:
    """Put a package into `sys.modules` whose `__init__.py` runs when an attribute that it does not yet have is used."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    loader, package = spec.loader, importlib.util.module_from_spec(spec)

    def load_attribute(attribute: str) -> Any:
        if (module := sys.modules.get(f"{name}.{attribute}")) is not None:  # which is being imported
            return module
        del vars(package)["__getattr__"]
        loader.exec_module(package)
        return getattr(package, attribute)

    vars(package).update(__getattr__=load_attribute, __version__=version(name))
    sys.modules[name] = package


@contextmanager
def defer_torchmetrics() -> Iterator[None]:
    """Keep Fabric from importing torchmetrics, of which it reads the version only."""
    if "torchmetrics" in sys.modules or importlib.util.find_spec("torchmetrics") is None:
        yield
        return
    defer_package("torchmetrics")
    try:
        yield
    finally:
        del sys.modules["torchmetrics"]


if "lightning" not in sys.modules:
    defer_package("lightning")
with defer_torchmetrics():
    from lightning.fabric import Fabric
    from lightning.fabric.loggers.logger import Logger
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
    from lightning.fabric.strategies.parallel import ParallelStrategy
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

__all__ = [
    "Fabric",
    "Logger",
    "ModelParallelStrategy",
    "ParallelStrategy",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
    "_get_rank",
    "rank_zero_only",
]
