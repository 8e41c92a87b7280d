"""Decoding from CUDA graphs: a step that takes in no newcomer, head and sampler included, is replayed instead of
launched op by op.

A graph has fixed shapes, so the rows of the step are rounded up to a bucket; where attention is not ours, so is the
number of pages that the longest of them reads. Rows that fill up a bucket stand at position 0 of the arena's scratch
page, and what comes out of them is dropped. All graphs read one set of input buffers, leave their results in one set of
output buffers, and share one memory pool for what is between: each one's result is read before another is replayed. A
bucket is captured when it has been met often enough in the phase; until then, and with newcomers, steps are plain.

Captured is what happens on the device. What a forward does in Python, a module's hooks included, happens once, at
capture. A model that waits for the device or copies to it from the host on the way cannot be captured: the warm-up
finds that out, the reason is logged, and all steps of the phase are plain."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ppomax.rollout.arena import pages_for
from ppomax.rollout.sizes import RolloutError

log = logging.getLogger(__name__)

MEETINGS = 3
"""Steps of a bucket that are plain before it is captured: a capture costs some forwards. A guess, not measured."""
WARM_UPS = 2
"""Forwards on the capturing stream before a capture, so that libraries set themselves up there."""

Run = Callable[[], None]
Capture = Callable[[Run], Run]
"""Takes what is to be run, gives what replays it; RuntimeError if it cannot be captured."""


class Bucket(NamedTuple):
    """The shape of a captured step."""

    rows: int
    pages: int
    """0: any number."""


def row_bucket(rows: int, slots: int) -> int:
    """Rows of the step that serves `rows` living sequences: a power of two up to 64, multiples of 32 up to 128, of 64
    up to 256, then of 128; at most `slots`."""
    step = 32 if rows <= 128 else 64 if rows <= 256 else 128
    return min(slots, 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // step) * step)


def page_bucket(pages: int, width: int) -> int:
    """Pages that it reads of each: a power of two, at most the `width` of the tables."""
    return min(width, 1 << (pages - 1).bit_length())


class DecodeGraphs:
    """The captured steps of one phase.

    run((B,) ids, (4, B) int64 of positions, table rows, sequence numbers and tokens drawn, longest) -> tensors of B
    rows each, on the device of `tables`, whose last row is the scratch page. It must read nothing from the host that
    changes from step to step, and give the same if it is run twice. newest: the ids, by table row. page: tokens of a
    page, for attention whose work depends on `longest`; None: it does not."""

    def __init__(
        self,
        run: Callable[[Tensor, Tensor, int], tuple[Tensor, ...]],
        capture: Capture,
        newest: Tensor,
        tables: Tensor,
        slots: int,
        page: int | None,
    ):
        self.run, self.capture, self.slots, self.page = run, capture, slots, page
        self.newest, self.tables = newest, tables
        self.inputs = torch.zeros(4, slots, dtype=torch.int64, device=tables.device)
        self.filler = torch.tensor([[0], [len(tables) - 1], [0], [0]], device=tables.device)
        self.ids = torch.zeros(slots, dtype=torch.int64, device=tables.device)
        self.outputs: tuple[Tensor, ...] = ()
        self.met: Counter[Bucket] = Counter()
        self.replays: dict[Bucket, Run] = {}
        self.refused = False

    def step(self, where: Tensor, longest: int) -> tuple[Tensor, ...] | None:
        """What `run` gives for `where` (4, rows) and the newest tokens there, valid until the next step. None: not from
        a graph, since the bucket is not captured yet or cannot be."""
        rows = where.shape[1]
        pages = 0 if self.page is None else page_bucket(pages_for(longest, self.page), self.tables.shape[1])
        bucket = Bucket(row_bucket(rows, self.slots), pages)
        self.met[bucket] += 1
        if self.refused or self.met[bucket] <= MEETINGS:
            return None
        self.inputs[:, :rows], self.inputs[:, rows : bucket.rows] = where, self.filler
        self.ids[: bucket.rows] = self.newest[self.inputs[1, : bucket.rows]]
        if bucket not in self.replays:
            try:
                self.replays[bucket] = self.capture(partial(self._forward, bucket))
            except RuntimeError as error:
                self._refuse(error)
                return None
        self.replays[bucket]()
        return tuple(out[:rows] for out in self.outputs)

    def close(self) -> None:
        """Drop graphs and outputs; `run` is let go too, since its owner holds this object."""
        self.replays.clear()
        self.outputs, self.run = (), _closed

    def _forward(self, bucket: Bucket) -> None:
        """`run` on the buffers' first rows, its results into the outputs' first rows: what is captured."""
        longest = 0 if self.page is None else bucket.pages * self.page
        results = self.run(self.ids[: bucket.rows], self.inputs[:, : bucket.rows], longest)
        if not self.outputs:  # in the first warm-up, so outside of any graph's memory
            self.outputs = tuple(out.new_zeros(self.slots, *out.shape[1:]) for out in results)
        for out, result in zip(self.outputs, results, strict=True):
            out[: bucket.rows] = result

    def _refuse(self, error: RuntimeError) -> None:
        self.refused = True
        self.close()
        log.warning(f"rollout: decoding goes on without CUDA graphs, since the model cannot be captured: {error}")


def _closed(*_: object) -> tuple[Tensor, ...]:
    raise RuntimeError("rollout: these CUDA graphs were closed with their phase")


class CudaCapture:
    """Captures into graphs that share one pool, on one stream of its own, as torch's notes on CUDA graphs ask."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self.device):
            self._warm_up(run)
            graph = torch.cuda.CUDAGraph()
            # A watchdog's or a monitor's thread may go on meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                run()
        return graph.replay

    def _warm_up(self, run: Run) -> None:
        """Also makes what waits for the device an error here, where nothing is half captured yet."""
        here, before = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(here)
        try:
            with torch.cuda.stream(self.stream):
                run()  # libraries may wait while they set themselves up
                torch.cuda.set_sync_debug_mode("error")
                for _ in range(WARM_UPS - 1):
                    run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
            here.wait_stream(self.stream)


def capture_for(device: torch.device) -> Capture:
    """How forwards on this device are captured; RolloutError if it has no CUDA graphs."""
    if device.type != "cuda":
        raise RolloutError(
            f"rollout: rollout.cuda_graphs=true needs a model on a CUDA device, this one is on {device}; leave it false"
        )
    return CudaCapture(device)
