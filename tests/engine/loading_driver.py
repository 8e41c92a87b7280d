"""What each rank of test_loading.py runs.

torchrun --nproc_per_node 2 -m tests.engine.loading_driver FOLDER OUT.json"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from ppomax.config import ShardingConfig
from ppomax.loading import LoadingError, load_partitioned
from ppomax.sharding import ranks, zero_config
from ppomax.sharding.zero import ZeroFrozen
from transformers import AutoModelForCausalLM

SHARDING = ShardingConfig(zero_stage=3)


def settings(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return zero_config.frozen(SHARDING, dtype)


def status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def equal(folder: Path) -> dict[str, float]:
    """Largest difference of any gathered tensor, and of the logits, from what from_pretrained loads."""
    import deepspeed

    out = {}
    for name in ("untied", "tied", "gpt2"):
        want = AutoModelForCausalLM.from_pretrained(folder / name)
        model = load_partitioned(folder / name, torch.float32, settings=settings())
        gap = 0.0
        for (key, p), (_, q) in zip(model.named_parameters(), want.named_parameters(), strict=True):
            assert p.ds_tensor.numel() < q.numel() or q.numel() <= 2, f"{key} is not cut"
            with deepspeed.zero.GatheredParameters([p]):
                assert p.shape == q.shape, key
                gap = max(gap, float((p - q).abs().max()))
        ids = torch.arange(12)[None] % 60
        logits = ZeroFrozen(model, SHARDING).run(lambda m, x: m(input_ids=x).logits, ids)
        out[name] = max(gap, float((logits - want(input_ids=ids).logits).abs().max()))
    return out


def missing_shard(folder: Path) -> str:
    try:
        load_partitioned(folder / "lost", torch.float32, settings=settings())
    except LoadingError as error:
        return str(error)
    return "nothing was raised"


def host_memory(folder: Path) -> dict[str, int]:
    """Peak growth of resident memory while a large model is loaded, and its size."""
    load_partitioned(folder / "untied", torch.float32, settings=settings())  # libraries are loaded by now
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = load_partitioned(folder / "large", torch.float32, settings=settings())
    grown = status("VmHWM") - before
    sizes = [p.ds_shape.numel() * 4 for p in model.parameters()]
    return {"grown": grown, "bytes": sum(sizes), "largest": max(sizes)}


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    ranks.start("cpu")
    mine = {"equal": equal(folder), "lost": missing_shard(folder)}
    if (folder / "large").is_dir():
        mine["memory"] = host_memory(folder)
    everyone = ranks.everyone(mine)
    if ranks.rank() == 0:
        out.write_text(json.dumps(everyone), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
