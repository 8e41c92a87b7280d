"""The fixture `impl`: each test runs on every back-end of its module's op; one that cannot run here is skipped by
name, with its reason. And `isa`: on every instruction set of the machine."""

import importlib.util
import platform
from collections.abc import Iterator

import pytest
import torch
from ppomax_kernels.backends import abi
from ppomax_kernels.registry import OPS, table_of

from .backends import NAMES, Backend
from .sanitized import use_built

use_built()


@pytest.fixture(scope="module", params=NAMES)
def impl(request: pytest.FixtureRequest) -> Backend:
    name = request.param
    op = request.module.__name__.rpartition(".test_")[2]
    if op in OPS and name not in table_of(op):
        pytest.skip(f"{name}: this op has no such back-end")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("cuda: no CUDA device here")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
            pytest.fail("triton: not installed, though its wheel exists for this platform; pip install -e '.[test]'")
        pytest.skip(f"triton: no wheel for {platform.system()} {platform.machine()}")
    return Backend(name, "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[0, 1, 2], ids=["base", "v3", "v4"])
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    """This instruction set in use for the test; the best one again afterwards."""
    lib = abi.library()
    if lib.ppomax_force_isa(request.param):
        pytest.skip(f"instruction set {request.param}: this machine or build does not have it")
    yield request.param
    assert lib.ppomax_force_isa(-1) == 0
    assert lib.ppomax_isa() == lib.ppomax_best_isa()
