"""Which knob to turn: each one's effect is had by counting again with the knob turned, not by a rule of thumb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ppomax.planning.job import Job
from ppomax.planning.memory import device_bytes, host_bytes
from ppomax.planning.trace import doubled, sizes_of


@dataclass(frozen=True)
class Advice:
    """What turning one knob would do."""

    knob: str
    saves: int
    """Bytes of a rank's peak."""
    fits: bool
    """The job fits then."""


def advice_for(job: Job) -> tuple[Advice, ...]:
    """Every knob that lowers the peak or makes the job fit; those that make it fit first, then by what they save."""
    peak, fits = _looked_at(job)
    found = []
    for flag, turn in (STAGE_KNOBS if job.alone else KNOBS).items():
        turned = turn(job)
        if turned == job or (turned.zero_stage is not None and turned.ranks == 1):
            continue
        other, then_fits = _looked_at(turned)
        if other < peak or (then_fits and not fits):
            found.append(Advice(flag.format(**vars(turned)), peak - other, then_fits))
    return tuple(sorted(found, key=lambda a: (not a.fits, -a.saves)))


def most_parameters(job: Job) -> float:
    """Parameters of the deepest policy of this shape that the rollout has room for on a rank, one sequence at a time:
    decoding keeps the policy whole on each, so from there on it would have to be cut within its layers (tensor
    parallelism), which our decoder cannot. Bytes grow in a straight line with the depth."""
    one = replace(job, slots=1)
    deep = replace(one, policy=doubled(one.policy))
    small, large = (sizes_of(j.policy, "causal_lm") for j in (one, deep))
    at, then = (sum(device_bytes(j)["rollout"].values()) for j in (one, deep))
    more = (large.params - small.params) / max(1, then - at)
    return small.params + (job.memory - at) * more


def _looked_at(job: Job) -> tuple[int, bool]:
    peak = max(sum(kinds.values()) for kinds in device_bytes(job).values())
    return peak, peak <= job.memory and sum(host_bytes(job).values()) <= job.host_memory


def _borrowing(job: Job) -> Job:
    """The critic as adapters on a model that is held whole anyway; the same job where there is none."""
    held = job.critic is not None and (job.critic == job.reward or job.train == "lora")
    if not held or job.zero_stage == 3 or job.frozen not in ("auto", "whole"):
        return job
    return replace(job, borrowing_critic=True, lora_rank=job.lora_rank or 16)


def _smaller_cache(job: Job) -> Job:
    """Half the cache, of which sequences take their share as they grow."""
    now = job.cache_tokens or min(job.slots, job.sequences) * job.length
    return job if job.alone else replace(job, cache_tokens=max(2 * job.length, now // 2))


def _in_bits(job: Job) -> Job:
    """Frozen weights in 8 bits, where models are whole."""
    whole = job.zero_stage != 3 and job.frozen in ("auto", "whole") and not job.refreshed and not job.alone
    return replace(job, frozen_bits=8) if whole and job.frozen_bits is None else job


def _idle(job: Job) -> Job:
    """Models on the host between their phases, where nothing is cut."""
    whole = not job.zero_stage and job.frozen in ("auto", "whole") and not job.alone and not job.cpu
    return replace(job, idle_on_host=True) if whole else job


KNOBS: dict[str, Callable[[Job], Job]] = {
    "--model.dtype bfloat16": lambda job: replace(job, dtype="bfloat16"),
    "--model.train lora": lambda job: replace(job, train="lora", lora_rank=job.lora_rank or 16),
    "--model.critic_train lora": _borrowing,
    "--model.frozen_bits 8": _in_bits,
    "--sharding.idle host": _idle,
    "--model.train hydra": lambda job: replace(job, train="hydra", critic=None),
    "--model.gradient_checkpointing true": lambda job: replace(job, gradient_checkpointing=True),
    "--sharding.zero_stage 2": lambda job: replace(job, zero_stage=2),
    "--sharding.zero_stage 3": lambda job: replace(job, zero_stage=3),
    "--sharding.offload_optimizer true": lambda job: replace(job, offload_optimizer=True),
    "--sharding.offload_param true": lambda job: replace(job, zero_stage=3, offload_param=True),
    "--batch.micro_tokens {micro_tokens}": lambda job: replace(
        job, micro_tokens=max(job.length, job.micro_tokens // 2)
    ),
    "--rollout.slots {slots}": lambda job: replace(job, slots=max(1, min(job.slots, job.sequences) // 2)),
    "--rollout.cache_tokens {cache_tokens}": _smaller_cache,
    "--rollout.max_new_tokens {response_tokens}": lambda job: replace(
        job, response_tokens=max(1, job.response_tokens // 2)
    ),
    "--data.max_prompt_tokens {prompt_tokens}": lambda job: replace(job, prompt_tokens=max(1, job.prompt_tokens // 2)),
    "twice the GPUs ({ranks})": lambda job: replace(job, ranks=2 * job.ranks),
}
"""What a user can turn, by the flag's name, and what it does to a job."""

STAGE_KNOBS: dict[str, Callable[[Job], Job]] = {
    **{
        flag.replace("--model.", "--").replace("--batch.", "--"): turn
        for flag, turn in KNOBS.items()
        if flag.split(".")[0] not in ("--rollout", "--data") and "hydra" not in flag and "critic" not in flag
    },
    "--max_tokens {response_tokens}": KNOBS["--rollout.max_new_tokens {response_tokens}"],
}
"""The same for a stage before PPO."""
