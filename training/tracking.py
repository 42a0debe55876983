"""Services that a run can log its figures to, beside its own folder: Weights & Biases and MLflow.

Their packages are extras, and are imported only for a run that asks for them.
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

TRACKERS = ("wandb", "mlflow")
PROJECT = "capsnet"


class TrackerError(RuntimeError):
    """A tracker does not take the run. The text says why."""


def missing(name: str) -> str:
    """Return the reason why a tracker cannot be used, or ""."""
    found = find_spec(name)
    if found is not None and found.origin is not None:  # a folder of this name, as W&B makes, has no origin
        return ""
    return f"--track {name}: the package {name} is not installed; pip install '.[{name}]' installs it"


def tracker(name: str, folder: Path, settings: Mapping[str, Any]) -> "Logger":
    """Return Lightning's logger of one of TRACKERS for a run, with the run's settings logged.

    folder: of the run, whose name the run gets. Without ``MLFLOW_TRACKING_URI``, MLflow's files go into the folder.
    Raises TrackerError if the service does not take the run.
    """
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

    run = folder.resolve()
    run.mkdir(parents=True, exist_ok=True)
    try:
        if name == "wandb":
            logger: Logger = WandbLogger(name=run.name, save_dir=run, project=PROJECT)
        else:
            uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run / 'mlflow.db'}"
            logger = MLFlowLogger(experiment_name=PROJECT, run_name=run.name, tracking_uri=uri)
        logger.log_hyperparams(dict(settings))  # which opens the run there
    except Exception as error:  # the packages have errors of many kinds, as for a missing key or a server that is away
        raise TrackerError(f"--track {name}: {' '.join(str(error).split())}") from error
    return logger
