"""The planner's bytes against the live storages of real steps, over many random small jobs on a CPU.

    python -m bench.planned --jobs 120              rows: bench/results/planned.jsonl; plot: planned.png beside them

A job has a family, sizes, a mode, a dtype, a critic, batches and lengths of its own; half of them have uneven texts.
What is counted is what torch allocates in a second step (`live_bytes`): no noise, and no allocator's slack. What C++
operators take of their own is not seen, and left out of the plan here."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from ppomax.config import ConfigError, TrainConfig, load_config
from ppomax.engine import Engine
from ppomax.models import make_reward_model
from ppomax.planning import memory
from ppomax.planning.job import Job
from ppomax.planning.plan import job_of
from ppomax.planning.trace import live_bytes
from ppomax.saving.jsonl import append_row, read_rows

from bench import machine

RESULTS = Path(__file__).parent / "results"
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "GPT2", "OPT")
GIB = 1 << 30


def model_config(draw: random.Random, family: str) -> Any:
    heads = draw.choice([4, 6, 8])
    hidden = heads * draw.choice([16, 32])
    layers, vocab, tied = draw.randint(3, 8), draw.choice([1000, 4000, 8000]), draw.random() < 0.5
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": vocab, "tie_word_embeddings": tied}
    if family == "GPT2":
        return transformers.GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, n_positions=1024, **ids)
    wide = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads} | ids
    wide["max_position_embeddings"] = 1024
    if family == "OPT":
        return transformers.OPTConfig(ffn_dim=4 * hidden, word_embed_proj_dim=hidden, **wide)
    wide |= {"intermediate_size": hidden * draw.choice([2, 3]), "num_key_value_heads": heads // draw.choice([1, 2])}
    if family in ("Gemma2", "Qwen3"):
        wide["head_dim"] = hidden // heads
    return getattr(transformers, f"{family}Config")(**wide)


def draw_job(seed: int) -> tuple[dict[str, Any], Any, list[int]]:
    """Knobs, the models' shape, and the prompts' lengths."""
    draw = random.Random(seed)
    family = FAMILIES[seed % len(FAMILIES)]
    shape = model_config(draw, family)
    sequences = draw.choice([8, 12, 16, 24])
    response, longest = draw.choice([8, 16, 32, 48]), draw.choice([16, 32, 64, 128, 256])
    lengths = [longest] * sequences
    if draw.random() < 0.5:  # most are short, one is at the limit
        lengths = sorted(max(2, int(longest * draw.random() ** draw.choice([1, 3, 6]))) for _ in range(sequences - 1))
        lengths.append(longest)
    mode = draw.choice(["full", "full", "lora", "hydra"])
    knobs: dict[str, Any] = {
        "model.train": mode,
        "model.trained_layers": draw.randint(1, 2),
        "model.dtype": draw.choice(["float32", "float32", "bfloat16"]),
        "model.gradient_checkpointing": draw.random() < 0.3,
        "batch.rollout_size": sequences,
        "batch.minibatch_size": draw.choice([sequences, sequences // 2, sequences // 4]),
        "batch.micro_tokens": draw.choice([longest + response, 512, 1024, 4096]),
        "rollout.max_new_tokens": response,
        "rollout.min_new_tokens": response,
        "rollout.allow_biased_sampling": True,
        "rollout.slots": draw.choice([4, 128]),
        "ptx.coef": 0.0,
        "run.device": "cpu",
    }
    if mode == "lora" and draw.random() < 0.5:
        knobs["model.critic_train"] = "lora"
    if mode == "hydra" and draw.random() < 0.5:
        knobs["model.critic"] = "trunk"
    if draw.random() < 0.2:
        knobs |= {"rollout.top_p": 0.9, "rollout.allow_biased_sampling": False}
    if draw.random() < 0.2:
        knobs["kl.estimator"] = "vocabulary"
    draw.shuffle(lengths)
    return knobs, shape, lengths


def planned_peaks(job: Job) -> dict[str, int]:
    """Bytes that the plan of `job` has, by what `live_peaks` can tell apart."""
    plan = {phase: sum(kinds.values()) - kinds["overhead"] for phase, kinds in memory.device_bytes(job).items()}
    return {
        "load": plan["load"],
        "rollout": max(plan["rollout"], plan["scoring"]),
        "update": max(plan["update"], plan["step"]),
    }


def live_peaks(policy: Callable[[], Any], config: TrainConfig, prompts: list[list[int]]) -> dict[str, int]:
    """Bytes of live storages once an engine on this policy is there, and at the peaks of its second step."""
    with live_bytes() as live:
        model = policy()
        engine = Engine(model, None, None, make_reward_model(model), config)
        del model
        got = {"load": live.now}
        for _ in range(2):  # the optimiser's moments are there from the second step on
            live.peak = live.now
            roll = engine.rollout(prompts)
            got["rollout"] = live.peak
            live.peak = live.now
            engine.update(engine.experience(roll))
            got["update"] = live.peak
            del roll
    return got


def run(seed: int) -> dict[str, Any]:
    """A job's row: planned and live bytes by phase."""
    knobs, shape, lengths = draw_job(seed)
    with tempfile.TemporaryDirectory() as folder:
        shape.architectures = [type(shape).__name__.replace("Config", "ForCausalLM")]
        if isinstance(shape, transformers.GPT2Config):
            shape.architectures = ["GPT2LMHeadModel"]
        shape.save_pretrained(folder)
        config = load_config(overrides=knobs)
        job, _ = job_of(replace(config, model=replace(config.model, policy=folder)), ranks=1, memory=GIB,
                        host_memory=GIB, cpu=True)  # fmt: skip
    job = replace(job, prompt_tokens=max(lengths), prompt_lengths=tuple(sorted(lengths)))
    with patch.object(memory, "SCRATCH", 0):
        planned = planned_peaks(job)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(4, 900, (n,), generator=generator).tolist() for n in lengths]
    torch.manual_seed(seed)

    def policy() -> Any:
        return transformers.AutoModelForCausalLM.from_config(shape).to(getattr(torch, config.model.dtype))

    got = live_peaks(policy, config, prompts)
    return {
        "seed": seed,
        "commit": machine.commit(),
        "family": FAMILIES[seed % len(FAMILIES)],
        "knobs": knobs,
        "longest": max(lengths),
        "mean": round(sum(lengths) / len(lengths), 1),
        "planned": planned,
        "live": got,
        "ratio": round(max(planned.values()) / max(got.values()), 4),
    }


def summary(rows: list[dict[str, Any]]) -> str:
    """Median, the middle 95 %, and the worst of the ratios planned : live of the peaks."""
    ratios = sorted(r["ratio"] for r in rows)
    low, high = (ratios[min(len(ratios) - 1, round(q * (len(ratios) - 1)))] for q in (0.025, 0.975))
    worst = max(rows, key=lambda r: abs(r["ratio"] - 1))
    within = sum(0.87 <= r <= 1.15 for r in ratios) / len(ratios)
    return (
        f"{len(rows)} jobs: median {statistics.median(ratios):.3f}, 95 % within {low:.2f} to {high:.2f}, "
        f"{within:.0%} within 0.87 to 1.15; furthest {worst['ratio']:.2f} (seed {worst['seed']})"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Planned against live peaks, by mode, and the ratios against how uneven the texts are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6))
    for mode, colour in (("full", "#4c72b0"), ("lora", "#dd8452"), ("hydra", "#55a868")):
        own = [r for r in rows if r["knobs"]["model.train"] == mode]
        live = [max(r["live"].values()) / 2**20 for r in own]
        left.scatter(live, [max(r["planned"].values()) / 2**20 for r in own], s=16, color=colour, label=mode)
        right.scatter([r["longest"] / r["mean"] for r in own], [r["ratio"] for r in own], s=16, color=colour)
    edges = [0.8 * min(left.get_xlim()[0], left.get_ylim()[0]) or 1, 1.2 * max(left.get_xlim()[1], left.get_ylim()[1])]
    edges[0] = max(edges[0], 5)
    left.plot(edges, edges, color="#999999", lw=1)
    left.set(xscale="log", yscale="log", xlabel="live at the peak, MiB", ylabel="planned, MiB", title="Peak of a step")
    left.legend()
    right.axhspan(0.87, 1.15, color="#eeeeee", zorder=0)
    right.axhline(1, color="#999999", lw=1, zorder=1)
    right.set(xlabel="longest prompt : mean prompt", ylabel="planned : live", title=summary(rows).split(";")[0])
    right.title.set_fontsize(9)
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.planned", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=120)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    path = given.out / "planned.jsonl"
    done = {r["seed"] for r in read_rows(path)}
    for seed in range(given.jobs):
        if seed not in done:
            try:
                row = run(seed)
            except ConfigError as error:  # knobs that do not go together
                print(f"seed {seed}: {error}", flush=True)
                continue
            append_row(path, row)
            print(f"seed {seed}: {row['family']} {row['knobs']['model.train']} {row['ratio']:.3f}", flush=True)
    rows = read_rows(path)
    plot(rows, given.out / "planned.png")
    print(summary(rows))
    print(json.dumps({"machine": machine.processor(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
