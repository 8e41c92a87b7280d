"""The CUDA kernels compile through the CMake build, for every architecture, without a register spilled; and the library
that has them loads where there is no GPU. nvcc is looked for as the build does: CUDACXX, CUDA_HOME/bin, PATH."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from ppomax_kernels.backends import abi, native_cuda

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
KERNELS = {"token_logprobs_kernel": 6, "token_logprobs_backward_kernel": 6, "gae_kernel": 1}  # dtypes x softcap or not


def nvcc() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/nowhere")) / "bin" / "nvcc"
    return os.environ.get("CUDACXX") or (str(home) if home.is_file() else shutil.which("nvcc"))


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize(
    "architectures", [("sm_90",), pytest.param(("sm_80", "sm_100"), marks=pytest.mark.slow)], ids=", ".join
)
def test_compiles_without_spills(tmp_path: Path, architectures: tuple[str, ...]) -> None:
    if nvcc() is None:
        pytest.skip("no CUDA compiler here; put nvcc on the PATH or set CUDACXX or CUDA_HOME")
    if shutil.which("cmake") is None:
        pytest.skip("no cmake here; pip install cmake")
    chosen = f"-DPPOMAX_CUDA_ARCHITECTURES={';'.join(a.removeprefix('sm_') for a in architectures)}"
    log = run("cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_CUDA_FLAGS=-Xptxas=-v", chosen)
    assert f"CUDA kernels: built for {', '.join(architectures)}" in log, log
    report = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        run("cmake", "--build", str(tmp_path), "--target", "ppomax_cuda"),
        re.DOTALL,
    )
    for arch in architectures:
        found = [name for name, of, *_ in report if of == arch]
        for kernel, count in KERNELS.items():
            assert sum(f"{len(kernel)}{kernel}" in name for name in found) == count, f"{kernel} for {arch}: {found}"
    for name, arch, stack, stores, loads, registers in report:
        spills = f"{name} for {arch} spills: {stack} B of stack, {registers} registers"
        assert (stack, stores, loads) == ("0", "0", "0"), spills


@pytest.mark.parametrize(
    ("compiler", "setting", "note"),
    [("/nowhere/nvcc", "ON", "no working CUDA compiler was found"), ("nvcc", "OFF", "left out by -DPPOMAX_CUDA=OFF")],
)
def test_builds_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, setting: str, note: str
) -> None:
    """A machine whose CUDA compiler is missing or broken builds all the rest, and says why."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake here; pip install cmake")
    monkeypatch.setenv("CUDACXX", compiler)
    assert f"CUDA kernels: {note}" in run("cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DPPOMAX_CUDA={setting}")
    run("cmake", "--build", str(tmp_path), "--target", "ppomax_cuda_note")


def test_library_says_what_it_has() -> None:
    lib = abi.library()
    lib.ppomax_cuda_note.restype = ctypes.c_char_p
    note = lib.ppomax_cuda_note().decode()
    assert lib.ppomax_cuda_built() == (note.startswith("built for "))
    if lib.ppomax_cuda_built():
        assert all(arch in note for arch in ARCHITECTURES)
        assert native_cuda.why_not() is None
    else:
        assert note in str(native_cuda.why_not())


def test_call_without_a_device_says_so() -> None:
    """No crash, and a reason: the C face on a machine that has the kernels but no GPU."""
    if native_cuda.why_not() is not None:
        pytest.skip(f"cuda: {native_cuda.why_not()}")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    lib, x = native_cuda.library(), torch.zeros(4)
    at = x.data_ptr()
    status = lib.ppomax_gae_cuda(at, 0, 0, at, 0, 0, None, 0, None, 1, 4, 1.0, 0.95, None, 0, None, 0, at, at, None)
    assert status == native_cuda.CUDA_ERROR
    assert lib.ppomax_cuda_error().decode() not in ("", "no error")
