"""The loggers of a run: CSV, TensorBoard, Weights & Biases, MLflow, trackio, SwanLab."""

import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from litgpt.errors import UserError
from litgpt.files import write_text
from litgpt.parallel.fabric import Logger, rank_zero_only
from litgpt.parallel.strategy import is_rank_zero
from litgpt.recipe.train import LogArgs
from litgpt.train import history

RESERVED_NAMES = {"time": "seconds"}  # what trackio hides under the name that a metric has, and another for it
NAMES = ("csv", "tensorboard", "wandb", "mlflow", "trackio", "swanlab")


def build_logger(
    name: str, out_dir: Path, log: LogArgs, resumed_step: int | None = None, *, project: str = "litgpt"
) -> Logger:
    """Build a logger by name. No file is written before the first log, except the id of the run of a package.

    Args:
        resumed_step: the optimizer step that the run resumes from: it logs into the same version or run, and what was
            logged after that step is removed, except by trackio and SwanLab. None for a new run, with a new version.
        project: the project or MLflow experiment, unless `log.project` or the environment sets it.

    Raises:
        UserError: if the name is not one of `NAMES`, or its package is not installed.
    """
    if name == "csv":
        return CSVLogger(out_dir, resumed_step)
    if name == "tensorboard":
        return build_tensorboard(out_dir, log, resumed_step)
    if name not in NAMES:
        raise UserError(f"logger_name: {name!r} is not supported; use one of {', '.join(NAMES)}")
    if importlib.util.find_spec(name) is None:
        raise UserError(f"logger_name: {name} is not installed: pip install {name}, or set logger_name: csv")
    id_file = out_dir / "logs" / name / "run_id"
    run_id = id_file.read_text(encoding="utf-8").strip() if resumed_step is not None and id_file.exists() else None
    return PACKAGE_BUILDERS[name](log, project, id_file, run_id)


class CSVLogger(Logger):
    """Writes `<out_dir>/logs/csv/version_N/metrics.csv` while the run trains."""

    def __init__(self, out_dir: Path, resumed_step: int | None = None) -> None:
        root = out_dir / "logs" / "csv"
        self.number = history.choose_version(root, resumed=resumed_step is not None)
        self.path = root / f"version_{self.number}" / history.FILE_NAME
        self.resumed_step = resumed_step
        self.history: history.History | None = None

    @property
    def name(self) -> str:
        """Name of the logger for Fabric."""
        return "csv"

    @property
    def version(self) -> int:
        """The N of `version_N`."""
        return self.number

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row; `step` is the optimizer step, unless the metrics contain it."""
        if self.history is None:  # opening the file changes it, which only rank 0 may do
            self.history = history.History(self.path, resumed_step=self.resumed_step)
        row = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        self.history.append(row if step is None else {"step": step} | row)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the recipe is saved as recipe.yaml."""


def build_tensorboard(out_dir: Path, log: LogArgs, resumed_step: int | None) -> Logger:
    """Build a logger of event files in `<out_dir>/logs/tensorboard/version_N`; repeated steps replace the old ones.

    With `log.save_dir` they are in `<save_dir>/version_N`, which several runs may share, so N is saved in `out_dir`.
    """
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger

    root, is_resumed = log.save_dir or out_dir / "logs" / "tensorboard", resumed_step is not None
    version_file = out_dir / "logs" / "tensorboard" / "version"
    if log.save_dir and is_resumed and version_file.exists():
        version = int(version_file.read_text(encoding="utf-8"))
    else:
        version = history.choose_version(root, resumed=is_resumed and not log.save_dir)
    if log.save_dir and is_rank_zero():
        (root / f"version_{version}").mkdir(parents=True, exist_ok=True)  # before another run chooses the same
        write_text(version_file, f"{version}\n")
    purge_step = None if resumed_step is None else resumed_step + 1
    queue_size = log.tensorboard_queue_size
    return TensorBoardLogger(root.parent, name=root.name, version=version, purge_step=purge_step, max_queue=queue_size)


def build_wandb(log: LogArgs, project: str, id_file: Path, run_id: str | None) -> Logger:
    """Build a logger of a Weights & Biases run, and save its id in `id_file`.

    Args:
        run_id: id of the run to resume; None for a new run.
    """
    from lightning.pytorch.loggers.wandb import WandbLogger

    run_id = run_id or uuid.uuid4().hex[:8]
    if is_rank_zero():
        write_text(id_file, f"{run_id}\n")
    logger = WandbLogger(
        project=log.project or os.environ.get("WANDB_PROJECT") or project,
        name=log.run or os.environ.get("WANDB_RUN_NAME"),
        group=log.group or os.environ.get("WANDB_RUN_GROUP"),
        save_dir=log.save_dir or os.environ.get("WANDB_DIR", "."),
        id=run_id,
    )
    return cast(Logger, logger)


def build_mlflow(log: LogArgs, project: str, id_file: Path, run_id: str | None) -> Logger:
    """Build a logger of an MLflow run in `./mlflow.db`, or at MLFLOW_TRACKING_URI, and save its id in `id_file`.

    Args:
        run_id: id of the run to resume; None for a new run.
    """
    from lightning.pytorch.loggers.mlflow import MLFlowLogger

    logger = MLFlowLogger(
        experiment_name=log.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or project,
        run_name=log.run or os.environ.get("MLFLOW_RUN_NAME"),
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"),  # MLflow 3 refuses ./mlruns
        tags={"group": log.group} if log.group else None,
        run_id=run_id or os.environ.get("MLFLOW_RUN_ID"),
    )
    if is_rank_zero():
        write_text(id_file, f"{logger.run_id}\n")  # starts the run
    return cast(Logger, logger)


class PackageLogger(Logger):
    """Logs to a run of a package that has the methods `log` and `finish`; the run is started by the first log."""

    def __init__(self, name: str, version: str, start: Callable[[], Any]) -> None:
        self.package, self.run_id, self.start = name, version, start
        self.run: Any = None

    @property
    def name(self) -> str:
        """Name of the package."""
        return self.package

    @property
    def version(self) -> str:
        """The id of the run."""
        return self.run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log a row; `step` is the optimizer step."""
        if self.run is None:
            self.run = self.start()
        row = {RESERVED_NAMES.get(name, name): float(value) for name, value in metrics.items() if name != "step"}
        self.run.log(row, step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the recipe is saved as recipe.yaml."""

    @rank_zero_only
    def finalize(self, status: str) -> None:  # noqa: ARG002 - Fabric's signature
        """End the run, which waits until its rows are written."""
        if self.run is not None:
            self.run.finish()


def build_trackio(log: LogArgs, project: str, id_file: Path, run_id: str | None) -> Logger:
    """Build a logger of a run of trackio, in TRACKIO_DIR or on a Space, and save its name in `id_file`.

    Args:
        run_id: name of the run to resume; None for a new run.
    """
    import trackio

    name = run_id or log.run or f"{project}-{uuid.uuid4().hex[:8]}"
    if is_rank_zero():
        write_text(id_file, f"{name}\n")
    resume = "never" if run_id is None else "allow"
    start = partial(trackio.init, project=log.project or project, name=name, group=log.group, resume=resume)
    return PackageLogger("trackio", name, start)


def build_swanlab(log: LogArgs, project: str, id_file: Path, run_id: str | None) -> Logger:
    """Build a logger of a run of SwanLab, in the mode of SWANLAB_MODE, and save its id in `id_file`.

    Args:
        run_id: id of the run to resume; None for a new run.
    """
    import swanlab

    resume = "never" if run_id is None else "allow"
    run_id = run_id or uuid.uuid4().hex[:8]
    if is_rank_zero():
        write_text(id_file, f"{run_id}\n")
    start = partial(
        swanlab.init,
        project=log.project or os.environ.get("SWANLAB_PROJECT") or project,
        name=log.run,
        group=log.group,
        log_dir=None if log.save_dir is None else str(log.save_dir),
        id=run_id,
        resume=resume,
    )
    return PackageLogger("swanlab", run_id, start)


PACKAGE_BUILDERS = {"wandb": build_wandb, "mlflow": build_mlflow, "trackio": build_trackio, "swanlab": build_swanlab}
