"""Ahead-of-time proof of the Triton back-end, without a GPU: every kernel is compiled for the chips named, and what it
takes of them is read off the binary.

The launchers themselves run, on meta tensors of realistic shapes, and hand over each launch (see launch_triton.py):
argument types, divisibility by 16 and launch constants are thus those of a real call. NVIDIA binaries are asked through
the cuobjdump that Triton's wheel carries, AMD ones through the notes in their assembly text."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..registry import with_triton_kernels
from .launch_triton import Case, recorded

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch as a launcher made it: the kernel, the types and constants of its arguments, its options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]
    case: str

    @property
    def key(self) -> str:
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.aligned} {self.options}"


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers and spilled bytes a thread, bytes of shared memory; or why it failed."""

    registers: int
    spills: int
    shared: int
    error: str = ""


def cases() -> Iterator[Case]:
    """Calls of every op's launchers, each with a name: shapes, dtypes and options of real use."""
    for module in with_triton_kernels():
        yield from import_module(f"ppomax_kernels.{module}_triton").cases()


def launches(backend: str) -> list[Launch]:
    """Every launch of every case on chips of a backend, "cuda" or "hip"; each distinct one once."""
    found: dict[str, Launch] = {}
    for case, call in cases():

        def record(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], case: str = case) -> None:
            launch = as_compiled(kernel, args, constants, case)
            found.setdefault(launch.key, launch)

        with recorded(record, backend):
            call()
    return list(found.values())


def as_compiled(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], case: str) -> Launch:
    """The types that Triton's launcher would derive: 1 is a constant, multiples of 16 are noted, unless told not to."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | {
        k: v for k, v in constants.items() if k in kernel.arg_names
    }
    options = tuple(sorted((k, v) for k, v in constants.items() if k not in kernel.arg_names))
    signature, fixed, aligned = {}, {}, []
    for parameter in kernel.params:
        name, x = parameter.name, given[parameter.name]
        if x is None or parameter.is_constexpr or (type(x) is int and x == 1 and not parameter.do_not_specialize):
            signature[name], fixed[name] = "constexpr", x
            continue
        if isinstance(x, Tensor):
            signature[name] = POINTERS[x.dtype]
        elif isinstance(x, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
        plain = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if not plain and (isinstance(x, Tensor) or (type(x) is int and x % 16 == 0)):
            aligned.append(name)
    return Launch(kernel, signature, fixed, tuple(aligned), options, case)


def compile_launch(launch: Launch, arch: str) -> Usage:
    """Compile one launch for `arch`. A compiler's refusal is a result here, and is returned as such."""
    names = launch.kernel.arg_names
    source = ASTSource(
        launch.kernel,
        launch.signature,
        constexprs=launch.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    try:
        built = triton.compile(source, target=target(arch), options=dict(launch.options))
    except Exception as refusal:  # of any of the compiler's passes, or of ptxas
        return Usage(0, 0, 0, f"{type(refusal).__name__}: {str(refusal).strip().splitlines()[-1]}")
    if arch.startswith("sm_"):
        registers, spills = _cubin_usage(built.asm["cubin"])
    else:
        registers, spills = _amd_usage(built.asm["amdgcn"])
    return Usage(registers, spills, built.metadata.shared)


def target(arch: str) -> GPUTarget:
    if re.fullmatch(r"sm_\d+", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if re.fullmatch(r"gfx9[0-9a-f]+", arch):
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"compile: arch must be one of {', '.join(ARCHS)} or alike, got {arch!r}")


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of which these kernels have none but spills."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    found = {
        key: int(value)
        for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly)
    }
    return found["vgpr_count"], 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])


def main(archs: list[str], quick: bool = False) -> int:
    """Compile everything (or, if quick, the last launch of each kernel, which has the most options on) for `archs`, and
    print a line for each kernel: its worst case. Returns the exit status."""
    if triton.knobs.runtime.interpret:
        print("compile: TRITON_INTERPRET is set, so there are no kernels to compile; unset it", file=sys.stderr)
        return 2
    for arch in archs:
        target(arch)
    tried = bad = 0
    for arch in archs:
        worst: dict[str, list[tuple[Usage, Launch]]] = {}
        todo = launches(target(arch).backend)
        if quick:
            todo = list({launch.kernel.__name__: launch for launch in todo}.values())
        tried += len(todo)
        for launch in todo:
            usage = compile_launch(launch, arch)
            worst.setdefault(launch.kernel.__name__, []).append((usage, launch))
            if usage.error or usage.spills:
                bad += 1
                print(
                    f"{arch} {launch.kernel.__name__} [{launch.case}] {usage.error or f'spills {usage.spills} B'}",
                    flush=True,
                )
        _print(arch, worst)
    print(f"\n{tried} variants for {', '.join(archs)}: {bad or 'none'} failed or spilled")
    return 1 if bad else 0


def _print(arch: str, worst: dict[str, list[tuple[Usage, Launch]]]) -> None:
    print(f"\n{arch:8}{'kernel':36}{'variants':>9}{'registers':>10}{'spilled B':>10}{'shared B':>9}  most registers in")
    for name, results in worst.items():
        most, where = max(results, key=lambda pair: (pair[0].spills, pair[0].registers))
        shared = max(usage.shared for usage, _ in results)
        figures = f"{len(results):>9}{most.registers:>10}{most.spills:>10}{shared:>9}"
        print(f"{'':8}{name:36}{figures}  {where.case}", flush=True)
