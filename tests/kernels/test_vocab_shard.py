"""The linear ops with the vocabulary split over 2 gloo ranks, in one launch."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "tests.kernels.vocab_shard_ranks")


def test_two_ranks_with_unequal_shards_equal_the_whole_weight() -> None:
    done = subprocess.run(
        [sys.executable, *LAUNCH],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("ok ") == 4, done.stdout
