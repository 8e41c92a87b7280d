"""What each rank of test_loading.py runs.

torchrun --nproc_per_node 2 -m tests.engine.loading_driver FOLDER OUT.json CASE ..."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from ppomax.config import ShardingConfig, TrainConfig, config_names, load_config
from ppomax.data import Text
from ppomax.engine import Engine
from ppomax.models import load_policy, load_reward_model, make_reward_model
from ppomax.models.partitioned import LoadingError, load_partitioned
from ppomax.planning.memory import device_bytes
from ppomax.planning.plan import job_of, shape_of
from ppomax.planning.trace import live_bytes
from ppomax.saving.model_folder import save_model
from ppomax.sharding import ranks, zero_config
from ppomax.sharding.zero import ZeroFrozen
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.engine.rank_cases import keep, tried
from tests.engine.tiny import EOS, VOCABULARY, prompts, small_config, tiny_assets, tiny_tokenizer

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
        logits = ZeroFrozen(model, SHARDING).call(lambda m, x: m(input_ids=x).logits, ids)
        out[name] = max(gap, float((logits - want(input_ids=ids).logits).abs().max()))
    return out


def as_whole(folder: Path) -> dict[str, list[float]]:
    """Two steps of an engine whose models were read into partitions, and of one that cut them after; each metric that
    differs. In full and lora, the critic from the reward model and from the policy; once with hpZ's second copies."""
    out = {}
    assets = {k: v for k, v in tiny_assets(folder / f"assets-{ranks.rank()}").items() if k.startswith("model.")}
    assets = ranks.broadcast(assets)
    ranks.barrier()
    for train, critic, hpz in (("full", "reward_model", 1), ("lora", "reward_model", 1), ("full", "policy", 2)):
        knobs = {"model__train": train, "model__critic": critic, "sharding__zero_stage": 3, "sharding__hpz": hpz}
        config = small_config(**{k.replace(".", "__"): v for k, v in assets.items()}, **knobs)
        paths = str(assets["model.policy"]), str(assets["model.reward_model"])
        cut = Engine(paths[0], None, None, paths[1], config)
        assert all(hasattr(p, "ds_id") for p in cut.policy.module.parameters())
        late = Engine(load_policy(paths[0]), None, None, load_reward_model(paths[1]), config, tokenizer=cut.tokenizer)
        assert cut.fingerprints == late.fingerprints
        rows = [(cut.step(prompts(8, seed=i)).metrics, late.step(prompts(8, seed=i)).metrics) for i in range(2)]
        gap = [abs(a[k] - b[k]) for a, b in rows for k in a if not k.startswith(("time/", "perf/")) and a[k] == a[k]]
        out[f"{train} {critic}"] = max(gap)
    return out


CUT = {
    "data.max_prompt_tokens": 16,
    "data.overlong": "truncate",
    "rollout.max_new_tokens": 8,
    "rollout.slots": 4,
    "batch.rollout_size": 8,
    "batch.minibatch_size": 4,
    "batch.micro_tokens": 96,
    "ptx.max_tokens": 16,
    "model.trained_layers": 1,
    "sharding.zero_stage": 3,
    "sharding.offload_optimizer": True,
    "sharding.offload_param": True,
    "run.device": "cpu",
}
"""What a full-scale configuration is cut down to beside its two layers: lengths, counts and, so that two ranks fit a
small machine, the width."""
AT_SCALE = [name for name in config_names() if not name.startswith("smollm2")]
WHOLE = {"sharding.zero_stage": 2, "sharding.offload_optimizer": False, "sharding.offload_param": False}


def configs(folder: Path) -> dict[str, float]:
    """Two steps of a two-layer cut of every full-scale configuration, under ZeRO-3 with everything on the host."""
    out = {}
    for name in AT_SCALE:
        paths = ranks.broadcast([str(x) for x in _cut_models(name, folder)] if ranks.rank() == 0 else [])
        knobs = {**CUT, "model.policy": paths[0], "model.reward_model": paths[1]}
        if load_config(name).model.critic_train == "lora":  # which stands on whole weights
            knobs |= {**WHOLE}
        config = load_config(name, overrides=knobs)
        engine = Engine(
            paths[0], None, None, paths[1], config, tokenizer=tiny_tokenizer(), texts=lambda n: [Text([1, 5, 6], 1)] * n
        )
        before = weights_of(engine)
        rows = [engine.step(prompts(8, seed=i)).metrics for i in range(2)]
        after = weights_of(engine)
        assert all(row["val/skipped"] == 0 for row in rows)
        assert any((before[key] != after[key]).any() for key in before), f"{name}: no weight moved"
        out[name] = rows[-1]["policy/grad_norm"]
    return out


def _cut_models(name: str, folder: Path) -> tuple[Path, Path]:
    """The configuration's own architecture, two layers deep and narrow, with random weights."""
    shape = json.loads(shape_of(str(load_config(name).model.policy)))
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    shape |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCABULARY}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4 * kv_heads // heads or 1, "eos_token_id": EOS}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, pad_token_id=0)
    torch.manual_seed(1)
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_model(policy, tiny_tokenizer(), folder / name / "policy")
    save_model(make_reward_model(policy), tiny_tokenizer(), folder / name / "reward")
    return folder / name / "policy", folder / name / "reward"


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    """The trained weights of the policy in float32 (a bfloat16 one need not move in a step of 5e-7)."""
    _, state = engine.policy.lazy()
    return {name: x.get().clone() for name, x in state.items() if name.startswith("copy/")}


BUCKET = 1_000_000
DEEPSPEED = {"reduce_bucket_size": BUCKET, "stage3_max_live_parameters": BUCKET}
DEEPSPEED |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}


AGAIN = {"model__gradient_checkpointing": True, "batch__micro_tokens": 4096, "rollout__max_new_tokens": 40}
HPZ = {"sharding__hpz": 2}
PLANNED: tuple[tuple[int, str, dict[str, object]], ...] = (
    (0, "float32", {}), (2, "bfloat16", {}), (3, "float32", {}), (3, "float32", AGAIN)
)  # fmt: skip


def planned(folder: Path, cases: tuple[tuple[int, str, dict[str, object]], ...] = PLANNED) -> dict[str, float]:
    """Planned peaks over measured ones (live storages) of a second step, by stage, dtype and phase; the last with
    gradient checkpointing and longer sequences."""
    out = {}
    file = folder / f"deepspeed-{ranks.rank()}.json"
    file.write_text(json.dumps({"zero_optimization": DEEPSPEED}), encoding="utf-8")
    hf = LlamaConfig(vocab_size=4096, hidden_size=192, intermediate_size=448, num_hidden_layers=8,
                     num_attention_heads=6, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)  # fmt: skip
    hf.save_pretrained(folder / f"shape-{ranks.rank()}")
    for stage, dtype, more in cases:
        shape = str(folder / f"shape-{ranks.rank()}")
        knobs: dict[str, object] = {"model__policy": shape, "model__reward_model": shape, "model__dtype": dtype}
        knobs |= {"run__device": "cpu"}
        knobs |= {"batch__rollout_size": 16, "batch__minibatch_size": 8, "batch__micro_tokens": 96, "impl": "auto"}
        knobs |= {
            "rollout__max_new_tokens": 8,
            "rollout__min_new_tokens": 8,
            "rollout__allow_biased_sampling": True,
            "data__max_prompt_tokens": 16,
        }
        knobs |= {"sharding__zero_stage": stage, "sharding__deepspeed": str(file) if stage else None}
        config = small_config(**{**knobs, **more})
        job, _ = job_of(config, ranks=2, memory=1 << 40, host_memory=1 << 40, cpu=True)
        plan = {phase: sum(kinds.values()) - kinds["overhead"] for phase, kinds in device_bytes(job).items()}
        there = _held(hf, config)
        plan["rollout"], plan["update"] = max(plan["rollout"], plan["scoring"]), max(plan["update"], plan["step"])
        name = " ".join([f"ZeRO-{stage}", dtype, *more])
        out |= {f"{name} {phase}": plan[phase] / size for phase, size in there.items()}
    return out


def planned_hpz(folder: Path) -> dict[str, float]:
    """The same with hpZ, whose group of ranks DeepSpeed keeps for the process: so after all that goes without."""
    return planned(folder, ((3, "float32", HPZ),))


def _held(hf: LlamaConfig, config: TrainConfig) -> dict[str, int]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    batch = [torch.randint(4, 4000, (16,), generator=generator).tolist() for _ in range(16)]
    with live_bytes() as live:
        policy = LlamaForCausalLM(hf).to(getattr(torch, config.model.dtype))
        engine = Engine(policy, None, None, make_reward_model(policy), config)
        del policy
        got = {"load": live.now}
        for _ in range(2):
            live.peak = live.now
            roll = engine.rollout(batch)
            got["rollout"] = live.peak
            experience = engine.experience(roll)
            live.peak = live.now
            engine.update(experience)
            got["update"] = live.peak
            del roll, experience
    return got


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


def main(folder: Path, out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    ranks.start("cpu")
    keep(out, {case: tried(globals()[case], folder) for case in cases})
    ranks.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
