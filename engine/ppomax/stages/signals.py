"""SIGTERM and Ctrl-C as a wish to stop after the step under way, with a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass
class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    asked: bool = False
    signal: signal.Signals | None = None


class Stopped(Exception):
    """Training was ended by a signal before its last step; its checkpoint is written."""

    def __init__(self, by: signal.Signals | None, words: str):
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
        stop.asked, stop.signal = True, signal.Signals(number)
        log.warning("%s: will stop after this step and write a checkpoint", stop.signal.name)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
