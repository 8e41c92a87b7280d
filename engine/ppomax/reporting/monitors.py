"""What a PPO run tells whoever watches it, and what a watcher may ask for."""

from __future__ import annotations

from typing import Any, Literal, Protocol

Halt = Literal["stop", "rollback"]
"""How a watcher ends a run: here, or at the newest checkpoint's weights."""


class Monitor(Protocol):
    """Who watches a run. Steps count from 1; critic pre-training reports under step 0."""

    def log(self, step: int, metrics: dict[str, float]) -> Halt | None:
        """Take one step's metrics; None lets the run go on."""

    def scores(self, step: int, scores: list[float]) -> None:
        """Take the raw scores of a step's buffer."""

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Take sample texts: prompt, response, score, length, finished."""

    def close(self) -> None:
        """The run is over, well or not."""


class NoMonitor:
    """For the ranks but the first: nothing is kept twice."""

    def log(self, step: int, metrics: dict[str, float]) -> Halt | None:
        return None

    def scores(self, step: int, scores: list[float]) -> None:
        pass

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        pass

    def close(self) -> None:
        pass
