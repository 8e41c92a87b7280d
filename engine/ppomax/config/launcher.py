"""What a launcher (torchrun, deepspeed, Slurm with its variables set) told this process: how many ranks it started, and
which one this is. Read from the environment, so no torch is loaded; sharding/ranks.py is about ranks that talk."""

from __future__ import annotations

import os


def started_ranks() -> int:
    """Ranks that the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_on_node() -> int:
    """How many of them are on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def restarts() -> int:
    """How often torchrun has started the ranks anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
