"""The process that vLLM lives in: started by vllm_sampler.py, serves it over one connection, and ends with it.

    python -m ppomax.rollout.vllm_worker FD     the file descriptor of its end of a socket pair

Weights come through a block of shared memory, some at a time, and go straight into vLLM's reload: no file is made."""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Iterator
from multiprocessing import shared_memory
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """A tensor in the block of shared memory."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    """In bytes."""


class Received:
    """What came of one hand-over."""

    def __init__(self, connection: Connection, block: str, verify: bool):
        self.connection, self.verify = connection, verify
        self.block = shared_memory.SharedMemory(block)
        self.names: list[str] = []
        self.digest = hashlib.sha256()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each with its name; an answer goes back when a block has been read."""
        while True:
            pieces: list[Piece] | None = self.connection.recv()
            if pieces is None:
                return
            for piece in pieces:
                dtype = getattr(torch, piece.dtype)
                count = torch.Size(piece.shape).numel()
                view = torch.frombuffer(self.block.buf, dtype=dtype, count=count, offset=piece.start)
                own = view.view(piece.shape).clone()  # vLLM may keep it until its layer is whole
                del view
                self.names.append(piece.name)
                if self.verify:
                    add_to(self.digest, piece.name, own)
                yield piece.name, own
            self.connection.send("read")


def add_to(digest: Any, name: str, x: Tensor) -> None:
    """One tensor more: its name and its bytes."""
    digest.update(name.encode())
    digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().data)


class Worker:
    """vLLM and what is asked of it."""

    def __init__(self, connection: Connection, setting: dict[str, Any]):
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        self.connection, self.params = connection, SamplingParams
        self.sleeps = bool(setting.pop("sleeps"))
        self.model = LLM(**setting)
        self._sleep()

    def take(self, block: str, verify: bool) -> dict[str, Any]:
        """Weights into the model, in place; returns how many there were and their hash."""
        if self.sleeps:
            self.model.wake_up(tags=["weights"])
        received = Received(self.connection, block, verify)
        try:
            stream = received.tensors()
            self.model.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
            for _ in stream:  # what vLLM did not ask for
                pass
        finally:
            received.block.close()
        self.model.reset_prefix_cache()
        return {"names": received.names, "sha256": received.digest.hexdigest() if verify else None}

    def sample(self, prompts: list[list[int]], seeds: list[int], how: dict[str, Any]) -> list[Any]:
        """(tokens, their logprobs, whether it was cut at the limit) of each prompt."""
        if self.sleeps:
            self.model.wake_up()
        rules = [self.params(**how, seed=seed, logprobs=0, detokenize=False) for seed in seeds]
        found = self.model.generate([{"prompt_token_ids": p} for p in prompts], rules, use_tqdm=False)
        rows = []
        for one in (f.outputs[0] for f in found):
            tokens = list(one.token_ids)
            logprobs = [at[t].logprob for t, at in zip(tokens, one.logprobs, strict=True)]
            rows.append((tokens, logprobs, one.finish_reason == "length"))
        self._sleep()
        return rows

    def _sleep(self) -> None:
        if self.sleeps:
            self.model.sleep(level=1)


def main(descriptor: str) -> int:
    connection = Connection(int(descriptor))
    worker: Worker | None = None
    try:
        while True:
            what, arguments = connection.recv()
            try:
                if worker is None:
                    worker = Worker(connection, arguments)
                    answer: Any = None
                else:
                    answer = getattr(worker, what)(**arguments)
            except Exception:
                connection.send(("error", traceback.format_exc()))
                return 1
            connection.send(("done", answer))
    except (EOFError, ConnectionError):  # the trainer has gone, and we with it
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
