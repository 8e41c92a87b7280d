"""Signs of life between the ranks of a job: one that dies or fails ends all of them soon, and is named.

Every rank counts up a number in the job's TCP store every two seconds from a thread of its own. Rank 0 watches all,
the others watch rank 0. A rank is dead when its process is gone (told at once on the same host) or its number has
stood still for `silence` seconds. A rank that raises leaves its words in the store first. Whoever learns of either
ends its process; rank 0 prints why, once.

Needed since a collective waits for a rank that is gone: gloo until the connection breaks, nccl for its whole timeout;
and an exit of one rank is seen by torchrun's agent on that node alone."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ppomax.config.launcher import restarts
from ppomax.sharding import ranks
from ppomax.sharding.ranks import launcher_store

PERIOD = 2.0
GRACE = 10.0
"""Seconds that a failed rank waits for rank 0 to print its words before it prints them itself."""


class Watch:
    """Watches from `start` to `done`; does nothing in one process."""

    def __init__(self, silence: float = 40.0):
        self.silence, self.ended = silence, threading.Event()
        self.rank = 0
        self.store: Any = None
        self.thread = threading.Thread(target=self._run, daemon=True, name="ppomax-watch")

    def start(self) -> None:
        """Begin to give and look for signs of life."""
        if ranks.world_size() == 1:
            return
        self.rank, self.store = ranks.rank(), launcher_store()
        self._set(f"who/{self.rank}", f"{socket.gethostname()} {os.getpid()}")
        self.count, self.seen = [0] * ranks.world_size(), [time.monotonic()] * ranks.world_size()
        self.thread.start()

    def done(self) -> None:
        """This rank has ended well: silence is no sign of anything any more."""
        if self.store is not None:
            self._add(f"done/{self.rank}", 1)
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join(GRACE)  # caught in the store when the interpreter ends, it would abort the process

    def failed(self, words: str) -> None:
        """This rank has raised: tell the others; returns once that need not be printed here, or exits the process."""
        if self.store is None:
            return
        self.ended.set()
        try:
            if self._add("failures", 1) == 1:
                self._set("words", f"rank {self.rank}: {words}")
            until = time.monotonic() + GRACE
            while self.rank and not self._add("printed", 0) and time.monotonic() < until:
                time.sleep(0.1)
            if self.rank and self._add("printed", 0):
                end_process(2)
            self._add("printed", 1)
        except dist.DistError:  # the store went with rank 0: then this rank's own words are printed here
            return

    def _run(self) -> None:
        watched = range(1, ranks.world_size()) if self.rank == 0 else [0]
        while not self.ended.wait(PERIOD):
            try:
                self._add(f"beat/{self.rank}", 1)
                if self._add("failures", 0):
                    self._end(self._words(), 2)
                for other in watched:
                    self._look_at(other)
            except Exception as error:  # the store is in the launcher's or rank 0's process
                if not self.ended.is_set():
                    self._say(f"the job's store at {address()} is gone ({type(error).__name__}), and with it rank 0")
                    end_process(1)

    def _look_at(self, other: int) -> None:
        beat, now = self._add(f"beat/{other}", 0), time.monotonic()
        if beat != self.count[other]:
            self.count[other], self.seen[other] = beat, now
        if self._add(f"done/{other}", 0):
            return
        quiet = now - self.seen[other] if self.silence else 0.0
        if quiet > self.silence or self._gone(other):
            reason = "its process is gone" if quiet <= self.silence else f"no sign of life for {quiet:.0f} s"
            words = f"rank {other} ({self._who(other)}) died: {reason}"
            if self._add("failures", 1) == 1:
                self._set("words", words + "; go on from the newest checkpoint with --resume")
            self._end(self._words(), 1)

    def _end(self, words: str, status: int) -> None:
        """Rank 0 prints and gives the others a moment to read the same; the others go without a word."""
        if self.ended.is_set():
            return
        if self.rank == 0:
            self._say(words)
            self._add("printed", 1)
            time.sleep(2 * PERIOD)
        elif not words.startswith("rank 0"):
            time.sleep(PERIOD)
        elif self._add("printed", 1) == 1:
            self._say(words)
        end_process(status)

    def _words(self) -> str:
        """What the first rank that failed said; it may still be writing it."""
        return self._get("words")

    def _who(self, other: int) -> str:
        host, _, pid = self._get(f"who/{other}").partition(" ")
        return f"process {pid} on {host}"

    def _gone(self, other: int) -> bool:
        """Whether a process of this host has ended (a zombie has too)."""
        if not self.store.check([self._key(f"who/{other}")]):
            return False
        host, _, pid = self._get(f"who/{other}").partition(" ")
        if host != socket.gethostname() or not Path("/proc/self/stat").is_file():
            return False
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    def _say(self, words: str) -> None:
        print(f"ppomax: error: {' '.join(words.split())}", file=sys.stderr, flush=True)

    # ---- the store ----

    def _key(self, name: str) -> str:
        return f"ppomax/{restarts()}/{name}"

    def _add(self, name: str, amount: int) -> int:
        return int(self.store.add(self._key(name), amount))

    def _set(self, name: str, text: str) -> None:
        self.store.set(self._key(name), text)

    def _get(self, name: str) -> str:
        return self.store.get(self._key(name)).decode()  # type: ignore[no-any-return]


def end_process(status: int) -> None:
    """End this process now, whatever its other threads wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
