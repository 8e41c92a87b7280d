"""One command line and one configuration for all ranks of a job that torchrun or deepspeed started.

Ranks parse the same words, but rank 0 alone names the folder (a dated one differs from rank to rank), and a job that
torchrun has started anew after a failure goes on in the folder of its first start. No torch is imported in one
process."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ppomax.config import ConfigError, TrainConfig, to_dict
from ppomax.config.mapping import flat

if TYPE_CHECKING:
    from ppomax.sharding.watch import Watch

OUT_KEY = "ppomax/out"
LATER = 20.0
"""Seconds past the longest silence until a rank stops waiting to be told which other one died."""


def launched() -> int:
    """Ranks that a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
    if launched() == 1 or {"-h", "--help"} & set(argv):
        yield None
        return
    from ppomax.sharding import ranks
    from ppomax.sharding.watch import Watch

    ranks.start("cpu" if "device cpu" in " ".join(argv).replace("=", " ") else "auto")
    watch = Watch()
    watch.start()
    try:
        yield watch
        ranks.leave()
    except Exception as error:
        if _lost_a_rank(error):
            time.sleep(watch.silence + LATER)  # the watch knows by then who it was, and ends this process
        watch.failed(str(error))
        raise
    finally:
        watch.done()


def _lost_a_rank(error: Exception) -> bool:
    """Whether an exchange between ranks broke off."""
    return isinstance(error, RuntimeError) and any(w in str(error) for w in ("onnection", "NCCL", "gloo", "imed out"))


def parsed_together(parse: Callable[[list[str]], TrainConfig], argv: list[str]) -> TrainConfig:
    """`parse(argv)` on every rank, with rank 0's folder. ConfigError on all ranks if one could not, or if they
    differ."""
    if launched() == 1 or {"-h", "--help"} & set(argv):
        return parse(argv)
    from ppomax.sharding import agree, rank, ranks, together

    store, config = ranks.job_store(), None
    if ranks.restarts():
        if not store.check([OUT_KEY]):
            raise ConfigError("the launcher started the job anew, but its folder is not known any more; give --out")
        out = store.get(OUT_KEY).decode()
        argv = [*argv, "--out", out, *(["--resume"] if Path(out).is_dir() and "--resume" not in argv else [])]
    with together():
        config = parse(argv) if rank() == 0 else None
    out = agree(str(config.run.out) if config else "")
    with together():
        config = config or parse([*argv, "--out", out])
    assert config is not None
    if rank() == 0:
        store.set(OUT_KEY, str(Path(out).resolve()))
    return config


def settled(config: TrainConfig) -> TrainConfig:
    """`config` with rank 0's folder, resumed if the launcher has started it anew, once all ranks are found to have the
    same one and to share its batches evenly. Raises ConfigError on every rank otherwise."""
    from ppomax.sharding import agree, everyone, world_size
    from ppomax.sharding.ranks import restarts, talks_by_nccl
    from ppomax.sharding.zero_config import check, extra

    out = agree(config.run.out)
    resume = config.run.resume or (restarts() > 0 and out is not None)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=out, resume=resume))
    every = [flat(found) for found in everyone(to_dict(config))]
    for number, found in enumerate(every[1:], 1):
        odd = [f"{k} is {found[k]!r} there and {every[0][k]!r} on rank 0" for k in found if found[k] != every[0][k]]
        if odd:
            raise ConfigError(f"config: rank {number} was started otherwise than rank 0: {', '.join(odd[:4])}")
    count = world_size()
    for knob in ("rollout_size", "minibatch_size"):
        value = getattr(config.batch, knob)
        if value % count:
            raise ConfigError(
                f"config: batch.{knob}={value} cannot be shared evenly by {count} ranks; make it a multiple of "
                f"{count}, or start another number of ranks"
            )
    if count > 1 and config.run.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"config: run.device={config.run.device}, but each rank takes its own GPU; use auto or cuda")
    if count > 1 and config.run.device == "cpu" and talks_by_nccl():
        raise ConfigError("config: run.device=cpu is only in a file, and ranks talk by nccl; give --run.device cpu too")
    check(config.sharding, count)
    extra(config.sharding)
    return config
