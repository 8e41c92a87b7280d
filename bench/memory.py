"""Peak memory of one call beyond its inputs and its results (for a loss: its gradients).

On a GPU: torch's peak allocation during the call, less what was allocated before and what the results hold. On a
CPU: a fresh process makes the inputs, runs the same implementation once on a tiny shape (so that libraries are
loaded and threads started), asks the kernel to forget the peak of its resident memory, runs the call once, and reads
the peak back: so scratch memory of C++ code and of GEMM libraries counts like torch's. Linux only. Not measured for
torch.compile, whose compiler would be counted."""

import argparse
import ctypes
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .problem import Problem

Find = Callable[[str, str, str, torch.device, torch.dtype], Problem]


def bytes_of(results: Sequence[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in {x.data_ptr(): x for x in results}.values())


def on_gpu(run: Callable[[], Sequence[Tensor]]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - bytes_of(results)


def on_cpu(problem: Problem, impl: str, size: str) -> int | None:
    """None where the system cannot say (no Linux /proc)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [
        sys.executable,
        "-m",
        "bench.memory",
        problem.op,
        problem.mode,
        impl,
        str(problem.dtype)[6:],
        size,
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {impl} in {problem.op}: {done.stderr[-800:]}")
    return int(done.stdout.split()[-1])


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _give_back_free_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main(arguments: Sequence[str]) -> None:
    from .ops import find

    parser = argparse.ArgumentParser(prog="bench.memory")
    for name in ("op", "mode", "impl", "dtype", "size", "threads"):
        parser.add_argument(name)
    args = parser.parse_args(arguments)
    torch.set_num_threads(int(args.threads))
    device, dtype = torch.device("cpu"), getattr(torch, args.dtype)
    find(args.op, args.mode, "tiny", device, dtype).runs[args.impl]()
    problem = find(args.op, args.mode, args.size, device, dtype)
    _give_back_free_memory()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    results = problem.runs[args.impl]()
    print(max(0, _status("VmHWM") - before - bytes_of(results)))


if __name__ == "__main__":
    main(sys.argv[1:])
