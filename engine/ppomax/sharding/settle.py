"""The configuration that all ranks run with: found to be the same on each, and possible on so many."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ppomax.config import ConfigError, TrainConfig, to_dict
from ppomax.config.launcher import restarts
from ppomax.config.mapping import flat
from ppomax.sharding import ranks
from ppomax.sharding.ranks import talks_by_nccl
from ppomax.sharding.zero_config import check, extra

C = TypeVar("C")


def agreed_config(config: TrainConfig) -> TrainConfig:
    """`agreed` of a configuration of PPO, whose batches all ranks must share evenly."""
    config = agreed(config)
    count = ranks.world_size()
    for knob in ("rollout_size", "minibatch_size"):
        value = getattr(config.batch, knob)
        if value % count:
            raise ConfigError(
                f"config: batch.{knob}={value} cannot be shared evenly by {count} ranks; make it a multiple of "
                f"{count}, or start another number of ranks"
            )
    return config


def agreed(given: C) -> C:
    """A configuration with `run` and `sharding`: with rank 0's folder, resumed if the launcher has started it anew,
    once all ranks are found to have the same one. Raises ConfigError on every rank otherwise."""
    config: Any = given
    out = ranks.broadcast(config.run.out)
    resume = config.run.resume or (restarts() > 0 and out is not None)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=out, resume=resume))
    every = [flat(found) for found in ranks.gather_objects(to_dict(config))]
    for number, found in enumerate(every[1:], 1):
        odd = [f"{k} is {found[k]!r} there and {every[0][k]!r} on rank 0" for k in found if found[k] != every[0][k]]
        if odd:
            raise ConfigError(f"config: rank {number} was started otherwise than rank 0: {', '.join(odd[:4])}")
    count = ranks.world_size()
    if count > 1 and config.run.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"config: run.device={config.run.device}, but each rank takes its own GPU; use auto or cuda")
    if count > 1 and config.run.device == "cpu" and talks_by_nccl():
        raise ConfigError("config: run.device=cpu is only in a file, and ranks talk by nccl; give --run.device cpu too")
    check(config.sharding, count)
    extra(config.sharding)
    return config  # type: ignore[no-any-return]


def agreed_rows(read: Mapping[str, str | None]) -> dict[str, str | None]:
    """Fingerprints of what was read, by its name. ConfigError on all ranks if they have read different rows."""
    for number, found in enumerate(ranks.gather_objects(dict(read))):
        odd = [what for what in read if found[what] != read[what]]
        if odd:
            raise ConfigError(
                f"config: the {odd[0]} that rank {number} read are not those of rank {ranks.rank()}; give all "
                "ranks the same files"
            )
    return dict(read)
