"""The compiled CPU library as such: each instruction set that this machine has, forked children, callers on several
threads, and a library that is not there."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import ppomax_kernels as K
import pytest
import torch
from ppomax_kernels.backends import abi

from . import verify
from .backends import Backend
from .cases import KL, LOGITS, PACKED, POLICY, SPREADS, VALUE, Logits

CPU = Backend("cpu", "cpu")
SMALL = [case for case in LOGITS if case.vocab <= 1025]


def test_each_instruction_set(isa: int) -> None:
    assert abi.library().ppomax_isa() == isa
    for logits in SMALL:
        verify.token_logprobs(CPU.bind(K.token_logprobs), logits)
    for packed in PACKED:
        verify.gae(CPU.bind(K.gae), packed)
    for spread in SPREADS:
        verify.whiten(CPU.bind(K.whiten), spread)
    for tokens in KL:
        verify.kl_penalty(CPU.bind(K.kl_penalty), tokens)
    for tokens in POLICY:
        verify.ppo_loss(CPU.bind(K.ppo_loss), tokens)
    for tokens in VALUE:
        verify.value_loss(CPU.bind(K.value_loss), tokens)


def test_an_unknown_instruction_set_is_refused() -> None:
    before = abi.library().ppomax_isa()
    assert abi.library().ppomax_force_isa(99) != 0
    assert abi.library().ppomax_isa() == before


def test_forked_children_and_threads_get_the_same_bits() -> None:
    """A child has none of its parent's worker threads; a pool that is busy leaves the caller to work alone."""
    x, labels, _, _ = Logits((64,), 32000).draw()
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    truth = K.token_logprobs(x, labels)

    def same() -> bool:
        return all(torch.equal(K.token_logprobs(x, labels), truth) for _ in range(3))

    child = os.fork()
    if child == 0:
        os._exit(0 if same() else 1)
    found: list[bool] = []
    callers = [threading.Thread(target=lambda: found.append(same())) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(threads)
    assert os.waitpid(child, 0)[1] == 0, "the forked child hung, died or computed something else"
    assert found == [True] * 4


def test_a_missing_library_says_where_it_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "LIBRARY", "libnowhere.so")
    with pytest.raises(RuntimeError, match=r"impl='cpu' needs the compiled library.*libnowhere\.so.*pip install"):
        abi.library_path()


def swept(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", *command],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_no_call_of_a_raw_op_crashes_however_wrong_it_is() -> None:
    """A cheap look; the same sweep under the address sanitizer sees what does not crash."""
    said = swept("tests.kernels.raw_sweep", "cpu")
    assert all(f"{op}" in said for op in ("gae", "token_logprobs_bwd", "linear_ppo_loss_fwd", "whiten", "sample"))


@pytest.mark.slow
def test_no_call_of_a_raw_op_crashes_in_triton_s_interpreter() -> None:
    pytest.importorskip("triton", reason="triton: not installed")
    assert "whiten" in swept("tests.kernels.raw_sweep", "triton")


@pytest.mark.slow
@pytest.mark.sanitizers
def test_kernels_and_raw_ops_are_clean_under_the_sanitizers() -> None:
    if platform.system() != "Linux" or shutil.which("cmake") is None:
        pytest.skip("sanitizers: Linux with cmake is wanted")
    assert swept("tests.kernels.sanitized").endswith("clean\n")


def test_a_library_built_without_cuda_serves_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lacks every function of CUDA's; nothing may ask for one."""
    whole = ctypes.CDLL(str(abi.library_path()))

    class WithoutCuda:
        def __getattr__(self, name: str) -> object:
            if name.endswith("_cuda") or name == "ppomax_cuda_error":
                raise AttributeError(f"undefined symbol: {name}")
            return (lambda: 0) if name == "ppomax_cuda_built" else getattr(whole, name)

    monkeypatch.setattr(abi.ctypes, "CDLL", lambda path: WithoutCuda())
    lib = abi.library.__wrapped__()
    assert lib.ppomax_gae_cpu.argtypes == abi.SIGNATURES["ppomax_gae_cpu"]
