"""Advantages whitened over a process group: 2 gloo ranks, one launch, every check in it (whiten_ranks.py)."""

import os
import subprocess
import sys
from pathlib import Path

from .whiten_ranks import SHARES

ROOT = Path(__file__).resolve().parents[2]


def test_whiten_over_two_ranks() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"]
    done = subprocess.run(
        [*launcher, "tests.kernels.whiten_ranks"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("ok ") == 2 * len(SHARES) + 2, done.stdout
