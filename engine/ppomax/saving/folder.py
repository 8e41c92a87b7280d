"""A folder that is whole or not there, and damage found on reading.

It is filled under another name, synced, then renamed, so a kill at any moment leaves no half of it. MANIFEST.json holds
size and SHA-256 of every file and is written last. Only safetensors and JSON: reading a checkpoint runs no code."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ppomax.saving.beside import OLD, PART, begin, beside, part_of, remove, sync, take_place
from ppomax.saving.dealt import Entry, in_threads, share_of, write_share
from ppomax.saving.tensor_files import size_of
from ppomax.sharding import Lazy, ranks

log = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"
FORMAT = 2
"""Of the manifest."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be read; the message names the folder and the mend."""


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes `path` only once every file in it is listed, synced and named in a manifest."""
    try:
        with beside(path) as part:
            part.mkdir()
            yield part
            seal(part, {})
    except (OSError, SafetensorError) as error:
        raise unwritten(path, error) from error


def seal(part: Path, known: dict[str, Entry]) -> None:
    """List every file of the folder `part` in its manifest, those that are not `known` hashed and synced here."""
    listing = dict(known)
    for file in _files(part):
        name = str(file.relative_to(part))
        if name not in listing:
            listing[name] = Entry(file.stat().st_size, sha256(file))
            sync(file)
    words = {name: entry._asdict() for name, entry in sorted(listing.items())}
    (part / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": words}, indent=1), encoding="utf-8")
    sync(part / MANIFEST)
    sync(part)


def write_together(path: Path, files: dict[str, dict[str, Lazy]], finish: Callable[[Path], None]) -> None:
    """Write the folder `path`, atomically, all ranks at once: each its share of the tensors (see dealt.py), and rank 0
    what `finish` adds and the manifest. Every rank calls. CheckpointError: a rank's disk did not take it, and nothing
    has changed."""
    part = begin_together(path, files)
    complete(path, lambda: write_share(part, share_of(files)), finish)


def begin_together(path: Path, files: dict[str, dict[str, Lazy]]) -> Path:
    """The folder that becomes `path`, with room for the tensors; the first half of `write_together`."""
    part = part_of(path)
    with _as_unwritten(path):
        if ranks.rank() == 0:
            begin(path)
            check_space(path.parent, sum(size_of(x) for file in files.values() for x in file.values()))
            part.mkdir()
    return part


def complete(path: Path, written: Callable[[], dict[str, Entry]], finish: Callable[[Path], None]) -> None:
    """The second half: `written` gives the entries of this rank's files once they are on the disk."""
    part = part_of(path)
    try:
        with _as_unwritten(path):
            own = written()
        listing = {name: entry for found in ranks.gather_objects(own) for name, entry in found.items()}
        with _as_unwritten(path):
            if ranks.rank() == 0:
                finish(part)
                seal(part, listing)
                take_place(part, path)
    except BaseException:
        if ranks.rank() == 0:
            remove(part)
        raise


@contextmanager
def _as_unwritten(path: Path) -> Iterator[None]:
    with ranks.fail_together():
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise unwritten(path, error) from error


def unwritten(path: Path, error: Exception) -> CheckpointError:
    """What stopped `path` from being written, and the mend."""
    reason = f"the disk is full ({error})" if _is_full(error) else f"{type(error).__name__}: {error}"
    return CheckpointError(
        f"{path} could not be written: {reason}. Free some space or choose another run.out; "
        "earlier checkpoints are untouched"
    )


def check_space(folder: Path, need: int) -> None:
    """OSError before a byte is written if `need` bytes are not free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(errno.ENOSPC, f"{need / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")


def verify(path: Path) -> None:
    """CheckpointError on every rank unless each file that the manifest names is there with its size and SHA-256. Every
    rank calls, and hashes its share."""
    words: str | None = None
    try:
        listing = read_manifest(path)
        owners = ranks.deal([size for _, size, _ in listing], ranks.world_size())
        own = [entry for entry, owner in zip(listing, owners, strict=True) if owner == ranks.rank()]
        in_threads(lambda entry: _check_file(path / entry[0], *entry[1:]), own)
    except CheckpointError as error:
        words = str(error)
    found = [w for w in ranks.gather_objects(words) if w is not None]
    if found:
        raise CheckpointError(found[0])


def read_manifest(path: Path) -> list[tuple[str, int, str]]:
    """(name, bytes, SHA-256) of each file of the folder `path`. CheckpointError: it has no readable one."""
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint folder {path}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        form = manifest.get("format")
        listing = [(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has no readable {MANIFEST}, so it is no whole checkpoint ({error})") from error
    if form != FORMAT:
        raise CheckpointError(f"{path} has format {form}, this version reads {FORMAT}; use the ppomax that wrote it")
    return listing


def _check_file(file: Path, size: int, digest: str) -> None:
    if not file.is_file() or file.stat().st_size != size:
        raise CheckpointError(f"{file} is missing or cut short (wanted {size} bytes); use an earlier checkpoint")
    if sha256(file) != digest:
        raise CheckpointError(f"{file} is damaged (its SHA-256 is not the manifest's); use an earlier checkpoint")


def checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders under `root`, oldest first; unfinished ones have other names."""
    return sorted(root.glob("step-*")) if root.is_dir() else []


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`; damaged ones are passed over with a warning each. None: there are none
    at all. CheckpointError: there are some and none is whole."""
    found = ranks.broadcast(checkpoints(root))
    for path in reversed(found):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"CHECKPOINT PASSED OVER: {error}", stacklevel=2)
            log.error("checkpoint passed over: %s", error)
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints under {root} is whole; start anew in another folder"
        )
    return None


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed saves left behind."""
    if ranks.rank():
        return
    for path in checkpoints(root)[:-keep]:
        gone = path.with_name(OLD + path.name)
        os.replace(path, gone)  # so that a kill while deleting leaves no half checkpoint under a real name
        shutil.rmtree(gone)
    clean(root)


def clean(root: Path) -> None:
    """Delete what killed saves and prunes left under `root`."""
    if ranks.rank() == 0:
        for pattern in (PART + "*", OLD + "*"):
            for leftover in root.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _is_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
