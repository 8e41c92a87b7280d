"""safetensors files written and read one tensor at a time, so that no process holds a model to save or load one.

A file is an 8-byte length, a JSON header that gives each tensor's type, shape and place, and the bytes. Names, types
and shapes are known beforehand (`Lazy`), so the header can go first and each tensor be made whole, written, and
dropped. Under several ranks all of them make tensors whole together and rank 0 writes (`write_gathered`)."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ppomax.sharding import Lazy, ranks

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def size_of(x: Lazy) -> int:
    """Bytes of a tensor."""
    return x.shape.numel() * x.dtype.itemsize


def write_gathered(tensors: Iterable[Lazy], write: Callable[[Iterator[Tensor]], None]) -> None:
    """Rank 0's `write` takes the tensors from a stream; each is made whole, by all ranks, as it is taken. Every rank
    calls, with tensors in the same order; what is raised on rank 0 is raised on all."""
    stream = (x.get() for x in tensors)
    with ranks.fail_together():
        try:
            if ranks.rank() == 0:
                write(stream)
        finally:  # whoever does not write, or failed to, still makes each tensor whole with the others
            deque(stream, maxlen=0)


def write_tensors(path: Path, tensors: Iterable[tuple[str, Lazy]], stream: Iterator[Tensor]) -> None:
    """Write the tensors to `path`, taking each whole one from `stream`, which gives them in the same order."""
    listed = list(tensors)
    with open(path, "wb") as file:
        file.write(header_of((name, x.dtype, x.shape) for name, x in listed))
        for name, x in listed:
            whole = next(stream)
            if whole.dtype != x.dtype or whole.shape != x.shape:
                raise RuntimeError(f"{path}: {name} came as {whole.dtype} {tuple(whole.shape)}, not as announced")
            file.write(bytes_of(whole))


def bytes_of(x: Tensor) -> memoryview:
    """Those of a tensor, in C order."""
    return x.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data


def header_of(
    tensors: Iterable[tuple[str, torch.dtype, torch.Size]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a safetensors file of tensors of these names, types and shapes, whose own bytes follow in this
    order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name, dtype, shape in tensors:
        end = at + shape.numel() * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def shards(tensors: Mapping[str, Lazy], limit: int) -> list[list[str]]:
    """Names in order, cut so that each part has at most `limit` bytes (a larger tensor is a part of its own)."""
    parts: list[list[str]] = []
    used = 0
    for name, x in tensors.items():
        if not parts or used + size_of(x) > limit:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size_of(x)
    return parts
