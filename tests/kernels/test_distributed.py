"""What goes over a process group: 2 gloo ranks, a launch for each of whiten_ranks.py and sharded_trainers_ranks.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .whiten_ranks import SHARES

ROOT = Path(__file__).resolve().parents[2]


def on_two_ranks(module: str) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m"]
    done = subprocess.run(
        [*launcher, f"tests.kernels.{module}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_whiten_over_two_ranks() -> None:
    said = on_two_ranks("whiten_ranks")
    assert said.count("ok ") == 2 * len(SHARES) + 2, said


def test_linear_ops_inside_fsdp2_and_zero_3_are_those_of_one_process() -> None:
    pytest.importorskip("deepspeed", reason="deepspeed: not installed")
    said = on_two_ranks("sharded_trainers_ranks")
    assert "ok fsdp2" in said
    assert "ok zero_3" in said
