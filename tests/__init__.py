"""Tests of every floor. OpenMP reads its policy when torch loads it, so it is set here, before conftest.py: threads
that spin while they wait stall on a busy machine (bench/LOG.md)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
