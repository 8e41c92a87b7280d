"""What the policy trains (`model.train`): the time of a scored rollout and of an update, and what each mode holds.

    python -m bench.modes [--threads 2] [--rounds 5] [--prompts 64] [--tokens 48] [--layers 2] [--cpu-time]

The shipped policy, reward model and prompts. All modes sample the same tokens from the same prompts (checked; but where
rounding turns a draw), in turns, in one process; a rollout is decoding and the logprobs of policy and reference, and
values. Prints medians, the median ratio to full mode in the same turn, and bytes: reference (what it holds beside the
policy), gradients with AdamW's moments, and the values' model. `lora, both` has a critic of adapters on the frozen
reward model. `hydra` has the same critic as full mode, `hydra+branch`
a value branch on the trunk. --cpu-time counts the process's processor time: for a machine that others use too."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from ppomax.assets import FOLDER
from ppomax.config import load_config
from ppomax.engine import Engine
from ppomax.recipe.batch import Experience, per_token
from torch import nn

MODES = {
    "full": {},
    "lora": {"model.train": "lora"},
    "lora, both": {"model.train": "lora", "model.critic_train": "lora"},
    "hydra": {"model.train": "hydra"},
    "hydra+branch": {"model.train": "hydra", "model.critic": "trunk"},
}


def make(mode: str, prompts: int, tokens: int, layers: int) -> Engine:
    """An engine on the shipped models, one minibatch a buffer."""
    shipped = FOLDER
    config = load_config(
        overrides={
            "ptx.coef": 0.0, "batch.rollout_size": prompts, "batch.minibatch_size": prompts, "run.device": "cpu",
            "rollout.max_new_tokens": tokens, "rollout.min_new_tokens": tokens,
            "rollout.allow_biased_sampling": True, "model.trained_layers": layers,
            "policy_optim.lr": 0.0, "critic_optim.lr": 0.0, **MODES[mode],
        }
    )  # fmt: skip
    return Engine(shipped / "policy", None, None, shipped / "reward_model", config)


def read_prompts(engine: Engine, count: int) -> list[list[int]]:
    """The first shipped prompts as token ids."""
    rows = (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [list(engine.tokenizer(json.loads(row)["prompt"])["input_ids"]) for row in rows]  # type: ignore[misc]


def held(engine: Engine) -> dict[str, int]:
    """Bytes of the reference beside the policy, of gradients and moments of the policy, of the trained critic."""
    shared = {p.data_ptr() for p in engine.policy.module.parameters()}
    reference = engine.reference.parameters() if isinstance(engine.reference, nn.Module) else ()
    return {
        "reference": sum(p.nbytes for p in reference if p.data_ptr() not in shared),
        "trained": 3 * sum(p.nbytes for p in engine.policy.params),
        "critic": sum(p.nbytes for p in engine.critic.params),
    }


def timed(clock: Callable[[], float], run: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    began = clock()
    out = run(*args)
    return clock() - began, out


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.modes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    engines = {mode: make(mode, args.prompts, args.tokens, args.layers) for mode in MODES}
    prompts = read_prompts(engines["full"], args.prompts)
    rollouts: dict[str, list[float]] = {mode: [] for mode in MODES}
    updates: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(args.rounds + 1):  # the first warms up
        drawn: dict[str, Experience] = {}
        for mode, engine in engines.items():
            seconds, roll = timed(clock, engine.rollout, prompts)
            rollouts[mode].append(seconds)
            drawn[mode] = engine.experience(roll)
        for mode, engine in engines.items():
            updates[mode].append(timed(clock, engine.update, drawn[mode])[0])
        if turn == 0:
            report_agreement(drawn)
    for mode, engine in engines.items():
        sizes = "   ".join(f"{name} {size / 2**20:6.2f} MiB" for name, size in held(engine).items())
        rollout, update = (summary(x[mode][1:], x["full"][1:]) for x in (rollouts, updates))
        print(f"{mode:13} rollout {rollout}   update {update}   {sizes}")


def summary(times: list[float], full: list[float]) -> str:
    """Median, and the median of the ratios to full mode in the same turn, which a busy machine disturbs least."""
    ratio = statistics.median(a / b for a, b in zip(times, full, strict=True))
    return f"{statistics.median(times) * 1e3:8.1f} ms ({ratio:.2f})"


def report_agreement(drawn: dict[str, Experience]) -> None:
    """Same tokens in every mode but where rounding turned a draw, or RuntimeError; prints how far the reference
    logprobs of the same sequences are apart. Adapted layers are not joined, so their last bits are others."""
    full = drawn["full"].rollout
    gap = 0.0
    for mode, experience in drawn.items():
        roll = experience.rollout
        pairs = list(zip(roll.sequences(), full.sequences(), strict=True))
        same = torch.tensor([a == b for a, b in pairs])
        if same.float().mean() < 0.9:
            raise RuntimeError(f"{mode} sampled other tokens than full mode from the same prompts and seeds")
        if not same.all():
            print(f"{mode}: {int((~same).sum())} of {len(same)} responses differ, where rounding turned a draw")
        kept = per_token(same, full.response_cu)
        gap = max(gap, float((roll.ref_logprobs - full.ref_logprobs)[kept].abs().max()))
    print(
        f"{len(full.finished)} sequences, {len(full.tokens)} tokens, {len(full.states)} of them sampled; "
        f"reference logprobs differ by at most {gap:.1e}"
    )


if __name__ == "__main__":
    main()
