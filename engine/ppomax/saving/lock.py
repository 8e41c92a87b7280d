"""One process for one run's folder: a lock that the kernel drops when its owner dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppomax.config import ConfigError, save_config

LOCK = ".lock"


@contextmanager
def claimed(out: Path, config: Any = None) -> Iterator[None]:
    """Inside, the folder `out` (made if need be) is this process's own; a `config` is the first thing written to it.
    ConfigError names the process that has it."""
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            raise ConfigError(
                f"{out} is being written by {owner}; wait for it or stop it, or name another --out"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        if config is not None:
            save_config(config, out / "config.yaml")
        yield
    finally:
        os.close(handle)
