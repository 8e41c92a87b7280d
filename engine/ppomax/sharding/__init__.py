"""Plain torch in one process, data parallel or DeepSpeed ZeRO in several, behind one small face.

    ranks.py   who this process is; `ranks.sum(x)`, `ranks.gather(x)` ... (identities in one process)
    plain.py   a trained model under torch: `Trained`; the same on several ranks: `DataParallel` (ZeRO 0)
    zero.py    a trained or frozen model under DeepSpeed: `ZeroTrained` (ZeRO 1-3), `ZeroFrozen`
    zero_engine.py, zero_config.py   DeepSpeed's engine around a module, and its configuration
    watch.py   signs of life between ranks: one that dies or fails ends the run, named
    settle.py  the configuration that all ranks run with
choose.py decides among them as `config.sharding` says, and which models are read straight into partitions."""

from ppomax.sharding import ranks
from ppomax.sharding.choose import (
    call,
    freeze_model,
    is_sharded,
    model_to_copy,
    sharded_reads,
    stage_of,
    train_model,
)
from ppomax.sharding.idle import Idle
from ppomax.sharding.plain import DataParallel, Trained, lr_at
from ppomax.sharding.weights import Lazy, copy_into

__all__ = [
    "DataParallel",
    "Idle",
    "Lazy",
    "Trained",
    "call",
    "copy_into",
    "freeze_model",
    "is_sharded",
    "lr_at",
    "model_to_copy",
    "ranks",
    "sharded_reads",
    "stage_of",
    "train_model",
]
