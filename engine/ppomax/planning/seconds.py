"""Seconds of one iteration by phase, from a device's datasheet and a few stated efficiencies. A roofline, not a
measurement: it says which phase a run will spend its time in, and what a knob does to it.

    forward, FLOPs a token   2 * (parameters - embedding) + 2 * layers * hidden * length   (causal: half of 4)
    backward                 twice the forward; adapters: once (no weight gradients); gradient checkpointing: once more;
                             hydra: of the trained blocks alone
    decode step              max(weights + KV cache read over bandwidth, FLOPs) + what the blocks' small ops take
    collective of b bytes    b * (ranks - 1) / ranks / link
Lengths are taken at their limits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ppomax.planning.job import GiB, Job, Role, in_bits, micro_batch, roles


@dataclass(frozen=True)
class Device:
    """One GPU, as its vendor's datasheet states it."""

    name: str
    memory: int
    """Bytes."""
    flops: float
    """Dense bfloat16, a second."""
    bandwidth: float
    """Bytes of its memory a second."""
    link: float
    """Bytes a second to the other GPUs of the node, one direction."""
    host_link: float
    """Bytes a second to the host, one direction."""
    source: str


DEVICES = {
    d.name: d
    for d in (
        Device("a100-80g", 80 * GiB, 312e12, 2.039e12, 300e9, 32e9, "NVIDIA A100 80GB SXM datasheet"),
        Device("h100", 80 * GiB, 989e12, 3.35e12, 450e9, 64e9, "NVIDIA H100 SXM datasheet"),
        Device("h200", 141 * GiB, 989e12, 4.8e12, 450e9, 64e9, "NVIDIA H200 SXM datasheet"),
        Device("mi300x", 192 * GiB, 1307e12, 5.3e12, 448e9, 64e9, "AMD Instinct MI300X datasheet"),
    )
}
FP32_SHARE = 0.5
"""float32 runs on TF32 units at half the bfloat16 rate where the user allows TF32, else far slower."""


@dataclass(frozen=True)
class Assumptions:
    """What no datasheet says. Change them by the flags of the same name."""

    train_efficiency: float = 0.45
    """Share of peak FLOPs that forward and backward reach."""
    forward_efficiency: float = 0.5
    """Share of peak FLOPs that prefill and scoring reach."""
    bandwidth_efficiency: float = 0.7
    """Share of peak memory bandwidth that a decode step reaches."""
    link_efficiency: float = 0.7
    """Share of link bandwidth that collectives reach."""
    launch_seconds: float = 0.00002
    """What a block of a decode step takes beside its bytes and FLOPs, replayed from CUDA graphs; launched op by op it
    was 25 times that on an H200's host."""
    node_link: float = 25e9
    """Bytes a second between nodes, one direction and GPU."""
    host_bandwidth: float = 200e9
    """Bytes a second of a node's memory, which an offloaded optimiser is bound by."""
    disk: float = 2e9
    """Bytes a second that the file system of runs and models reads or writes, for all ranks together; `ppomax doctor`
    measures it."""
    hash_rate: float = 1.3e9
    """Bytes a second of SHA-256 on one core, as measured on a Xeon (family 6, model 207) under Python 3.11."""
    start_seconds: float = 20.0
    """From a launcher's start to a process's first file: Python, libraries, the ranks' meeting."""


def seconds(job: Job, device: Device, assumed: Assumptions | None = None) -> dict[str, float]:
    """Phase -> seconds of one iteration (one buffer, all its epochs; alone, one optimiser step)."""
    assumed = assumed or Assumptions()
    if job.width == 4:
        device = replace(device, flops=device.flops * FP32_SHARE)
    parts = {r.name: r for r in roles(job)}
    if job.alone:
        return {"update": _update(job, parts, device, assumed), "step": _step(job, parts, device, assumed)}
    return {
        "rollout": _rollout(job, parts["policy"], device, assumed),
        "scoring": _scoring(job, parts, device, assumed),
        "update": _update(job, parts, device, assumed),
        "step": _step(job, parts, device, assumed),
    }


def tokens_per_second(job: Job, times: dict[str, float]) -> dict[str, float]:
    """Prompt and response tokens over all ranks a second, of each phase and of the whole."""
    tokens = job.rollout_size * job.mean_length
    return {phase: tokens / t for phase, t in [*times.items(), ("whole", sum(times.values()))] if t}


def forward_flops(role: Role, length: float) -> float:
    """FLOPs of one token's forward."""
    c = role.sizes
    dense = c.params - (0 if c.tied else c.embedding)
    return 2.0 * dense + 2.0 * c.layers * c.hidden * length


def _rollout(job: Job, policy: Role, device: Device, assumed: Assumptions) -> float:
    slots = min(job.slots, job.sequences)
    steps = job.sequences * job.response_tokens / slots
    flops = forward_flops(policy, job.mean_length)
    prefill = job.sequences * job.mean_prompt * flops / (device.flops * assumed.forward_efficiency)
    c = policy.sizes
    read = (c.params - (0 if c.tied else c.embedding)) * job.width
    if job.frozen_bits is not None:  # codes are read and weights written, which are read then
        read += int(in_bits(job, policy) * (job.frozen_bits / 8 + job.width))
    cache = slots * (job.mean_prompt + job.response_tokens / 2) * c.kv_token * job.width
    memory = (read + cache) / (device.bandwidth * assumed.bandwidth_efficiency)
    math = slots * flops / (device.flops * assumed.forward_efficiency)
    gather = _collective(job, c.params * job.width, device, assumed) if job.zero_stage == 3 else 0.0
    return prefill + steps * (max(memory, math) + c.layers * assumed.launch_seconds) + gather


def _scoring(job: Job, parts: dict[str, Role], device: Device, assumed: Assumptions) -> float:
    share = job.trained_layers / parts["policy"].sizes.layers
    on_trunk = {"policy", "reference"} | ({"critic"} if job.critic is None else set())
    total = 0.0
    for name, role in parts.items():
        part = share if job.train == "hydra" and name in on_trunk else 1.0
        total += part * forward_flops(role, job.mean_length)
    compute = job.sequences * job.mean_length * total / (device.flops * assumed.forward_efficiency)
    return compute + _gathers(job, sum(r.elements for n, r in parts.items() if n != "policy"), 1, 1, device, assumed)


def _update(job: Job, parts: dict[str, Role], device: Device, assumed: Assumptions) -> float:
    total, again = 0.0, int(job.gradient_checkpointing)
    for name, role in parts.items():
        if not role.trained:
            continue
        adapted = job.train == "lora" if name == "policy" else job.low_rank_critic
        branch = (job.train == "hydra") if name == "policy" else job.critic is None
        share = job.trained_layers / role.sizes.layers if branch else 1.0
        total += share * ((2 if adapted else 3) + again) * forward_flops(role, job.mean_length)
    texts = (3 + again) * forward_flops(parts["policy"], job.ptx_tokens) * job.ptx_batch * job.ptx_tokens / job.ranks
    steps = -(-job.rollout_size // job.minibatch_size)
    compute = (job.sequences * job.mean_length * total + steps * texts) * job.epochs
    gathers = _gathers(job, sum(r.elements for r in parts.values() if r.trained), 2, job.epochs, device, assumed)
    reduced = sum(r.trained for r in parts.values()) * job.width
    reduce = _collective(job, reduced * (1 if (job.zero_stage or 0) >= 2 else 2), device, assumed)
    return compute / (device.flops * assumed.train_efficiency) + gathers + job.epochs * steps * reduce


def _step(job: Job, parts: dict[str, Role], device: Device, assumed: Assumptions) -> float:
    """AdamW reads and writes three fp32 numbers, reads a gradient and writes a weight: 28 bytes a parameter."""
    steps = job.epochs * -(-job.rollout_size // job.minibatch_size)
    trained = sum(r.trained for r in parts.values())
    mine = trained / (job.ranks if job.zero_stage else 1)
    if not job.offload_optimizer:
        return steps * 28 * mine / (device.bandwidth * assumed.bandwidth_efficiency)
    local = min(job.ranks, job.ranks_per_node)
    host = 28 * mine * local / (assumed.host_bandwidth * assumed.bandwidth_efficiency)
    moved = 2 * job.width * mine / (device.host_link * assumed.link_efficiency)
    return steps * (host + moved)


def _gathers(job: Job, elements: int, times: int, epochs: int, device: Device, assumed: Assumptions) -> float:
    """ZeRO-3 brings the weights together `times` a micro-batch."""
    if job.zero_stage != 3:
        return 0.0
    micros = -(-job.sequences // micro_batch(job)[0]) * epochs
    size = elements * job.width
    from_host = size / job.ranks / (device.host_link * assumed.link_efficiency) if job.offload_param else 0.0
    return micros * times * (_collective(job, size, device, assumed) + from_host)


def _collective(job: Job, size: float, device: Device, assumed: Assumptions) -> float:
    """Seconds in which each rank receives the others' parts of `size` bytes."""
    if job.ranks == 1:
        return 0.0
    link = device.link if job.ranks <= job.ranks_per_node else min(device.link, assumed.node_link)
    return size * (job.ranks - 1) / job.ranks / (link * assumed.link_efficiency)
