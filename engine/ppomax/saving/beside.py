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
    part = begin(path)
    try:
        yield part
    except BaseException:
        remove(part)
        raise
    take_place(part, path)


def part_of(path: Path) -> Path:
    """Where `path` is written until it is whole."""
    return path.with_name(PART + path.name)


def begin(path: Path) -> Path:
    """`part_of(path)`, with room made for it and nothing there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(part_of(path))
    return part_of(path)


def take_place(part: Path, path: Path) -> None:
    """Put the file or folder `part` where `path` is or was."""
    old = path.with_name(OLD + path.name)
    if path.is_dir():  # a folder cannot be renamed over another
        remove(old)
        os.replace(path, old)
    os.replace(part, path)
    sync(path.parent)
    remove(old)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
