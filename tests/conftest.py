"""Before anything imports triton: without a GPU its kernels run in the interpreter. Hypothesis draws the same
examples in every run."""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

settings.register_profile(
    "ppomax",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ppomax")


def pytest_configure() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
