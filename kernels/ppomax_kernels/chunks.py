"""The loop that the fused linear ops share: a chunk of tokens, its logits by one GEMM, row kernels on the chunk,
gradients by two more GEMMs. A chunk is as large as a cache or a GPU keeps busy, a pure function of shapes: results
never depend on free memory. Rows that do not count are gathered away first and cost no GEMM. The weight gradient is
summed over chunks in float32.

An op that can do with a part of each row at a time (linear_token_logprobs: its backward makes the logits again) cuts
the vocabulary as well, into tiles: a CPU's GEMM packs the weight anew for each chunk of tokens, so a few tall chunks
of a tile each cost less than many short ones of whole rows (bench/LOG.md)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .internal.packed_linear import product, serves
from .terms import Head, LinearInputs, Need, Walk
from .vocab_shard import FOREIGN, VocabShard, combine

NONE_IGNORED = FOREIGN + 1  # an ignore_index for rows that all count: no label has this value
TILE_TOKENS = 2048  # rows of a chunk whose logits are made tile by tile
TILE_ELEMENTS = 2**21  # logits of a tile: 8 MiB, which stay in a shared cache
WIDEST_WHOLE = 8192  # a vocabulary that is not cut into tiles

# Logits of a chunk on a CPU: at most 128 MiB in float32. The weight is packed anew and its gradient passed over once a
# chunk, which fewer than some hundred tokens do not pay for; more than 1,024 gain nothing (bench/LOG.md).
CPU_ELEMENTS = 2**25
CPU_TOKENS = 1024
# On a GPU each chunk after the first reads and writes the float32 gradient of the weight, 5 GB at 151936 x 4096.
GPU_ELEMENTS = 2**30  # 2 GiB in bfloat16
GPU_TOKENS = 4096


def default_chunk(vocab: int, device_type: str) -> int:
    """Tokens per GEMM: a multiple of 64 that fits CPU_ELEMENTS, or a power of two that fits GPU_ELEMENTS."""
    if device_type == "cpu":
        return min(CPU_TOKENS, max(64, CPU_ELEMENTS // vocab // 64 * 64))
    return min(GPU_TOKENS, max(256, 1 << (GPU_ELEMENTS // vocab).bit_length() - 1))


def even_chunk(size: int, n: int, invariant: bool) -> int:
    """`size` tokens per GEMM or a little less, so that the last chunk of `n` is no smaller than the others; with
    `invariant` exactly `size`, whatever n is."""
    return size if invariant or n == 0 else -(-n // -(-n // size))


def blocks(chunk: int, n: int, weight: Tensor, invariant: bool) -> tuple[int, int]:
    """Tokens and vocabulary entries per GEMM. `chunk` > 0: as many tokens and whole rows. In 16 bit rows stay whole
    too: sums over tiles would round hidden's gradient once a tile."""
    vocab = weight.shape[0]
    if chunk < 0:
        raise ValueError(f"chunk must be 0 (the default) or more, got {chunk}")
    whole = vocab <= WIDEST_WHOLE or weight.device.type != "cpu" or weight.dtype != torch.float32
    if chunk or invariant or whole:
        return even_chunk(chunk or default_chunk(vocab, weight.device.type), n, invariant), vocab
    tokens = even_chunk(TILE_TOKENS, n, False)
    # To the nearest number of tiles, none small. Whole cache lines: products on columns that begin anywhere took half
    # as long again.
    size = -(-vocab // max(1, round(vocab * tokens / TILE_ELEMENTS)))
    return tokens, min(vocab, -(-size // 64) * 64)


@dataclass(frozen=True)
class Tile:
    """Entries `start` to `stop` of a vocabulary of `total`."""

    start: int
    stop: int
    total: int

    def of(self, x: Tensor) -> Tensor:
        """The tile's rows of weight or bias."""
        return x if self.whole else x[self.start : self.stop]

    @property
    def whole(self) -> bool:
        return self.stop - self.start == self.total

    def labels(self, labels: Tensor) -> Tensor:
        """Counted from the tile's first entry; those of other tiles become FOREIGN, those of no tile stay."""
        if self.whole:
            return labels
        here = (labels >= self.start) & (labels < self.stop)
        return torch.where(
            here, labels - self.start, torch.where((labels >= 0) & (labels < self.total), FOREIGN, labels)
        )


def tiles(vocab: int, size: int) -> list[Tile]:
    return [Tile(start, min(start + size, vocab), vocab) for start in range(0, vocab, size)]


def joined(parts: list[tuple[Tensor, Tensor, Tensor]], labels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Row results of all tiles -> logprobs, entropy, lse of whole rows."""
    return parts[0] if len(parts) == 1 else combine(parts, labels)


def kept_rows(keep: Tensor, kept: int) -> tuple[Tensor | None, int]:
    """Indices of the rows that count (None if all do) and how many. `kept` >= 0 says how many without asking a GPU."""
    n = int(keep.sum()) if kept < 0 else kept
    if n > keep.shape[0]:
        raise ValueError(f"kept must be at most N = {keep.shape[0]}, got {kept}")
    if n == keep.shape[0]:
        return None, n
    if kept >= 0 and keep.device.type == "cuda":
        return torch.nonzero_static(keep, size=kept).squeeze(1), n
    return keep.nonzero().squeeze(1), n


@dataclass(frozen=True)
class Rows:
    """Some rows of an (N, D) problem, without a copy where they are neighbours."""

    at: slice | Tensor

    def of(self, x: Tensor) -> Tensor:
        return x[self.at] if isinstance(self.at, slice) else x.index_select(0, self.at)

    def of_maybe(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else self.of(x)

    def put(self, x: Tensor, y: Tensor) -> None:
        if isinstance(self.at, slice):
            x[self.at] = y
        else:
            x.index_copy_(0, self.at, y)


def row_chunks(index: Tensor | None, n: int, size: int) -> Iterator[Rows]:
    for start in range(0, n, size):
        stop = min(start + size, n)
        yield Rows(slice(start, stop) if index is None else index[start:stop])


class Logits:
    """`hidden @ weight.T + bias` of one chunk after another, in one buffer. With `invariant` every GEMM has the same
    shape, so that a row's logits do not depend, to the bit, on how many rows come with it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, n: int, walk: Walk, impl: str, tile: int | None = None):
        """walk: with the chunk that is taken."""
        self.weight, self.bias, self.ours = weight, bias, impl == "cpu" and serves(weight)
        invariant = walk.invariant and not self.ours  # ours is, whatever the shape
        rows = walk.chunk if invariant else min(walk.chunk, n)
        self.tiles = tiles(weight.shape[0], tile or weight.shape[0])
        self.buffer = weight.new_empty(rows * (self.tiles[0].stop - self.tiles[0].start))
        self.padded = weight.new_zeros((rows, weight.shape[1])) if invariant else None

    def of(self, hidden: Tensor, tile: Tile | None = None) -> Tensor:
        """Logits (n, V) of hidden (n, D), or their columns `tile`."""
        n = hidden.shape[0]
        if self.padded is not None:
            self.padded[:n] = hidden
            hidden = self.padded
        weight, bias = self.weight, self.bias
        if tile is not None:
            weight, bias = tile.of(weight), None if bias is None else tile.of(bias)
        out = self.buffer[: hidden.shape[0] * weight.shape[0]].view(-1, weight.shape[0])
        if self.ours:
            product(hidden, weight, bias, out=out)
        elif bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)
        return out[:n]

    def full(self, dlogits: Tensor) -> Tensor:
        """`dlogits`, which were made in place, in the shape of every GEMM: with `invariant` the rows of padding too."""
        return dlogits if self.padded is None else self.buffer.view(-1, self.weight.shape[0])


class Gradients:
    """dhidden, dweight (float32) and dbias (float32), each only if wanted, gathered chunk by chunk from the `n` rows
    that count."""

    def __init__(self, hidden: Tensor, weight: Tensor, need: Need, n: int, impl: str) -> None:
        self.weight, self.need, self.ours = weight, need, impl == "cpu" and serves(weight, hidden)
        empty = hidden.new_empty(0)
        every_row = n == hidden.shape[0]
        self.dhidden = (
            (hidden.new_empty if every_row else hidden.new_zeros)(hidden.shape) if need.need_hidden else empty
        )
        f32 = torch.float32
        self.dweight = (
            (weight.new_empty if n else weight.new_zeros)(weight.shape, dtype=f32) if need.need_weight else empty
        )
        self.dbias = weight.new_zeros(weight.shape[0], dtype=f32) if need.need_bias else empty
        self.first = True

    def add(self, dlogits: Tensor, hidden: Tensor, rows: Rows, logits: Logits) -> None:
        """Of a chunk of whole rows, each chunk once."""
        if self.need.need_hidden:
            if logits.ours:
                rows.put(self.dhidden, product(dlogits, self.weight.t()))
            else:
                rows.put(self.dhidden, torch.mm(logits.full(dlogits), self.weight)[: dlogits.shape[0]])
        self._add_weight(dlogits, hidden, slice(None))
        self.first = False

    def add_tiles(self, dlogits: Iterator[tuple[Tile, Tensor]], hidden: Tensor, rows: Rows) -> None:
        """Of a chunk in tiles of float32, each chunk once."""
        dhidden = torch.zeros_like(hidden) if self.need.need_hidden else None
        for tile, part in dlogits:
            if dhidden is not None and self.ours:
                product(part, tile.of(self.weight).t(), out=dhidden, add=True)
            elif dhidden is not None:
                dhidden.addmm_(part, tile.of(self.weight))
            self._add_weight(part, hidden, slice(tile.start, tile.stop))
        if dhidden is not None:
            rows.put(self.dhidden, dhidden)
        self.first = False

    def _add_weight(self, dlogits: Tensor, hidden: Tensor, entries: slice) -> None:
        if self.need.need_weight and self.ours:
            product(dlogits.t(), hidden.t(), out=self.dweight[entries], add=not self.first)
        elif self.need.need_weight:
            add_product(self.dweight[entries], dlogits, hidden, self.first)
        if self.need.need_bias:
            self.dbias[entries] += dlogits.sum(0, dtype=torch.float32)


def add_product(total: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
    """`total += dlogits.T @ hidden` (`=` for the first), accumulated and added in float32 whatever the inputs are."""
    if dlogits.device.type == "cuda" and dlogits.dtype != torch.float32:
        if first:
            torch.mm(dlogits.t(), hidden, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, dlogits.t(), hidden, out_dtype=torch.float32, out=total)
        return
    # CPU GEMMs in bfloat16 round their result to bfloat16: chunk after chunk that would add up.
    a, b = dlogits.float().t(), hidden.float()
    if first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


def check(op: str, impl: str, inputs: LinearInputs, chunk_tokens: int | None, kept: int | None) -> None:
    """Checks that the linear ops share."""
    hidden, weight, labels, bias = inputs
    checks.tensor(op, hidden=hidden, weight=weight, labels=labels, bias=bias)
    checks.same_device(op, "hidden", hidden, weight=weight, labels=labels, bias=bias)
    checks.floating(op, impl, hidden=hidden, weight=weight, bias=bias)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{op}: {name} must be {hidden.dtype} like hidden, got {x.dtype}; cast one of them, or use "
                "torch.autocast"
            )
    checks.dtype(op, "labels", labels, torch.int64)
    if hidden.ndim != 2 or weight.ndim != 2:
        raise ValueError(
            f"{op}: hidden must have shape (N, D) and weight (V, D), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}; "
            "flatten leading dimensions with hidden.flatten(0, -2)"
        )
    if weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise ValueError(
            f"{op}: weight must have shape (V, D) with D = {hidden.shape[1]} like hidden, got {tuple(weight.shape)}; "
            "it is lm_head.weight as torch.nn.Linear stores it"
        )
    checks.same_shape(op, "hidden without D", hidden.shape[:1], labels=labels)
    checks.contiguous(op, labels=labels, bias=bias)
    if bias is not None:
        checks.same_shape(op, "the rows of weight", weight.shape[:1], bias=bias)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{op}: chunk_tokens must be >= 1, got {chunk_tokens}; leave it out for the default")
    if kept is not None and not 0 <= kept <= hidden.shape[0]:
        raise ValueError(
            f"{op}: kept must be in [0, N] = [0, {hidden.shape[0]}], got {kept}; it counts the rows that are not "
            "ignored"
        )


def head_of(
    op: str, temperature: float, softcap: float | None, ignore_index: int, weight: Tensor, shard: VocabShard | None
) -> Head:
    """Checks of the head's numbers and of the shard; the numbers as back-ends take them."""
    checks.number(op, "temperature", temperature, 0.0, float("inf"), open_low=True)
    if softcap is not None:
        checks.number(op, "softcap", softcap, 0.0, float("inf"), open_low=True)
    if shard is not None:
        shard.check(op, weight)
    return Head(float(temperature), 0.0 if softcap is None else float(softcap), ignore_index)


def walk_of(kept: int | None, chunk: int, invariant: bool) -> Walk:
    return Walk(-1 if kept is None else kept, chunk, invariant)


def check_labels(op: str, labels: Tensor, weight: Tensor, ignore_index: int, shard: VocabShard | None) -> None:
    """On a CPU, where reading them is free. Part of the computation, not of the public checks: under torch.compile
    there are no values yet."""
    if labels.device.type == "cpu":
        checks.labels_values(op, labels, weight.shape[0] if shard is None else shard.total, ignore_index)


def refuse_shard(op: str, shard: VocabShard | None) -> None:
    if shard is not None:
        raise ValueError(f"{op}: impl='ref' has no vocabulary-parallel form; gather the weight, or use another impl")


def cast_for_autocast(*xs: Tensor | None) -> tuple[Tensor | None, ...]:
    """What torch.autocast does to the inputs of a linear layer, where it is on."""
    device = next((x.device.type for x in xs if isinstance(x, Tensor)), "meta")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return xs
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in xs)
