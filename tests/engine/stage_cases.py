"""Fine-tuning and reward-model training as one process and as two ranks do them, for test_stages_sharded.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from ppomax.config import OptimConfig, RunConfig, ShardingConfig
from ppomax.config.stages import RewardModelConfig, SftConfig
from ppomax.saving.model_folder import save_model
from ppomax.sharding import ranks
from ppomax.stages.reward_model import train_reward_model
from ppomax.stages.sft import train_sft
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Qwen3MoeConfig

from tests.engine.rank_cases import Kept, tried
from tests.engine.tiny_text import TEXTS, tiny_llama, tiny_tokenizer

Config = SftConfig | RewardModelConfig
STEPS, HALF = 6, 3
VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "sft": ("sft", {}, (0, 1, 2, 3)),
    "sft, untied": ("sft", {"model": "untied"}, (3,)),
    "sft, lora": ("sft", {"train": "lora"}, (2, 3)),
    "sft, recomputed": ("sft", {"gradient_checkpointing": True}, (3,)),
    "sft, experts": ("sft", {"model": "experts"}, (2, 3)),
    "sft, old names": ("sft", {"model": "neox"}, (3,)),
    "sft, bfloat16": ("sft", {"dtype": "bfloat16"}, (1, 3)),
    "sft, autocast": ("sft", {"autocast": True}, (2,)),
    "reward": ("reward", {}, (0, 1, 2, 3)),
    "reward, untied": ("reward", {"model": "untied"}, (2, 3)),
    "reward, experts": ("reward", {"model": "experts", "unit_std": False}, (3,)),
    "reward, lora": ("reward", {"train": "lora"}, (3,)),
    "reward, no lm": ("reward", {"lm_coef": 0.0, "unit_std": False}, (3,)),
}
"""Stage, its knobs, and the ZeRO stages under which it is run."""


def prepare(folder: Path) -> None:
    """Models and rows of all cases."""
    for name, tied in (("tied", True), ("untied", False)):
        save_model(tiny_llama(tied=tied), tiny_tokenizer(), folder / name)
    known = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 2}
    torch.manual_seed(0)
    for name, config in (
        ("experts", Qwen3MoeConfig(**known, **heads, **experts, head_dim=8)),
        ("neox", GPTNeoXConfig(**known, **heads)),
    ):
        save_model(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), folder / name)
    pairs = [
        {"prompt": "the film is", "chosen": f" {good}", "rejected": f" {bad} ."}
        for good in ("warm", "a warm and funny story")
        for bad in ("dull", "slow and far too long", "bad")
    ]
    for name, rows in {
        "texts": [{"text": text} for text in TEXTS],
        "pairs": pairs,
        "centre": [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config_of(folder: Path, variant: str, stage: int | None, *, out: str = "", resume: bool = False) -> Config:
    """One case's configuration. Batches are of one to five rows, so that some have fewer than there are ranks and
    micro-batches."""
    kind, knobs, _ = VARIANTS[variant]
    name = out or f"{variant}-{stage}"
    shared: dict[str, Any] = {
        "model": str(folder / knobs.get("model", "tied")),
        "impl": "ref",
        "eval_every": 1,
        "sharding": ShardingConfig(zero_stage=stage),  # type: ignore[arg-type]
        "optim": OptimConfig(lr=1e-2, schedule="cosine"),
        "run": RunConfig(
            STEPS, 3, str(folder / name), resume=resume, checkpoint_every=1, keep_checkpoints=9, device="cpu"
        ),
        **{k: v for k, v in knobs.items() if k != "model"},
    }
    if kind == "sft":
        data = str(folder / "texts.jsonl")
        return SftConfig(data=data, eval_data=data, batch_tokens=45, micro_tokens=12, **shared)
    data, centre = str(folder / "pairs.jsonl"), str(folder / "centre.jsonl")
    more = {"centre_data": centre, "unit_std": True, **shared}
    return RewardModelConfig(data=data, eval_data=data, batch_tokens=70, micro_tokens=40, **more)


def run(config: Config) -> dict[str, Any]:
    """Every step's metrics, and the weights that are written; rank 0's."""
    path = train_sft(config) if isinstance(config, SftConfig) else train_reward_model(config)
    ranks.barrier()
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        del row["step_seconds"]
    weights = {name: x.float().flatten()[:64].tolist() for name, x in load_file(path / "model.safetensors").items()}
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return {"rows": rows, "weights": weights, "offset": settings.get("score_offset", 0.0)}


def from_half(folder: Path, variant: str, stage: int | None, source: str, out: str) -> dict[str, Any]:
    """What a run becomes that goes on from the checkpoint of `source` after HALF of its steps."""
    if ranks.rank() == 0:
        shutil.copytree(folder / source, folder / out)
        for step in range(HALF + 1, STEPS + 1):
            shutil.rmtree(folder / out / "checkpoints" / f"step-{step:06d}")
    ranks.barrier()
    return run(config_of(folder, variant, stage, out=out, resume=True))


def refused(config: Config) -> str:
    """The words with which a run is refused."""
    try:
        run(config)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def stages(folder: Path) -> dict[str, Kept]:
    """All cases on two ranks."""
    out: dict[str, Kept] = {}
    for variant, (_, _, where) in VARIANTS.items():
        for stage in where:
            out[f"{variant} {stage}"] = tried(run, config_of(folder, variant, stage))
    for variant, stage in (("sft", 3), ("sft", 1), ("reward, untied", 3), ("sft, lora", 3), ("sft, bfloat16", 3)):
        name = f"{variant}-{stage}"
        out[f"resumed {variant} {stage}"] = tried(from_half, folder, variant, stage, name, f"{name}-resumed")
    out["other rows"] = tried(other_rows, folder)
    return out


def other_rows(folder: Path) -> str:
    """Rank 1 reads another file than rank 0."""
    config = config_of(folder, "sft", 0, out="other-rows")
    if ranks.rank():
        mine = folder / "mine"
        mine.mkdir()
        (mine / "texts.jsonl").write_text(json.dumps({"text": TEXTS[0]}), encoding="utf-8")
        from ppomax.stages import sft

        plain, sft.load_texts = sft.load_texts, lambda source, *a, **k: plain(str(mine / "texts.jsonl"), *a, **k)
        try:
            return refused(config)
        finally:
            sft.load_texts = plain
    return refused(config)
