"""The trained policy as a HF directory, written by rank 0.

A policy that is cut over the ranks (ZeRO-3) or has adapters is made whole tensor by tensor and written shard by shard,
so that no process holds more of it than one layer beside what it holds anyway."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ppomax.models.adapters import has_adapters, merged_weights
from ppomax.saving.model_folder import save_model
from ppomax.sharding import Lazy, rank, together
from ppomax.tensor_files import shards, size_of, write_tensors, write_together

if TYPE_CHECKING:
    from ppomax.engine import Engine

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"


def export_policy(engine: Engine, path: Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """The policy as a HF directory that AutoModelForCausalLM loads, tokenizer included if there is one; adapters are
    merged in, and lie beside it in `adapter`, in PEFT's format. Every rank calls."""
    adapted = has_adapters(engine.policy.module)
    if adapted or engine.policy.cut:
        weights, adapters = engine.policy.whole_model(), dict[str, Lazy]()
        if adapted:
            weights, adapters = merged_weights(engine.policy.module, weights)
        parts = shards(weights, shard_bytes)
        tensors = [*weights.values(), *adapters.values()]
        write_together(tensors, lambda stream: _write(engine, path, weights, parts, adapters, stream))
        return path
    with together():
        if rank() == 0:
            if engine.tokenizer is not None:
                save_model(engine.policy.module, engine.tokenizer, path)
            else:
                engine.policy.module.save_pretrained(path, safe_serialization=True)
    return path


def _write(
    engine: Engine,
    path: Path,
    weights: dict[str, Lazy],
    parts: list[list[str]],
    adapters: dict[str, Lazy],
    stream: Iterator[Tensor],
) -> None:
    """Beside its place first, then renamed, as models.save_model does."""
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
    if adapters:
        whole = {name: next(stream).detach().cpu().clone() for name in adapters}
        policy.save_pretrained(beside / "adapter", state_dict=whole, safe_serialization=True)
    config = copy.deepcopy(policy.config)
    config.architectures, config.dtype = [type(policy).__name__], policy.dtype  # as save_pretrained does
    config.save_pretrained(beside)
    if policy.generation_config is not None:
        policy.generation_config.save_pretrained(beside)
    if engine.tokenizer is not None:
        engine.tokenizer.save_pretrained(beside)
    if path.exists():
        shutil.rmtree(path)
    os.replace(beside, path)
