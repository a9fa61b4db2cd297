"""The loggers of a run: CSV, TensorBoard, Weights & Biases, MLflow."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.utilities.rank_zero import rank_zero_only

from litgpt.errors import UserError
from litgpt.files import write_text
from litgpt.recipe.train import LogArgs
from litgpt.train import history

NAMES = ("csv", "tensorboard", "wandb", "mlflow")


def build_logger(
    name: str,
    out_dir: Path,
    log: LogArgs,
    resumed_step: int | None = None,
    *,
    project: str = "litgpt",
    environment: Mapping[str, str] = os.environ,
) -> Logger:
    """The logger of that name; files change only when it is first used, except for the id of a W&B or MLflow run.

    Args:
        resumed_step: the optimizer step that a resumed run goes on from: it logs into the same version or run, without
            what was logged after that step. None for a run that starts anew, which gets a version of its own.
        project: what the run is filed under where neither `log.project` nor the environment says.
        environment: where WANDB_PROJECT, WANDB_RUN_NAME, WANDB_RUN_GROUP and MLFLOW_* are looked up.

    Raises:
        UserError: for a name that is not among `NAMES`, or whose package is not installed.
    """
    if name == "csv":
        return CSVLogger(out_dir, resumed_step)
    if name == "tensorboard":
        return tensorboard(out_dir, resumed_step)
    if name == "wandb":
        return wandb(out_dir, log, resumed_step is not None, project, environment)
    if name == "mlflow":
        return mlflow(out_dir, log, resumed_step is not None, project, environment)
    raise UserError(f"logger_name: {name!r} is not supported; use one of {', '.join(NAMES)}")


class CSVLogger(Logger):
    """Writes `<out_dir>/logs/csv/version_N/metrics.csv` as the run goes."""

    def __init__(self, out_dir: Path, resumed_step: int | None = None) -> None:
        root = out_dir / "logs" / "csv"
        self.number = history.choose_version(root, resumed=resumed_step is not None)
        self.path = root / f"version_{self.number}" / history.FILE_NAME
        self.resumed_step = resumed_step
        self.history: history.History | None = None

    @property
    def name(self) -> str:
        """What Fabric calls it."""
        return "csv"

    @property
    def version(self) -> int:
        """The N of `version_N`."""
        return self.number

    @property
    def log_dir(self) -> str:
        """The folder of the metrics file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row; `step` is the optimizer step, unless the metrics name one themselves."""
        if self.history is None:  # only now, and only on rank 0, may files change
            self.history = history.History(self.path, resumed_step=self.resumed_step)
        row = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        self.history.append(row if step is None else {"step": step} | row)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the recipe lies beside the logs as recipe.yaml."""


def tensorboard(out_dir: Path, resumed_step: int | None) -> Logger:
    """Event files in `<out_dir>/logs/tensorboard/version_N`; steps that are trained again replace the old ones."""
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger

    root = out_dir / "logs" / "tensorboard"
    version = history.choose_version(root, resumed=resumed_step is not None)
    purge_step = None if resumed_step is None else resumed_step + 1
    return TensorBoardLogger(root.parent, name=root.name, version=version, purge_step=purge_step)


def wandb(out_dir: Path, log: LogArgs, resumed: bool, project: str, environment: Mapping[str, str]) -> Logger:
    """A run of Weights & Biases; its id stays in `<out_dir>/logs/wandb/run_id`, so that a resumed run goes on in it."""
    require("wandb")
    from lightning.pytorch.loggers.wandb import WandbLogger

    id_file = out_dir / "logs" / "wandb" / "run_id"
    run_id = earlier_run(id_file, resumed) or uuid.uuid4().hex[:8]
    keep_run(id_file, run_id)
    logger = WandbLogger(
        project=log.project or environment.get("WANDB_PROJECT") or project,
        name=log.run or environment.get("WANDB_RUN_NAME"),
        group=log.group or environment.get("WANDB_RUN_GROUP"),
        save_dir=environment.get("WANDB_DIR", "."),
        id=run_id,
    )
    return cast(Logger, logger)


def mlflow(out_dir: Path, log: LogArgs, resumed: bool, project: str, environment: Mapping[str, str]) -> Logger:
    """A run of MLflow, in `./mlflow.db` or where MLFLOW_TRACKING_URI points; a resumed run goes on in the same one."""
    require("mlflow")
    from lightning.pytorch.loggers.mlflow import MLFlowLogger

    id_file = out_dir / "logs" / "mlflow" / "run_id"
    logger = MLFlowLogger(
        experiment_name=log.project or environment.get("MLFLOW_EXPERIMENT_NAME") or project,
        run_name=log.run or environment.get("MLFLOW_RUN_NAME"),
        tracking_uri=environment.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"),  # MLflow 3 refuses ./mlruns
        tags={"group": log.group} if log.group else None,
        run_id=earlier_run(id_file, resumed) or environment.get("MLFLOW_RUN_ID"),
    )
    keep_run(id_file, logger)
    return cast(Logger, logger)


def earlier_run(id_file: Path, resumed: bool) -> str | None:
    """The id of the run that a resumed run goes on in, if one was kept."""
    return id_file.read_text(encoding="utf-8").strip() if resumed and id_file.exists() else None


@rank_zero_only
def keep_run(id_file: Path, run: Any) -> None:
    """Keep the id of a run, or of the run that a logger begins by being asked for it."""
    write_text(id_file, (run if isinstance(run, str) else run.run_id) + "\n")


def require(package: str) -> None:
    """Find the package of a logger, without importing it."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise UserError(f"logger_name: {package} is not installed: pip install {package}, or set logger_name: csv")
