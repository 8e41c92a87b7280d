"""Saving and restoring a state of 1.0 GB (83 M parameters and AdamW's moments, float32), seconds by rounds:

torchrun --standalone --nproc_per_node 2 -m bench.checkpoint --out /dev/shm/checkpoint --stage 2
"""

import argparse
import shutil
import time
from pathlib import Path
from statistics import median

import torch
from ppomax.config import OptimConfig, ShardingConfig
from ppomax.saving.engine_state import Parts, restore_state, save_state
from ppomax.sharding import ranks, train_model
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder to write and delete")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2, help="of ZeRO")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ranks.start("cpu")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=10,
                    num_attention_heads=12, num_key_value_heads=12)
    )  # fmt: skip
    trained = train_model(model, OptimConfig(), 10, ShardingConfig(zero_stage=given.stage))
    trained.backward(trained.call(lambda m: m(input_ids=torch.arange(4)[None]).logits.square().mean()), last=True)
    trained.step(trained.grad_norm())
    saves, loads = [], []
    for _ in range(given.rounds):
        saves.append(timed(lambda: save_state(given.out, Parts({"policy": trained}, {}), {"fingerprints": {}}, {})))
        loads.append(timed(lambda: restore_state(given.out, Parts({"policy": trained}, {}), {})))
    if ranks.rank() == 0:
        files = {p.name: p.stat().st_size for p in sorted(given.out.glob("policy*.safetensors"))}
        size = sum(files.values())
        for what, seconds in (("save", saves), ("restore", loads)):
            print(f"{what}: {median(seconds):.2f} s, {size / median(seconds) / 1e9:.2f} GB/s; rounds {seconds}")
        print(files)
        shutil.rmtree(given.out)


def timed(work: object) -> float:
    """Seconds until all ranks have done it."""
    ranks.barrier()
    began = time.perf_counter()
    work()  # type: ignore[operator]
    ranks.barrier()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
