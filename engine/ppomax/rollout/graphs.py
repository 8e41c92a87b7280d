"""Decoding from CUDA graphs: the forward of a step that takes in no prompt is replayed instead of launched op by op.

A graph has fixed shapes, so the rows of the step are rounded up to a bucket, and so is the number of pages that the
longest of them reads. Rows that fill up a bucket are token 0 at position 0 of the arena's scratch page, and what comes
out of them is dropped. All graphs read one set of input buffers, leave their results in one set of output buffers, and
share one memory pool for what is between: each one's result is read before another is replayed. A bucket is captured
when it has been met often enough in the phase; until then, and for prompts, steps are plain.

Captured is what happens on the device. What a forward does in Python, a module's hooks included, happens once, at
capture; the recorder's hook gives a tensor, which is one of the outputs. A model that waits for the device or copies to
it from the host on the way cannot be captured: the warm-up finds that out, the reason is logged, and all steps of the
phase are plain. Left out: the head and the sampler. Not run on a device yet."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ppomax.rollout.arena import Step, pages_for
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
    """The shape of a captured forward."""

    rows: int
    pages: int


def row_bucket(rows: int, slots: int) -> int:
    """Rows of the forward that serves `rows` living sequences: 1, 2, 4, 8, then multiples of 8; at most `slots`."""
    return min(slots, 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8)


def page_bucket(pages: int, width: int) -> int:
    """Pages that it reads of each: a power of two, at most the `width` of the tables."""
    return min(width, 1 << (pages - 1).bit_length())


class DecodeGraphs:
    """The captured forwards of one phase.

    run((3, B) int64 of ids, positions and table rows, Step) -> tensors of B rows each, on the device of `tables`. It
    must read nothing from the host that changes from step to step. tables: the host's, as in `Slots`, last row the
    scratch page."""

    def __init__(
        self,
        run: Callable[[Tensor, Step], tuple[Tensor, ...]],
        capture: Capture,
        tables: Tensor,
        slots: int,
        page: int,
        device: torch.device,
    ):
        self.run, self.capture, self.slots, self.page = run, capture, slots, page
        self.host_tables, self.tables = tables, tables.to(device, copy=True)
        self.inputs = torch.zeros(3, slots, dtype=torch.int64, device=device)
        self.outputs: tuple[Tensor, ...] = ()
        self.met: Counter[Bucket] = Counter()
        self.replays: dict[Bucket, Run] = {}
        self.refused = False

    def step(self, ids: list[int], positions: list[int], rows: list[int]) -> tuple[Tensor, ...] | None:
        """What `run` gives for the newest tokens of the living sequences, valid until the next step. None: not from a
        graph, since the bucket is not captured yet or cannot be."""
        pages = page_bucket(pages_for(max(positions) + 1, self.page), self.tables.shape[1])
        bucket = Bucket(row_bucket(len(ids), self.slots), pages)
        self.met[bucket] += 1
        if self.refused or self.met[bucket] <= MEETINGS:
            return None
        filler, scratch = [0] * (bucket.rows - len(ids)), len(self.tables) - 1
        here = [ids + filler, positions + filler, rows + [scratch] * len(filler)]
        self.inputs[:, : bucket.rows] = torch.tensor(here)
        self.tables.copy_(self.host_tables)
        if bucket not in self.replays:
            try:
                self.replays[bucket] = self.capture(partial(self._forward, bucket))
            except RuntimeError as error:
                self._refuse(error)
                return None
        self.replays[bucket]()
        return tuple(out[: len(ids)] for out in self.outputs)

    def close(self) -> None:
        """Drop graphs and outputs; `run` is let go too, since its owner holds this object."""
        self.replays.clear()
        self.outputs, self.run = (), _closed

    def _forward(self, bucket: Bucket) -> None:
        """`run` on the buffers' first rows, its results into the outputs' first rows: what is captured."""
        here = self.inputs[:, : bucket.rows]
        step = Step(  # made anew each time, since it keeps what is computed from it
            tables=self.tables,
            slots=here[2].int(),
            positions=here[1].int(),
            decoding=bucket.rows,
            longest=bucket.pages * self.page,
            prompts=[],
        )
        results = self.run(here, step)
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
