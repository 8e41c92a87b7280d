"""The CUDA kernels' own source, compiled by the C++ compiler and run block by block on this machine (cuda_on_host.h),
against the oracles: indices, alignment, tails, masks, carries and reductions are proven without a GPU. Its machine
code is not: see test_cuda_build.py, and the tests of the ops, which run on impl="cuda" where there is a GPU."""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import ppomax_kernels as K
import pytest
import torch
from hypothesis import given
from ppomax_kernels import dispatch
from ppomax_kernels.backends import abi, native_cuda

from . import strategies, test_gae, test_token_logprobs, verify
from .backends import Backend
from .cases import LOGITS, PACKED, Logits, Packed

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc/cuda" / name for name in ("token_logprobs.cu", "gae.cu", "error.cu")]
CUDA = Backend("cuda", "cpu")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here (CXX, c++, g++, clang++)")
    library = tmp_path_factory.mktemp("cuda_on_host") / "kernels.so"
    shim = Path(__file__).with_name("cuda_on_host.h")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-include", str(shim), "-x", "c++"]
    subprocess.run([compiler, *flags, *map(str, SOURCES), "-o", str(library)], check=True)
    lib = ctypes.CDLL(str(library))
    for name, types in abi.SIGNATURES.items():
        if name.endswith("_cuda"):
            getattr(lib, name).argtypes = types
    lib.ppomax_cuda_error.restype = ctypes.c_char_p
    return lib


@pytest.fixture(autouse=True, scope="module")
def on_host(compiled: ctypes.CDLL) -> Iterator[None]:
    """impl="cuda" of the public ops runs the compiled kernels on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.RUNS_ON, "cuda", "cpu")
        patch.setattr(native_cuda, "library", lambda: compiled)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=None))
        yield


@pytest.mark.parametrize("case", LOGITS, ids=str)
def test_oracle_of_logprobs(case: Logits) -> None:
    verify.token_logprobs(CUDA.bind(K.token_logprobs), case)


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_oracle_of_gae(case: Packed) -> None:
    verify.gae(CUDA.bind(K.gae), case)


@given(case=strategies.logits())
def test_drawn_logprobs(case: Logits) -> None:
    verify.token_logprobs(CUDA.bind(K.token_logprobs), case)


@given(case=strategies.packed())
def test_drawn_gae(case: Packed) -> None:
    verify.gae(CUDA.bind(K.gae), case)


@pytest.mark.parametrize("padded", [False, True])
def test_long(padded: bool) -> None:
    test_gae.test_long(CUDA, padded, 0.97)


def test_wrong_label_gives_nan() -> None:
    logits = torch.randn(4, 37, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logprobs, entropy = K.token_logprobs(logits, torch.tensor([3, -1, 37, 2**40]), return_entropy=True, impl="cuda")
    (d,) = torch.autograd.grad([logprobs.sum() + entropy.sum()], logits)
    for x in (logprobs, entropy, d[:, 0]):
        assert torch.isnan(x).tolist() == [False, True, True, True]


def test_wrong_cu_seqlens_stay_inside(compiled: ctypes.CDLL) -> None:
    r = torch.ones(16)
    ends = torch.tensor([-7, 3, 2**30, 1, 8], dtype=torch.int32)
    for x in (advantages := torch.full((48,), 77.0), returns := torch.full((48,), 77.0)):
        x[16:32] = 0.0
    at = 16 * advantages.element_size()
    compiled.ppomax_gae_cuda(
        r.data_ptr(), 0, 0, r.data_ptr(), 0, 0, None, 0, ends.data_ptr(), 4, 16, 1.0, 0.9, None, 0, None, 0,
        advantages.data_ptr() + at, returns.data_ptr() + at, None,
    )  # fmt: skip
    for x in (advantages, returns):
        assert bool((x[:16] == 77.0).all())
        assert bool((x[32:] == 77.0).all())


@pytest.mark.parametrize(
    "test",
    [
        test_token_logprobs.test_dead_row_and_label,
        test_token_logprobs.test_one_word,
        test_token_logprobs.test_alone_or_among_many,
        test_token_logprobs.test_gradient_over_the_logits,
        test_token_logprobs.test_rows_far_apart,
        test_gae.test_lam_1_is_monte_carlo_lam_0_is_td,
        test_gae.test_borders,
        test_gae.test_packed_is_padded,
        test_gae.test_rows_far_apart,
    ],
    ids=lambda test: f"{test.__module__.rsplit('.', 1)[-1]}.{test.__name__}",
)
def test_pitfall(test: object) -> None:
    test(CUDA)  # type: ignore[operator]
