"""What a run was made with, beside its configuration: date, command, versions, machine. A row of about.jsonl for each
time it was started."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ppomax.saving.jsonl import append_row

ABOUT = "about.jsonl"
PACKAGES = ("ppomax", "torch", "transformers", "deepspeed")


def note_start(out: Path, ranks: int) -> None:
    """Append a row to `out`/about.jsonl."""
    append_row(out / ABOUT, about(ranks))


def about(ranks: int) -> dict[str, Any]:
    """Date, command line, versions of the packages that are installed, machine."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": command,
        "versions": {"python": platform.python_version(), **found},
        "machine": machine(ranks),
    }


def machine(ranks: int) -> str:
    """Of this rank: what computes, and how many ranks there are."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads"
    return name if ranks == 1 else f"{ranks} x {name}"


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
