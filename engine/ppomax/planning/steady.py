"""Bytes that are there whatever the phase: weights, optimiser, what engines keep; and where models lie on the host
between their phases, what of that is then away."""

from __future__ import annotations

from collections.abc import Iterable

from ppomax.planning.job import GiB, Job, Role, in_bits, offloaded, optimiser_ranks, partitioned, roles
from ppomax.planning.trace import sizes_of

GPU_OVERHEAD = int(1.5 * GiB)
"""CUDA context, NCCL and workspaces of a rank: an assumption."""
CPU_OVERHEAD = int(0.55 * GiB)
"""Resident memory of Python with torch, transformers and the kernels loaded."""
SAMPLER_PROCESS = int(1.7 * GiB)
"""Resident memory of vLLM's process on a CPU, its cache of 1 GiB included, without a model."""
NF4_BLOCK = 64
"""Numbers that share a scale in 4 bits (models/frozen_bits.py)."""


def weights(job: Job) -> dict[str, int]:
    """Bytes of each model's weights on one rank."""
    out = {}
    for r in roles(job):
        on_device = 0 if offloaded(job, r) and not job.cpu else r.elements * job.width - _saved_by_bits(job, r)
        out[f"{r.name} weights"] = on_device // (job.ranks if partitioned(job, r) else 1)
    return out


def _saved_by_bits(job: Job, role: Role) -> int:
    """What the codes and scales of `frozen_bits` take less than the weights that they stand for."""
    if job.frozen_bits is None or not (count := in_bits(job, role)):
        return 0
    rows = count // sum(i * o for _, i, o in role.sizes.linears) * sum(o for _, _, o in role.sizes.linears)
    scales = 4 * (rows if job.frozen_bits == 8 else count // NF4_BLOCK)
    return count * job.width - count * job.frozen_bits // 8 - scales


def steady(job: Job, phase: str) -> dict[str, int]:
    """What is there all through a phase: of models that move, those that it works with, at its fuller moment."""
    whole = added(weights(job), optimiser(job), kept(job), overhead(job))
    if not job.idle_on_host or job.cpu:
        return whole
    sizes, moments = movable(job), []
    for working in WORK[phase]:
        stay = {*working, *(("reward",) if job.borrowing_critic and "critic" in working else ())}
        away = {name: size for name, size in sizes.items() if name.split()[0] not in stay}
        away["optimiser"] = away.pop("critic optimiser", 0)
        moments.append({kind: size - away.get(kind, 0) for kind, size in whole.items()})
    return fullest(moments)


WORK: dict[str, tuple[tuple[str, ...], ...]] = {
    "rollout": ((),),
    "scoring": (("reference", "critic"), ("reward",)),
    "update": (("critic",),),
    "step": (("critic",),),
    "save": (("critic",),),
}
"""Phase -> moments -> which of the models that may lie on the host work then, beside the policy (engine.py)."""


def movable(job: Job) -> dict[str, int]:
    """Bytes of what `sharding.idle: host` moves."""
    found = {kind: size for kind, size in weights(job).items() if kind != "policy weights"}
    trained = next((r.trained for r in roles(job) if r.name == "critic"), 0)
    return found | {"critic optimiser": (8 + (4 if job.width == 2 or job.zero_stage else 0)) * trained}


def optimiser(job: Job) -> dict[str, int]:
    """Two moments, and an fp32 copy of what is trained unless it is fp32 itself in plain torch."""
    if job.offload_optimizer and not job.cpu:
        return {"optimiser": 0}
    return {"optimiser": masters(job)["optimiser"] + 8 * sum(r.trained for r in roles(job)) // optimiser_ranks(job)}


def masters(job: Job) -> dict[str, int]:
    """The fp32 copies alone, which are there before the first step."""
    needed = job.width == 2 or job.zero_stage
    on_host = job.offload_optimizer and not job.cpu
    trained = sum(r.trained for r in roles(job))
    return {"optimiser": 4 * trained // optimiser_ranks(job) if needed and not on_host else 0}


def overhead(job: Job) -> dict[str, int]:
    found = {"overhead": CPU_OVERHEAD if job.cpu else GPU_OVERHEAD}
    return found | ({"sampler": sampler_process(job)} if job.cpu and job.sampler_memory is not None else {})


def sampler_process(job: Job) -> int:
    """vLLM's on a CPU, or what it leaves on the host while it sleeps: its code, its cache, a copy of the policy."""
    copy = sizes_of(job.policy, "causal_lm").params * job.width
    return copy + (SAMPLER_PROCESS if job.cpu else 0)


def kept(job: Job) -> dict[str, int]:
    """What each engine keeps from its start on under ZeRO-3: a flat buffer that gradients are reduced through, its
    partition of them, and hpZ's second copy of the weights."""
    if job.zero_stage != 3:
        return {}
    trained = [r for r in roles(job) if r.trained]
    on_host = job.offload_optimizer and not job.cpu
    gradients = 0 if on_host else sum(r.trained for r in trained) * job.width // job.ranks
    found = {"buckets": len(trained) * job.bucket * job.width, "gradients": gradients}
    if job.hpz > 1:
        found["second copies"] = second_copies(job, [r for r in roles(job) if job.cpu or not offloaded(job, r)])
    return found


def second_copies(job: Job, among: list[Role]) -> int:
    """hpZ's, which lie where a model's parts do."""
    return sum(r.elements for r in among if partitioned(job, r)) * job.width // job.hpz if job.hpz > 1 else 0


def checkpoint_copies(job: Job) -> dict[str, int]:
    """A rank's share of what a checkpoint holds of the trained models: weights, two moments, fp32 copies of 16 bit."""
    each = job.width + 8 + (4 if job.width == 2 else 0)
    trained = sum(r.trained for r in roles(job))
    reference = sum(r.elements for r in roles(job) if r.name == "reference") * job.width if job.refreshed else 0
    return {"checkpoint copies": (each * trained + reference) // job.ranks}


# ---- sums of kinds ------------------------------------------------------------------------------------------------


def fullest(moments: Iterable[dict[str, int]]) -> dict[str, int]:
    """Of micro-batches, the one that holds most."""
    return max(moments, key=lambda kinds: sum(kinds.values()))


def larger(*moments: dict[str, int]) -> dict[str, int]:
    """Of moments that follow each other, the one that holds most."""
    return max(moments, key=lambda kinds: sum(kinds.values()))


def added(*parts: dict[str, int]) -> dict[str, int]:
    out: dict[str, int] = {}
    for part in parts:
        for kind, size in part.items():
            out[kind] = out.get(kind, 0) + size
    return out
