"""What each rank of a sharded test runs; a test module starts it once by torchrun and reads the verdicts.

    torchrun --nproc_per_node 2 -m tests.engine.rank_driver equal OUT.json     every case of `equal`, one after another
In one process (no torchrun) the same cases give what the ranks are held against."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from ppomax.config import TrainConfig
from ppomax.data import Text
from ppomax.engine import Engine
from ppomax.sharding import rank, ranks, world_size

from tests.engine.tiny import prompts, small_config, tiny_engine, tiny_policy

PARTITION_ALL = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 100_000,
        "allgather_bucket_size": 100_000,
    }
}
"""DeepSpeed keeps small parameters whole, and all of a tiny model's are small: cut them too."""

COUNTS = (8, 7, 8, 5, 8)
"""Prompts in each of five steps: odd ones too."""


def config_of(stage: int | None, **knobs: object) -> TrainConfig:
    named = {"batch__minibatch_size": 4, "batch__epochs": 2, "advantage__whiten": True, "ptx__coef": 0.1}
    named |= {"ptx__batch_size": 3, "kl__controller": "adaptive", "batch__micro_tokens": 40}
    if stage in (1, 2, 3):
        named["sharding__deepspeed"] = extra_file()
    return small_config(sharding__zero_stage=stage, **{**named, **knobs})


def extra_file() -> str:
    path = Path(os.environ["TMPDIR"]) / f"extra-{os.getpid()}.json"
    path.write_text(json.dumps(PARTITION_ALL), encoding="utf-8")
    return str(path)


def texts(count: int) -> list[Text]:
    return [Text(p, 1) for p in prompts(count, seed=9)]


def five_steps(config: TrainConfig, **parts: Any) -> tuple[Engine, list[dict[str, float]]]:
    engine = tiny_engine(config, texts=texts if config.ptx.coef else None, **parts)
    return engine, [engine.step(prompts(count, seed=i)) for i, count in enumerate(COUNTS)]


def weights_of(engine: Engine) -> dict[str, list[float]]:
    """Every weight of policy and critic, flat."""
    out = {}
    for role in ("policy", "critic"):
        weights, _ = getattr(engine, role).lazy()
        out.update({f"{role}.{name}": x.get().flatten().tolist() for name, x in weights.items()})
    return out


def equal() -> dict[str, Any]:
    """Five steps under each ZeRO stage; in one process also under plain torch."""
    stages = [0, 1, 2, 3] if world_size() > 1 else [None, 1, 2, 3]
    out = {}
    for stage in stages:
        engine, rows = five_steps(config_of(stage))
        out[str(stage)] = {"metrics": rows, "weights": weights_of(engine)}
    engine, rows = five_steps(config_of(3 if world_size() > 1 else None), policy=tiny_policy(tied=True))
    out["tied"] = {"metrics": rows, "weights": weights_of(engine)}
    return out


def main(case: str, out: Path) -> None:
    torch.set_num_threads(1)
    ranks.start("cpu")
    verdicts = globals()[case]()
    if rank() == 0:
        out.write_text(json.dumps(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
