"""A checkpoint that is written while training goes on: its tensors are copied to the host, a thread writes the copy,
and the ranks make the folder whole together once all of them have."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ppomax.config import RunConfig, ShardingConfig
from ppomax.saving.dealt import Entry, Share, copied, share_of, write_share
from ppomax.saving.folder import begin_together, complete, prune, read_manifest
from ppomax.sharding import Lazy, ranks

log = logging.getLogger(__name__)


class PendingSave:
    """One that is not whole yet. A kill before `finish` leaves the older checkpoints as they are."""

    def __init__(self, path: Path, written: Future[dict[str, Entry]], add: Callable[[Path], None]):
        self.path, self._written, self._add = path, written, add

    def ready(self, device: torch.device) -> bool:
        """Whether all ranks have written their share, so that `finish` waits for nothing. Every rank asks."""
        behind = torch.tensor(float(not self._written.done()), device=device)
        return not bool(ranks.max(behind))

    def finish(self) -> Path:
        """Wait for all ranks' shares and put the checkpoint in its place. Every rank calls. CheckpointError as of
        `save_state`."""
        complete(self.path, self._written.result, self._add)
        return self.path


def in_background(run: RunConfig, sharding: ShardingConfig, *, gpu: bool) -> bool:
    """`run.background_saves`; None: where all of a state is on a GPU, whose memory the copy does not take."""
    if run.background_saves is None:
        return gpu and not sharding.offload_optimizer
    return run.background_saves


class Checkpoints:
    """The checkpoints of a run under `root`: each at once or beside training, older ones pruned once it is whole."""

    def __init__(self, root: Path, run: RunConfig, sharding: ShardingConfig, device: torch.device):
        self.root, self.keep, self.device = root, run.keep_checkpoints, device
        self.beside = in_background(run, sharding, gpu=device.type == "cuda")
        self.pending: PendingSave | None = None
        self.began = self.seconds = 0.0
        """How long training stood still for the last one."""

    def save(self, name: str, at_once: Callable[[Path], object], start: Callable[[Path], PendingSave]) -> None:
        """One more, by the first function or, where it is written beside training, by the second."""
        began = time.perf_counter()
        self.finish()
        if self.beside:
            self.pending = start(self.root / name)
            self.began = began
        else:
            at_once(self.root / name)
            prune(self.root, self.keep)
        self.seconds = time.perf_counter() - began
        if not self.beside:
            self._note(name, self.seconds)

    def finish(self, *, only_if_ready: bool = False) -> None:
        """Put the one that is being written in its place, waiting for it if need be."""
        if self.pending is not None and (not only_if_ready or self.pending.ready(self.device)):
            pending, self.pending = self.pending, None
            pending.finish()
            prune(self.root, self.keep)
            self._note(pending.path.name, time.perf_counter() - self.began)

    def _note(self, name: str, seconds: float) -> None:
        """Log what it took."""
        if ranks.rank():
            return
        size = sum(size for _, size, _ in read_manifest(self.root / name))
        still = f", training stood still for {self.seconds:.2g} s" if self.beside else ""
        log.info(
            "checkpoint %s: %.3g GB in %.2g s (%.2g GB/s)%s", name, size / 1e9, seconds, size / 1e9 / seconds, still
        )


class BackgroundWriter:
    """Starts saves, one at a time; keeps the room of the copies."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ppomax-save")

    def start(self, path: Path, files: dict[str, dict[str, Lazy]], add: Callable[[Path], None]) -> PendingSave:
        """Copy this rank's share of the tensors as they are now, and have it written. Every rank calls; an earlier save
        is finished by then."""
        part = begin_together(path, files)
        share: Share = copied(share_of(files), self._buffers)
        return PendingSave(path, self._thread.submit(write_share, part, share), add)
