"""`ppomax doctor`: what a run would find on this machine, before it does. Under a launcher, on all ranks together.

Each check gives one finding: fine; strange, which a run may live with; or bad, which ends one, with the mend."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from ppomax.planning.plan import free_host_memory, gib
from ppomax.saving.beside import sync
from ppomax.saving.lock import claimed
from ppomax.sharding import ranks

NEEDED = {"torch": "2.11", "transformers": "5.17", "safetensors": "0.5", "tokenizers": "0.22", "datasets": "4.0"}
"""Of every run; the least version that the tests have seen."""
SHARDED = {"deepspeed": "0.19"}
"""Of a run on several ranks."""
WRITTEN = 64 << 20
"""Bytes of the disk's trial."""
SLOW = 50e6
"""Bytes a second below which a disk is named."""
STALE = 600.0
"""Seconds after which a lock of a compilation counts as left behind."""


class Finding(NamedTuple):
    """What one check found."""

    name: str
    state: Literal["ok", "strange", "bad"]
    words: str


def examine(out: Path) -> list[Finding]:
    """All findings about this machine and the folder `out`, where a run would write. Every rank calls."""
    checks: list[Callable[[], list[Finding]]] = [
        packages, kernels, gpus, memory, compilers, lambda: folder(out), lambda: exchange(out),
    ]  # fmt: skip
    return [finding for check in checks for finding in check()]


def packages() -> list[Finding]:
    """Versions against the least ones."""
    found = []
    for name, least in (NEEDED | SHARDED).items():
        state: Literal["strange", "bad"] = "bad" if name in NEEDED else "strange"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            need = "every run needs it" if name in NEEDED else "runs on several ranks need it"
            found.append(Finding(name, state, f"not installed; {need}: pip install 'ppomax[train]'"))
            continue
        good = _numbers(version) >= _numbers(least)
        found.append(Finding(name, "ok" if good else state, version if good else f"{version}, {least} is wanted"))
    return found


def kernels() -> list[Finding]:
    """Whether the compiled library is there, and what it can use."""
    from ppomax_kernels.backends import native_cuda
    from ppomax_kernels.backends.abi import library

    try:
        library()
    except Exception as error:  # whatever the loader says
        return [Finding("kernels", "bad", f"the compiled library does not load: {error}; install the package anew")]
    found = [Finding("kernels", "ok", f"compiled library, {torch.backends.cpu.get_cpu_capability()}")]
    why = native_cuda.why_not() if torch.cuda.is_available() else None
    if why is not None:
        found.append(Finding("cuda kernels", "strange", f"{why}; Triton's are used instead"))
    return found


def gpus() -> list[Finding]:
    """Each GPU with its free memory, and whether they reach each other."""
    if not torch.cuda.is_available():
        return [Finding("gpus", "ok", "none; runs take the CPU")]
    found = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        state: Literal["ok", "strange"] = "ok" if free > 0.9 * total else "strange"
        words = f"{torch.cuda.get_device_name(i)}, {gib(free)} free of {gib(total)}"
        found.append(Finding(f"gpu {i}", state, words + ("" if state == "ok" else "; another process holds the rest")))
    count = torch.cuda.device_count()
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        words = f"{len(apart)} pairs do not reach each other directly (first {apart[0]}); gathering goes over the host"
        found.append(Finding("peers", "strange", words))
    if count > 1 and torch.distributed.is_nccl_available():
        found.append(Finding("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version()))))
    return found


def memory() -> list[Finding]:
    """What processes can have of the host's, and of the memory that they share."""
    found = [Finding("host memory", "ok", f"{gib(free_host_memory())} free")]
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    if shared is not None and shared.total < 1 << 30 and torch.cuda.device_count() > 1:
        words = f"/dev/shm holds {gib(shared.total)}, which NCCL fills; start the container with --shm-size 16g"
        found.append(Finding("shared memory", "bad", words))
    return found


def compilers() -> list[Finding]:
    """What DeepSpeed compiles with at first use, and locks that a killed compilation has left, which hang the next."""
    have = [name for name in ("c++", "ninja") if shutil.which(name)]
    missing = [name for name in ("c++", "ninja") if name not in have]
    words = "c++ and ninja" if not missing else f"no {' nor '.join(missing)}: offloaded optimisers cannot be compiled"
    found = [Finding("compilers", "strange" if missing else "ok", words)]
    default = Path.home() / ".cache" / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))
    stale = [p for p in root.glob("**/lock") if time.time() - p.stat().st_mtime > STALE]
    found += [Finding("lock", "bad", f"{p} was left by a compilation that was killed; delete it") for p in stale]
    return found


def folder(out: Path) -> list[Finding]:
    """Whether the run's folder can be written and locked, how fast its disk is, and what is free."""
    trial = out / f".doctor-{ranks.rank()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        trial.write_bytes(os.urandom(1 << 20) * (WRITTEN >> 20))
        sync(trial)
        rate = WRITTEN / (time.perf_counter() - began)
        with claimed(trial.with_suffix(".lock")):
            pass
    except OSError as error:
        return [Finding("folder", "bad", f"{out} cannot be written and locked: {error}; name another --out")]
    finally:
        if trial.exists():
            trial.unlink()
        shutil.rmtree(trial.with_suffix(".lock"), ignore_errors=True)
    words = f"{out}: {rate / 1e6:.0f} MB/s, {gib(shutil.disk_usage(out).free)} free"
    if rate < SLOW:
        return [Finding("folder", "strange", f"{words}; a 7B's checkpoint of 187 GB takes {187e9 / rate / 60:.0f} min")]
    return [Finding("folder", "ok", words)]


def exchange(out: Path) -> list[Finding]:
    """Under a launcher: whether all ranks see one folder, and how fast they exchange 64 MB."""
    if ranks.world_size() == 1:
        return []
    token = ranks.broadcast(f".doctor-{os.getpid()}-{time.time_ns()}")
    if ranks.rank() == 0:
        (out / token).touch()
    ranks.barrier()
    blind = [i for i, seen in enumerate(ranks.gather_objects((out / token).is_file())) if not seen]
    if ranks.rank() == 0:
        (out / token).unlink()
    found = [Finding("ranks", "ok", f"{ranks.world_size()}, all see {out}")]
    if blind:
        words = f"ranks {blind} do not see the folder {out} that rank 0 sees; name one on a file system that all share"
        found = [Finding("ranks", "bad", words)]
    x = torch.zeros(16 << 20, device="cuda" if ranks.talks_by_nccl() else "cpu")
    ranks.sum(x[:1])
    began = time.perf_counter()
    float(ranks.sum(x)[0])
    rate = x.numel() * 4 / (time.perf_counter() - began)
    return [*found, Finding("exchange", "ok", f"{rate / 1e9:.1f} GB/s to sum 64 MB over the ranks")]


def report(found: list[list[Finding]]) -> tuple[str, bool]:
    """A line a finding, those of rank 0 and what is not fine on the others; and whether none is bad."""
    lines = [f"{f.state:8} {f.name:14} {f.words}" for f in found[0]]
    for number, others in enumerate(found[1:], 1):
        lines += [f"{f.state:8} {f.name:14} rank {number}: {f.words}" for f in others if f.state != "ok"]
    bad = sum(f.state == "bad" for others in found for f in others)
    lines.append("a run can start here" if not bad else f"{bad} of these would end a run")
    return "\n".join(lines), not bad


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
