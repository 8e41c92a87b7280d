"""Figures and times as words, in lines that fit a terminal."""

from __future__ import annotations

from collections import deque

COLUMNS = 80
"""Of a terminal that a log is read on."""
ETA_STEPS = 20
"""Newest steps whose mean time tells what is left."""


def short(value: float) -> str:
    """Three digits of a figure, two of a small one, no fraction of a large one: 0.899, 0.0012, 1234."""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.3g}" if abs(value) >= 0.1 else f"{value:.2g}"


def clock(seconds: float) -> str:
    """`1:02` minutes and seconds, `3h02` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}"


def plain_line(words: list[str]) -> str:
    """Two spaces between them, one where the line would be over COLUMNS."""
    wide = "  ".join(words)
    return wide if len(wide) <= COLUMNS else " ".join(words)


class TimeLeft:
    """What is left of a run, by its newest steps."""

    def __init__(self) -> None:
        self.newest: deque[float] = deque(maxlen=ETA_STEPS)

    def take(self, seconds: float) -> None:
        """A step's time."""
        self.newest.append(seconds)

    def words(self, steps: int) -> str:
        """`left 1:02` for so many more steps, after the first."""
        return f"left {clock(steps * sum(self.newest) / len(self.newest))}"
