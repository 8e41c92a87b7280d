"""One command line and one configuration for all ranks of a job that torchrun or deepspeed started.

Ranks parse the same words, but rank 0 alone names the folder (a dated one differs from rank to rank), and a job that
torchrun has started anew after a failure goes on in the folder of its first start. No torch is imported in one
process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ppomax.command.folders import folder_of, has_begun
from ppomax.config.launcher import restarts, started_ranks

if TYPE_CHECKING:
    from ppomax.sharding.watch import Watch

C = TypeVar("C")

OUT_KEY = "ppomax/out"
ANSWER_SECONDS = 20.0
"""Seconds past the longest silence until a rank stops waiting to be told which other one died."""


def without_local_rank(argv: list[str]) -> list[str]:
    """The words without `--local_rank=N`, which the deepspeed launcher puts among them."""
    for word in argv:
        if word.startswith("--local_rank="):
            os.environ.setdefault("LOCAL_RANK", word.partition("=")[2])
    return [word for word in argv if not word.startswith("--local_rank=")]


@contextmanager
def watched(argv: list[str]) -> Iterator[Watch | None]:
    """In a job of several ranks: join it, and watch it until the block ends. An error on one rank, or its death, ends
    all of them, with one message printed by rank 0. One process, or --help: nothing."""
    if started_ranks() == 1 or {"-h", "--help"} & set(argv):
        yield None
        return
    from ppomax.sharding import ranks
    from ppomax.sharding.watch import Watch

    ranks.start("cpu" if "device cpu" in " ".join(argv).replace("=", " ") else "auto")
    watch = Watch()
    watch.start()
    try:
        yield watch
        ranks.shut_down()
    except Exception as error:
        if "imed out" in str(error):
            words = f"waited sharding.timeout for another rank, which hangs or is slower than that: {error}"
            watch.failed(words)
            raise TimeoutError(words) from error
        if _lost_a_rank(error):
            time.sleep(watch.silence + ANSWER_SECONDS)  # the watch knows by then who it was, and ends this process
        watch.failed(str(error))
        raise
    finally:
        watch.done()


def _lost_a_rank(error: Exception) -> bool:
    """Whether an exchange between ranks broke off."""
    return isinstance(error, RuntimeError) and any(w in str(error) for w in ("onnection", "NCCL", "gloo"))


def parse_on_all_ranks(parse: Callable[[list[str]], C], argv: list[str]) -> C:
    """`parse(argv)` on every rank, with rank 0's folder. Raises on all ranks if one could not, or if they
    differ."""
    if started_ranks() == 1 or {"-h", "--help"} & set(argv):
        return parse(argv)
    from ppomax.sharding import ranks

    store, config = ranks.launcher_store(), None
    if restarts() and store.check([OUT_KEY]):  # else the job had not come as far as its folder, and begins anew
        out = store.get(OUT_KEY).decode()
        argv = [*argv, "--out", out, *(["--resume"] if has_begun(Path(out)) and "--resume" not in argv else [])]
    with ranks.fail_together():
        config = parse(argv) if ranks.rank() == 0 else None
    out = ranks.broadcast("" if config is None else str(folder_of(config)))
    with ranks.fail_together():
        config = parse([*argv, "--out", out]) if config is None else config
    if ranks.rank() == 0:
        store.set(OUT_KEY, str(Path(out).resolve()))
    return config
