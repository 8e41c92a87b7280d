"""Plain torch in one process, data parallel or DeepSpeed ZeRO in several, behind one small face.

    ranks.py   who this process is; sums, joins and agreements over all ranks (identities in one process)
    plain.py   a trained model under torch: `Trained`; the same on several ranks: `DataParallel` (ZeRO 0)
    zero.py    a trained or frozen model under DeepSpeed: `ZeroTrained` (ZeRO 1-3), `ZeroFrozen`
    zero_engine.py, zero_config.py   DeepSpeed's engine around a module, and its configuration
    watch.py   signs of life between ranks: one that dies or fails ends the job, named
choose.py decides among them as `config.sharding` says, and which models are read straight into partitions."""

from ppomax.sharding.choose import copy_source, cuts, freeze_model, is_cut, run, stage_of, train_model
from ppomax.sharding.plain import DataParallel, Lazy, Trained, copy_into, lr_at
from ppomax.sharding.ranks import (
    agree,
    barrier,
    everyone,
    gather,
    largest,
    place,
    rank,
    share,
    together,
    total,
    world_size,
)

__all__ = [
    "DataParallel",
    "Lazy",
    "Trained",
    "agree",
    "barrier",
    "copy_into",
    "copy_source",
    "cuts",
    "everyone",
    "freeze_model",
    "gather",
    "is_cut",
    "largest",
    "lr_at",
    "place",
    "rank",
    "run",
    "share",
    "stage_of",
    "together",
    "total",
    "train_model",
    "world_size",
]
