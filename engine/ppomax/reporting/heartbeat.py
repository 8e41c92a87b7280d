"""`heartbeat.json` in a run's folder: a small file, made anew after each step, for whoever watches that it goes on."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from ppomax.saving.beside import beside

HEARTBEAT = "heartbeat.json"


def beat(out: Path, step: int, steps: int, seconds: float) -> None:
    """Write it: when (Unix time), which step of how many is done, what it took in seconds, and whose it is."""
    words = {
        "time": round(time.time(), 1),
        "step": step,
        "steps": steps,
        "step_seconds": round(seconds, 2),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    with beside(out / HEARTBEAT) as part:
        part.write_text(json.dumps(words) + "\n", encoding="utf-8")


def last_beat(out: Path) -> float | None:
    """When the newest one was written (Unix time); None: there is none."""
    file = out / HEARTBEAT
    return float(json.loads(file.read_text(encoding="utf-8"))["time"]) if file.is_file() else None
