"""Metrics handed on to services of others: Weights & Biases, MLflow. A run does not depend on them: one that is not
installed or cannot be reached is dropped, which is said once, and metrics.jsonl holds everything."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

PROJECT = "ppomax"


class Tracker(Protocol):
    """Where metrics go; made with the run's folder and its configuration as plain data."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """One run of Weights & Biases for each folder; a resumed one goes on in it. As its own settings say: WANDB_MODE,
    WANDB_ENTITY ..."""

    def __init__(self, out: Path, config: Mapping[str, Any]):
        import wandb

        name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
        where = {"project": PROJECT, "name": out.name, "dir": str(out)}
        self.run = wandb.init(**where, id=name, resume="allow", config=dict(config))
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({"step": step, **metrics})

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """One run of MLflow for each folder, which notes its id; a resumed one goes on in it. As MLFLOW_TRACKING_URI
    says."""

    def __init__(self, out: Path, config: Mapping[str, Any]):
        import mlflow

        noted = out / "mlflow_run_id"
        mlflow.set_experiment(PROJECT)
        known = noted.read_text(encoding="utf-8") if noted.is_file() else None
        run = mlflow.start_run(run_id=known, run_name=None if known else out.name)
        noted.write_text(run.info.run_id, encoding="utf-8")
        if known is None:
            mlflow.log_dict(dict(config), "config.json")
        self.mlflow = mlflow

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self.mlflow.end_run()


KINDS: dict[str, type[Any]] = {"wandb": Wandb, "mlflow": Mlflow}


class Trackers:
    """The trackers of one run, by name; each is used until it fails."""

    def __init__(self, names: Sequence[str], out: Path, config: Mapping[str, Any]):
        self.used: dict[str, Tracker] = {}
        for name in names:
            try:
                out.mkdir(parents=True, exist_ok=True)
                self.used[name] = KINDS[name](out, config)
            except Exception as error:  # whatever a service of others raises
                self._dropped(name, error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take one step's metrics."""
        for name, tracker in list(self.used.items()):
            try:
                tracker.log(step, metrics)
            except Exception as error:
                self._dropped(name, error)

    def close(self) -> None:
        """End what is still used."""
        for name, tracker in list(self.used.items()):
            try:
                tracker.close()
            except Exception as error:
                self._dropped(name, error)

    def _dropped(self, name: str, error: Exception) -> None:
        self.used.pop(name, None)
        words = " ".join(str(error).split())[:200]
        install = f"; pip install {name}" if isinstance(error, ImportError) else ""
        log.warning(
            "trackers: %s cannot be used (%s: %s%s); the run goes on without it", name, type(error).__name__,
            words, install,
        )  # fmt: skip
