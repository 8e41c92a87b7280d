"""Files and folders that are written beside their place and then renamed, so that a kill leaves the old one or the new
one, and never half of either. Loads nothing heavy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART, OLD = ".part-", ".old-"
"""What the names of unfinished files and folders, and of replaced folders, begin with."""


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A free path beside `path`, for a file or folder to be written at: it takes the place of `path` when the block
    ends, and is removed if the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = path.with_name(PART + path.name), path.with_name(OLD + path.name)
    _remove(part)
    try:
        yield part
    except BaseException:
        _remove(part)
        raise
    if path.is_dir():  # a folder cannot be renamed over another
        _remove(old)
        os.replace(path, old)
    os.replace(part, path)
    sync(path.parent)
    _remove(old)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
