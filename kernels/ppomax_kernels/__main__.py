"""`python -m ppomax_kernels`: which op runs on which back-end here, and why one does not.
`python -m ppomax_kernels compile --arch sm_90 sm_100`: compiles every Triton kernel without a GPU, and prints
registers, spills and shared memory; exit status 1 if one fails or spills (see compile_triton.py)."""

import argparse
import importlib.util
import sys

import torch

from .dispatch import triton_interprets
from .registry import BACKENDS, OPS, table_of


def missing() -> dict[str, str]:
    """For each back-end that cannot run here, why; nothing for one that can."""
    reasons = {name: why() for name, why in (("cpu", _cpu), ("triton", _triton), ("cuda", _cuda))}
    return {name: reason for name, reason in reasons.items() if reason}


def _cpu() -> str:
    from .backends import abi

    try:
        abi.library()
    except (RuntimeError, OSError) as problem:
        return str(problem)
    return ""


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if torch.cuda.is_available() or triton_interprets():
        return ""
    return "no GPU that torch can use; TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for tests"


def _cuda() -> str:
    from .backends import native_cuda

    if _cpu():
        return "the compiled library is not there (see cpu)"
    reason = native_cuda.why_not()
    if reason is None and not torch.cuda.is_available():
        reason = "no GPU that torch can use"
    return reason or ""


def show() -> None:
    """The table of ops and back-ends, and the reasons below it."""
    absent = missing()
    note = " (interpreted)" if triton_interprets() and not torch.cuda.is_available() else ""
    print(f"{'op':24}" + "".join(f"{name:10}" for name in BACKENDS))
    for op in OPS:
        table = table_of(op)
        cells = ["-" if name not in table else "no" if name in absent else "yes" for name in BACKENDS]
        print(f"{op:24}" + "".join(f"{cell:10}" for cell in cells))
    print(f"\nyes: runs here{note}.  no: see below.  -: the op has no such back-end.")
    for name, reason in absent.items():
        print(f"{name}: {reason}")


def compile_all(archs: list[str], quick: bool) -> int:
    if importlib.util.find_spec("triton") is None:
        print("compile: triton is not installed: pip install triton", file=sys.stderr)
        return 2
    from .backends import compile_triton

    try:
        return compile_triton.main(archs, quick)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ppomax_kernels", description="Which op runs on which back-end here."
    )
    commands = parser.add_subparsers(dest="command", title="commands")
    ahead = commands.add_parser("compile", help="compile every Triton kernel ahead of time, without a GPU")
    ahead.add_argument("--arch", nargs="+", default=["sm_90"], metavar="ARCH", help="sm_80, sm_90, sm_100, gfx942 ...")
    ahead.add_argument(
        "--quick", action="store_true", help="one launch of each kernel, not every combination of options"
    )
    asked = parser.parse_args(argv)
    if asked.command == "compile":
        return compile_all(asked.arch, asked.quick)
    show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
