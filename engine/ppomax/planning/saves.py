"""Seconds of a checkpoint, and from a kill to the next step, from the rates of disk, hash and host link.

    written     max(bytes / disk, a rank's largest file / hash): its files are hashed at once, on a core each
    still       a rank's bytes over its host link where it is written from a copy, else until it is written
    next step   start + models' files / disk + the checkpoint read, hashed and moved to where it trains
A kill is taken to be noticed at once."""

from __future__ import annotations

from dataclasses import dataclass

from ppomax.planning.job import Job, roles
from ppomax.planning.seconds import Assumptions, Device
from ppomax.planning.steady import checkpoint_copies


@dataclass(frozen=True)
class Saves:
    """What a run's checkpoints take."""

    state: int
    """Bytes of one, over all ranks."""
    written: float
    """Seconds until it is whole."""
    still: float
    """Of those, training waits for it."""
    models: float
    """Seconds in which a start reads the models' files."""
    read: float
    """Seconds in which a resumed run reads its checkpoint."""
    start: float
    """Seconds from a launcher's start until a process reads its first file."""

    @property
    def to_next_step(self) -> float:
        """Seconds from a kill, noticed at once, to the next step's first forward."""
        return self.start + self.models + self.read


def saves_of(job: Job, device: Device, assumed: Assumptions) -> Saves:
    """The checkpoints of `job`; its file system serves all nodes at one rate."""
    share = checkpoint_copies(job)["checkpoint copies"]
    largest = max(r.trained for r in roles(job)) * (12 if job.width == 2 else 8) // job.ranks
    state, hashed = share * job.ranks, largest / assumed.hash_rate
    written = max(state / assumed.disk, hashed)
    moved = share / (device.host_link * assumed.link_efficiency)
    nodes = -(-job.ranks // job.ranks_per_node)
    files = {(r.sizes, r.name in ("policy", "reference")) for r in roles(job)}
    models = sum(sizes.params for sizes, _ in files) * job.width * nodes / assumed.disk
    still = moved if job.background_saves else written
    return Saves(state, written, still, models, written + moved, assumed.start_seconds)
