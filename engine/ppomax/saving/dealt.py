"""A checkpoint's tensors as all ranks write and read them at once, with nothing sent between them while writing.

    policy.safetensors                                one rank
    policy-00001-of-00002.safetensors, ...            several
What every rank holds whole is dealt out. Of what ZeRO has cut each rank writes the stretch that it holds: flat, its
place and the whole shape in the file's metadata. How many ranks wrote a checkpoint, and how it was cut, does not matter
to who reads it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from ppomax.config.launcher import ranks_on_node
from ppomax.saving.beside import sync
from ppomax.saving.tensor_files import bytes_of, header_of, size_of
from ppomax.sharding import Lazy, ranks

T = TypeVar("T")
R = TypeVar("R")
SUFFIX = ".safetensors"
STRETCHES = "stretches"
"""In a file's metadata: {name: [where it begins in the flat tensor, the whole tensor's shape]}."""
SMALL = 1 << 20
"""Numbers of a tensor below which every rank reads it whole, and none is sent."""


class Entry(NamedTuple):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


Share = dict[str, dict[str, Lazy]]
"""What a rank writes: tensors by the name of their file and their own."""


def share_of(files: dict[str, dict[str, Lazy]]) -> Share:
    """This rank's share of the tensors, which are given by the stem of their file and their name."""
    whole = [(stem, name, x) for stem, tensors in files.items() for name, x in tensors.items() if x.own is None]
    owners = ranks.deal([size_of(x) for *_, x in whole], ranks.world_size())
    mine = {(stem, name) for (stem, name, _), owner in zip(whole, owners, strict=True) if owner == ranks.rank()}
    share: Share = {}
    for stem, tensors in files.items():
        own = {name: x for name, x in tensors.items() if x.own is not None or (stem, name) in mine}
        if own or (not tensors and ranks.rank() == 0):  # a file that is there and holds nothing
            rank, count = ranks.position()
            share[stem + (SUFFIX if count == 1 else f"-{rank + 1:05d}-of-{count:05d}{SUFFIX}")] = own
    return share


def write_share(folder: Path, share: Share) -> dict[str, Entry]:
    """Write it into `folder`, which is there; returns the entries of its files, which are on the disk."""
    written = in_threads(lambda each: write_file(folder / each[0], each[1]), list(share.items()))
    return dict(zip(share, written, strict=True))


def in_threads(function: Callable[[T], R], each: Sequence[T]) -> list[R]:
    """`[function(x) for x in each]`, several at once where this rank has the cores: SHA-256 is slower than a disk."""
    cores = (os.cpu_count() or 1) // ranks_on_node()
    with ThreadPoolExecutor(max(1, min(len(each), cores))) as pool:
        return list(pool.map(function, each))


def copied(share: Share, buffers: dict[tuple[str, str], Tensor]) -> Share:
    """The same share on the host, as it is now, whatever its tensors become. buffers: the room of an earlier copy,
    which is used again."""
    out: Share = {}
    for file, tensors in share.items():
        out[file] = {}
        for name, x in tensors.items():
            start, own = (0, x.get()) if x.own is None else x.own()
            room = buffers.get((file, name))
            if room is None or room.shape != own.shape or room.dtype != own.dtype:
                room = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
            buffers[file, name] = room.copy_(own.detach(), non_blocking=own.is_cuda)
            out[file][name] = Lazy(x.dtype, x.shape, lambda: torch.zeros(0), partial(_held, start, room))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out


def _held(start: int, own: Tensor) -> tuple[int, Tensor]:
    return start, own


def write_file(path: Path, tensors: Mapping[str, Lazy]) -> Entry:
    """A safetensors file of what this rank holds of these tensors, hashed as it is written; on the disk on return."""
    held, cut = dict[str, Tensor](), dict[str, list[Any]]()
    for name, x in tensors.items():
        start, own = (0, x.get()) if x.own is None else x.own()
        if own.numel() == x.shape.numel():
            held[name] = own.view(x.shape)
        else:
            held[name], cut[name] = own, [start, list(x.shape)]
    metadata = {STRETCHES: json.dumps(cut)} if cut else {}
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for data in chain([header_of([(n, x.dtype, x.shape) for n, x in held.items()], metadata)], _bytes(held)):
            file.write(data)
            digest.update(data)
            size += len(data)
    sync(path)
    return Entry(size, digest.hexdigest())


def _bytes(held: Mapping[str, Tensor]) -> Iterator[Any]:
    return (bytes_of(x) for x in held.values())


# ---- reading ---------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where some of a tensor lies."""

    file: Any
    start: int
    """Its first number, in the flat tensor."""
    shape: list[int]
    """As it lies in the file: the whole tensor's, or (n,)."""


class DealtTensors(Mapping[str, Tensor]):
    """The tensors of `stem` by name, each whole when it is asked for; `stretch` reads a part.

    Under several ranks each reads a share of a large tensor and they send it to each other, so all must ask for the
    same ones in the same order. FileNotFoundError: there are none."""

    def __init__(self, folder: Path, stem: str):
        self._places: dict[str, list[Place]] = {}
        self._shapes: dict[str, torch.Size] = {}
        for path in parts_of(folder, stem):
            file = safe_open(path, "pt")  # type: ignore[no-untyped-call]
            cut = json.loads((file.metadata() or {}).get(STRETCHES, "{}"))
            for name in file.keys():  # noqa: SIM118
                stored = list(file.get_slice(name).get_shape())
                start, shape = cut.get(name, (0, stored))
                self._places.setdefault(name, []).append(Place(file, start, stored))
                self._shapes[name] = torch.Size(shape)
        for places in self._places.values():
            places.sort(key=lambda p: p.start)

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor."""
        return self._shapes[name]

    def stretch(self, name: str, start: int, stop: int) -> Tensor:
        """Numbers [start, stop) of the flat tensor, and no others, from the disk."""
        if start >= stop:
            return torch.zeros(0)
        parts = []
        for place in self._places[name]:
            count = torch.Size(place.shape).numel()
            a, b = max(start, place.start), min(stop, place.start + count)
            if a < b:
                parts.append(_read(place, name, a - place.start, b - place.start))
        found = torch.cat(parts) if parts else torch.zeros(0)
        if len(found) != stop - start:
            raise ValueError(f"{name} lacks numbers of [{start}, {stop}): a file of another checkpoint lies beside it")
        return found

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        count, (rank, ranks_) = shape.numel(), ranks.position()
        if count == 0 or not shape:
            return self._places[name][0].file.get_tensor(name)  # type: ignore[no-any-return]
        if ranks_ == 1 or count < SMALL:
            return self.stretch(name, 0, count).view(shape)
        share = range(count)[count * rank // ranks_ : count * (rank + 1) // ranks_]
        return ranks.gather_host(self.stretch(name, share.start, share.stop)).view(shape)

    def __contains__(self, name: object) -> bool:  # Mapping's own reads the tensor
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def parts_of(folder: Path, stem: str) -> list[Path]:
    """The files that hold `stem`, however many ranks wrote it. FileNotFoundError: there are none."""
    whole = folder / (stem + SUFFIX)
    if whole.is_file():
        return [whole]
    found = sorted(p for p in folder.glob(f"{stem}-*{SUFFIX}") if re.fullmatch(rf"{stem}-\d+-of-\d+", p.stem))
    if not found:
        raise FileNotFoundError(f"{folder} has no {stem}{SUFFIX}")
    return found


def _read(place: Place, name: str, start: int, stop: int) -> Tensor:
    """Numbers of what lies there, flat: the rows around them are read."""
    if not place.shape:
        return place.file.get_tensor(name).view(1)  # type: ignore[no-any-return]
    row = torch.Size(place.shape[1:]).numel()
    first, last = start // row, -(-stop // row)
    rows = place.file.get_slice(name)[first:last].reshape(-1)
    return rows[start - first * row : stop - first * row]  # type: ignore[no-any-return]
