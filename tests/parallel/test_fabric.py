"""Fabric is imported without the rest of Lightning, which is there when it is used."""

import importlib
import sys
from pathlib import Path

import pytest

from litgpt.parallel.fabric import Fabric, defer_package
from tests.processes import join_ranks, run_litgpt, start_ranks
from tests.runs import write_recipe, write_text

SLOW_PACKAGES = {"torchmetrics", "torchvision", "transformers", "matplotlib", "pandas", "sklearn", "datasets"}


def train_and_list_imports() -> int:
    """Train, and return the number of packages imported that take seconds and that no run needs."""
    code = run_litgpt("pretrain", "--config", "recipe.yaml")
    found = sorted(SLOW_PACKAGES & set(sys.modules))
    print("imported:", *found)
    return code or len(found)


def test_a_run_imports_neither_torchmetrics_nor_transformers(tmp_path: Path) -> None:
    write_text(tmp_path)
    write_recipe(tmp_path, train__max_steps=1, train__lr_warmup_steps=1)
    codes = join_ranks(start_ranks(train_and_list_imports, folder=tmp_path))
    assert codes == [0], (tmp_path / "rank-0.log").read_text()


def test_fabric_is_that_of_lightning() -> None:
    import lightning as L

    assert L.Fabric is L.fabric.Fabric is Fabric
    assert L.LightningDataModule.__module__ == "lightning.pytorch.core.datamodule"


def test_a_deferred_package_runs_its_init_when_an_attribute_is_first_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "heavy_package"
    package.mkdir()
    (package / "__init__.py").write_text("from heavy_package.light import number\nheavy = number + 1\n")
    (package / "light.py").write_text("import heavy_package.light as this\nnumber = 1\n")
    (tmp_path / "heavy_package-1.5.dist-info").mkdir()
    (tmp_path / "heavy_package-1.5.dist-info" / "METADATA").write_text("Name: heavy_package\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    defer_package("heavy_package")
    light = importlib.import_module("heavy_package.light")
    heavy_package = sys.modules["heavy_package"]
    try:
        assert light.this is light and "heavy" not in vars(heavy_package) and heavy_package.__version__ == "1.5"
        assert heavy_package.heavy == 2 and heavy_package.light is light
        with pytest.raises(AttributeError):
            _ = heavy_package.missing
    finally:
        del sys.modules["heavy_package"], sys.modules["heavy_package.light"]
