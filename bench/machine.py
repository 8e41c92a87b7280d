"""What the machine is, and its two ceilings, measured in the same run: memory bandwidth and GEMM rate. A ceiling is
the best of its rounds."""

import ctypes
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from ppomax_kernels.backends import abi
from torch import Tensor

from .timing import in_turns, seconds_of

ROOT = Path(__file__).resolve().parents[1]


def card(device: torch.device) -> str:
    """The device's name; of a CPU with the instruction set in use, without which figures do not compare."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()} {instruction_set()}"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def instruction_set() -> str:
    """`AVX-512`, `AVX2`, or the baseline's name, as the library picked it."""
    library = abi.library()
    name: str = library.ppomax_isa_name(library.ppomax_isa()).decode()
    return name.split("(")[-1].rstrip(")")


def commit() -> str:
    """Short hash, with a + where tracked files differ from it; "unknown" outside a git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def versions(device: torch.device) -> str:
    parts = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        import triton

        parts.append(f"triton {triton.__version__}")
    else:
        library = abi.library()
        parts.append(library.ppomax_isa_name(library.ppomax_isa()).decode())
    return "; ".join(parts)


def bandwidth(device: torch.device, seconds: float, megabytes: int) -> float:
    """Bytes a second: a read of the whole buffer by as many threads as torch uses (CPU); a device-to-device copy, bytes
    read plus bytes written (GPU)."""
    size = megabytes * 2**20
    if device.type == "cuda":
        a, b = (torch.empty(size // 4, device=device).normal_() for _ in range(2))
        return 2 * size / in_turns({"copy": lambda: b.copy_(a)}, device, seconds)["copy"].min
    x = torch.ones(size // 4)
    return size / in_turns({"read": lambda: read(x)}, device, seconds)["read"].min


def read(x: Tensor) -> int:
    """Every byte of a contiguous CPU tensor, by as many threads as torch uses, and nothing else."""
    function = abi.library().ppomax_stream_read
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], ctypes.c_uint64
    return int(function(x.data_ptr(), x.numel() * x.element_size(), torch.get_num_threads()))


def gemm_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """FLOPs a second of a large square product on random data; a smaller one where the CPU is slow in that dtype."""

    def product(n: int) -> Callable[[], Tensor]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b

    n = 8192
    if device.type == "cpu":
        product(512)()
        n = 2048 if seconds_of(product(512), 1, device) < 0.02 else 512
    return 2.0 * n**3 / in_turns({"gemm": product(n)}, device, seconds)["gemm"].min
