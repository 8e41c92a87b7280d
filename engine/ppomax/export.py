"""The trained policy as a HF directory, written by rank 0.

A policy that is cut over the ranks (ZeRO-3) is made whole tensor by tensor and written shard by shard, so that no
process holds more of it than one tensor beside its own part."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ppomax.adapters import export_adapters, has_adapters
from ppomax.models import save_model
from ppomax.sharding import Lazy, rank, together
from ppomax.tensor_files import shards, size_of, write_tensors

if TYPE_CHECKING:
    from ppomax.engine import Engine

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"


def export_policy(engine: Engine, path: Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """The policy as a HF directory that AutoModelForCausalLM loads, tokenizer included if there is one; adapters are
    merged in, and lie beside it in `adapter`. Every rank calls."""
    if engine.policy.cut and not has_adapters(engine.policy.module):
        return _export_cut(engine, path, shard_bytes)
    with engine.policy.gathered() as policy, together():
        if rank():
            pass
        elif has_adapters(policy):
            export_adapters(policy, engine.tokenizer, path)
        elif engine.tokenizer is not None:
            save_model(policy, engine.tokenizer, path)
        else:
            policy.save_pretrained(path, safe_serialization=True)
    return path


def _export_cut(engine: Engine, path: Path, shard_bytes: int) -> Path:
    """Beside its place first, then renamed, as models.save_model does."""
    weights = engine.policy.whole_model()
    parts = shards(weights, shard_bytes)
    stream = (weights[name].get() for part in parts for name in part)
    with together():
        try:
            if rank() == 0:
                _write(engine, path, weights, parts, stream)
        finally:  # whoever does not write still makes each tensor whole with the others
            deque(stream, maxlen=0)
    return path


def _write(
    engine: Engine, path: Path, weights: dict[str, Lazy], parts: list[list[str]], stream: Iterator[Tensor]
) -> None:
    beside = path.with_name(path.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    files = ["model.safetensors"]
    if len(parts) > 1:
        files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        placed = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(map(size_of, weights.values()))}, "weight_map": placed}
        (beside / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    for file, part in zip(files, parts, strict=True):
        write_tensors(beside / file, [(name, weights[name]) for name in part], stream)
    policy = engine.policy.module
    policy.config.save_pretrained(beside)
    if policy.generation_config is not None:
        policy.generation_config.save_pretrained(beside)
    if engine.tokenizer is not None:
        engine.tokenizer.save_pretrained(beside)
    if path.exists():
        shutil.rmtree(path)
    os.replace(beside, path)
