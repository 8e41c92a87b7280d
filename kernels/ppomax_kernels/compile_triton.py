"""Ahead-of-time proof of the Triton back-end, without a GPU: every kernel is compiled for the chips named, and what it
takes of them is read off the binary.

The launchers themselves run, on meta tensors of realistic shapes, and hand over each launch (see launch_triton.py):
argument types, divisibility by 16 and launch constants are thus those of a real call. NVIDIA binaries are asked through
the cuobjdump that Triton's wheel carries, AMD ones through the notes in their assembly text."""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .gae_triton import gae_triton
from .kl_penalty_triton import kl_penalty_backward_triton, kl_penalty_triton
from .launch_triton import recorded
from .linear_token_logprobs_triton import linear_token_logprobs_triton
from .ppo_loss_triton import ppo_loss_triton
from .sample_triton import sample_triton
from .token_logprobs_triton import token_logprobs_backward_triton, token_logprobs_triton
from .token_rewards_triton import token_rewards_triton
from .value_loss_triton import value_loss_triton
from .whiten_triton import moments_triton, whiten_triton

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
Case = tuple[str, Callable[[], object]]
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


def _float(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _int(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _logprob_cases() -> Iterator[Case]:
    shapes = [(d, v) for d in (torch.float32, torch.bfloat16) for v in (1000, 50257, 151936)] + [
        (torch.float16, 151936)
    ]
    for (dtype, vocab), (cap, ent) in itertools.product(shapes, ((0.0, False), (0.0, True), (30.0, True))):
        x, y, row = _float(64, vocab, dtype=dtype), _int(64), _float(64)
        name = f"{str(dtype)[6:]} V={vocab}{' softcap' if cap else ''}{' entropy' if ent else ''}"
        yield name, partial(token_logprobs_triton, x, y, 1.0, cap, ent, -100)
        upstream = row, row if ent else None
        yield name, partial(token_logprobs_backward_triton, *upstream, x, y, row, row, 1.0, cap, -100)


def _token_cases() -> Iterator[Case]:
    x, mask, cu, score = _float(4096), _int(4096, dtype=torch.bool), _int(9, dtype=torch.int32), _float(8)
    for dtype, est in ((torch.float32, "k1"), (torch.float32, "k2"), (torch.float32, "abs"), (torch.bfloat16, "k3")):
        name, z = f"{str(dtype)[6:]} {est}", _float(4096, dtype=dtype)
        yield name, partial(kl_penalty_triton, z, z, est)
        yield name, partial(kl_penalty_backward_triton, x, z, z, est)
        yield name, partial(token_rewards_triton, score, z, z, cu, 0.1, est)
    for dtype, m, per in ((torch.float32, None, None), (torch.float32, mask, score), (torch.bfloat16, mask, None)):
        name = f"{str(dtype)[6:]}{' mask' if m is not None else ''}{' lam, bootstrap' if per is not None else ''}"
        z, square = _float(4096, dtype=dtype), _float(8, 512, dtype=dtype)
        yield name + " packed", partial(gae_triton, z, z, cu, m, 1.0, 0.95, per, per)
        m = None if m is None else m.view(8, 512)
        yield name + " padded", partial(gae_triton, square, square, None, m, 1.0, 0.95, per, per)


def _sum_cases() -> Iterator[Case]:
    moments, norm = _float(3, dtype=torch.float64), _float()
    for dtype, n, full in itertools.product((torch.float32, torch.bfloat16), (4096, 65536), (False, True)):
        z, m, c = _float(n, dtype=dtype), _int(n, dtype=torch.bool) if full else None, norm if full else None
        name = f"{str(dtype)[6:]} N={n}{' mask, gradient' if full else ''}"
        yield name, partial(value_loss_triton, z, z, z, m, c, 0.0, 0.2, full)
        yield name, partial(moments_triton, z, m)
        yield name, partial(whiten_triton, z, m, moments, full, 1e-8)
        yield name, partial(ppo_loss_triton, z, z, z, m, None, None, None, c, 0.0, 0.2, 0.2, 0.0, 0.0, "k3", 0.0, full)
        for est in ("k3", "k2") if full else ():
            losses = partial(ppo_loss_triton, z, z, z, m, z, z, z, c, 0.0, 0.2, 0.2, 3.0, 0.1, est, 0.01, True)
            yield f"{name}, entropy, weights, {est}", losses


def _sample_cases() -> Iterator[Case]:
    kinds = ((torch.float32, 1000), (torch.float32, 151936), (torch.bfloat16, 151936), (torch.bfloat16, 50257))
    for dtype, vocab in kinds:
        x, seeds = _float(8, vocab, dtype=dtype), _int(8)
        for temperature, k, p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 50, 1.0), (1.0, 0, 0.9), (1.0, 50, 0.9)):
            name = f"{str(dtype)[6:]} V={vocab} temperature={temperature:g} k={k} p={p:g}"
            yield name, partial(sample_triton, x, seeds, seeds, temperature, k, p)


def cases() -> Iterator[Case]:
    """Calls of every launcher, each with a name: shapes, dtypes and options of real use."""
    yield from _logprob_cases()
    yield from _token_cases()
    yield from _sum_cases()
    yield from _sample_cases()
    yield from _linear_cases()


def _linear_cases() -> Iterator[Case]:
    labels = _int(4096)
    for dtype, depth, full in itertools.product((torch.float32, torch.bfloat16), (4096, 4100), (False, True)):
        hidden, weight = _float(4096, depth, dtype=dtype), _float(151936, depth, dtype=dtype)
        bias, cap = (_float(151936, dtype=dtype), 30.0) if full else (None, 0.0)
        name = f"{str(dtype)[6:]} D={depth}{' bias, softcap, entropy' if full else ''}"
        yield name, partial(linear_token_logprobs_triton, hidden, weight, labels, bias, 1.0, cap, full, -100)


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
