"""Who this process is among the ranks of a run, and what they exchange. Read as `ranks.sum(x)`, `ranks.gather(x)`.

Without an initialised process group of more than one rank every function is the identity, so the code above reads the
same in one process and in many. All of them are collective: every rank calls, in one order."""

from __future__ import annotations

import builtins
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.config.launcher import local_rank, restarts, started_ranks

T = TypeVar("T")


def world_size() -> int:
    """Ranks of the job; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def position() -> tuple[int, int]:
    """This rank's number and how many there are."""
    return rank(), world_size()


def start(device: str = "auto", timeout: float = 3600.0) -> None:
    """Join the job's process group if a launcher started several ranks: nccl on GPUs, gloo on CPUs.

    `timeout`, in seconds, bounds how long a rank waits for another's work; a rank that is gone is noticed far sooner
    (watch.py). In a group that was joined already it takes effect from here on."""
    if started_ranks() == 1 or dist.is_initialized():
        wait_at_most(timeout)
        return
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        torch.cuda.set_device(local_rank())
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    backend, wait = "nccl" if on_gpu else "gloo", timedelta(seconds=timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives a restart, and the addresses of dead ranks are still in it: hence the prefix.
        store = dist.PrefixStore(f"ppomax/start-{restarts()}", launcher_store())
        dist.init_process_group(
            backend, timeout=wait, store=store, rank=int(os.environ["RANK"]), world_size=started_ranks()
        )
    else:
        dist.init_process_group(backend, timeout=wait)


def wait_at_most(seconds: float) -> None:
    """Bound how long an exchange in any group waits, those included that a library has made with its own default."""
    if not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def launcher_store() -> dist.Store:
    """A connection of our own to the store that the launcher or rank 0 keeps."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(minutes=5))


def talks_by_nccl() -> bool:
    """Whether tensors must be on a GPU to be exchanged."""
    return dist.is_initialized() and dist.get_backend() == "nccl"


def shut_down() -> None:
    """Part from the other ranks at the end of the job."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # a group held by a cycle keeps its threads, which abort a process whose interpreter has ended


def group() -> dist.ProcessGroup | None:
    """All ranks, for an op that sums over a process group itself. One process: None."""
    return dist.group.WORLD if world_size() > 1 else None


def sum(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks: the global count behind every token mean. One process: `x`."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def max(x: Tensor) -> Tensor:
    """Elementwise maximum of `x` over all ranks. One process: `x`."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def gather(x: Tensor) -> Tensor:
    """`x` (n, ...) of every rank, joined in rank order; n may differ. One process: `x`."""
    if world_size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    sizes = [int(c) for c in counts]
    padded = torch.cat([x, x.new_zeros(builtins.max(sizes) - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


def part_of(count: int, number: int | None = None) -> range:
    """This rank's stretch of `count` things, or rank `number`'s: sizes differ by at most one, and ranks follow each
    other in order."""
    at = rank() if number is None else number
    base, more = divmod(count, world_size())
    begin = at * base + min(at, more)
    return range(begin, begin + base + (at < more))


def deal(sizes: Sequence[int], hands: int) -> list[int]:
    """Which of so many hands each thing goes to: the largest first, each to the hand that has the least."""
    held, owner = [0] * hands, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner[i] = held.index(min(held))
        held[owner[i]] += sizes[i]
    return owner


def in_turn(x: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
    """Each rank's `x` (n, ...) on every rank, one after the other, so that no rank holds all; lengths: their n."""
    for source, length in enumerate(lengths):
        part = x.contiguous() if source == rank() else x.new_empty(length, *x.shape[1:])
        if world_size() > 1:
            dist.broadcast(part, src=source)
        yield part


def broadcast(x: T) -> T:
    """Rank 0's `x` (plain data) on every rank."""
    if world_size() == 1:
        return x
    box = [x]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_host(x: Tensor) -> Tensor:
    """`gather` of tensors on the host, over whatever the ranks talk by."""
    return gather(x.cuda()).cpu() if talks_by_nccl() else gather(x)


def sum_host(x: Tensor) -> Tensor:
    """`sum` of tensors on the host, over whatever the ranks talk by."""
    return sum(x.cuda()).cpu() if talks_by_nccl() else sum(x)


def gather_objects(x: T) -> list[T]:
    """`x` (plain data) of every rank, in rank order."""
    if world_size() == 1:
        return [x]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, x)
    return found


class OtherRankError(RuntimeError):
    """Another rank could not go on; its words are the message."""


@contextmanager
def fail_together() -> Iterator[None]:
    """What is raised inside on any rank is raised on all of them: the error itself, or its words as OtherRankError."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    words = [w for w in gather_objects(None if error is None else str(error)) if w is not None]
    if error is not None:
        raise error
    if words:
        raise OtherRankError(words[0])


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks; one message in float32."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([x.detach().flatten().float() for x in tensors])
    dist.all_reduce(flat)
    for x, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(part.view_as(x))
