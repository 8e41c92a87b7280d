"""What a report reads of a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppomax.config import ConfigError, MonitorConfig, build
from ppomax.config.mapping import read_yaml
from ppomax.reporting.about import ABOUT
from ppomax.reporting.alarm import History, history, means
from ppomax.reporting.monitor import METRICS, SAMPLES, SCORES
from ppomax.saving.jsonl import read_rows

END_STEPS = 5
"""The end's figures are means over so many last steps, fewer in short runs; the start's are step 1."""


@dataclass(frozen=True)
class Run:
    """What a run left in its folder."""

    name: str
    colour: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    """Rows of metrics.jsonl from step 1 on."""
    pretraining: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    history: History
    baseline_steps: int
    """First steps that the others are held against."""
    about: dict[str, Any] = field(default_factory=dict)
    """When it was begun, by which command, with what; see about.py."""
    picture: bytes = b""
    """held_out.png of a reward model: score histograms and calibration."""

    @property
    def start(self) -> dict[str, float]:
        return means(self.rows[:1])

    @property
    def end(self) -> dict[str, float]:
        return means(self.rows[-self.end_steps :])

    @property
    def end_steps(self) -> int:
        """Last steps behind the end's figures: at most a quarter of the run."""
        return max(1, min(END_STEPS, len(self.rows) // 4))


def read_run(folder: Path, name: str, colour: str) -> Run:
    """Everything that the report says of the run in `folder`."""
    rows = read_rows(folder / METRICS)
    steps = [row for row in rows if row.get("step", 0) >= 1]
    if not steps:
        raise ConfigError(
            f"report: {folder} holds no {METRICS} with a step in it; give the folder of a run that has begun"
        )
    config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    monitor = build(MonitorConfig, config.get("monitor", {}))
    return Run(
        name,
        colour,
        config,
        steps,
        [row for row in rows if row.get("step") == 0],
        read_rows(folder / SAMPLES),
        read_rows(folder / SCORES),
        history(steps, monitor),
        monitor.alarm_baseline_steps,
        next(iter(read_rows(folder / ABOUT)), {}),
        picture.read_bytes() if (picture := folder / "held_out.png").is_file() else b"",
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts, with as many parents as tell them apart."""
    paths = [Path(f).resolve().parts for f in folders]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(p[-depth:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("report: the same folder is given twice; name each run once")
