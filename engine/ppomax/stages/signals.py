"""SIGTERM and Ctrl-C as a wish to stop after the step under way, with a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

import torch

from ppomax.sharding import ranks

log = logging.getLogger(__name__)

STOP = "stop"
"""A file of this name in a run's folder asks for the same, whatever launched the run."""


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    asked: bool = False
    signal: Signals | None = None
    at: float | None = None
    """When, by time.monotonic()."""

    def ask(self, by: Signals | None, words: str) -> None:
        """Note the wish, once."""
        if not self.asked:
            self.at = time.monotonic()
            log.warning("%s: will stop after this step and write a checkpoint", words)
        self.asked, self.signal = True, by or self.signal

    def agreed(self, out: Path, device: torch.device) -> bool:
        """Whether any rank was asked, or the file `stop` in the folder `out` asks all; then all of them are, at the
        same step. Every rank calls."""
        if ranks.rank() == 0 and (out / STOP).exists():
            self.ask(None, f"{out / STOP} is there")
        if bool(ranks.max(torch.tensor(float(self.asked), device=device))):
            self.ask(None, "another rank was asked to stop")
        return self.asked

    @property
    def seconds(self) -> float:
        """Since then."""
        return 0.0 if self.at is None else time.monotonic() - self.at


class Stopped(Exception):
    """Training was ended by a signal before its last step; its checkpoint is written."""

    def __init__(self, by: Signals | None, words: str):
        super().__init__(words)
        self.status = 128 + (by or signal.SIGTERM)  # another rank's signal reads as SIGTERM
        """Exit status, as a shell gives it: 130 after Ctrl-C, 143 after SIGTERM."""


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, SIGTERM and Ctrl-C are noted instead of ending the process; a second Ctrl-C interrupts at once. Outside
    the main thread no signal is taken."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: object) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.ask(Signals(number), Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
