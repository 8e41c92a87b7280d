"""Bytes of a run on one rank, by kind and phase: a pure function of a `Job`.

    weights        dtype bytes a parameter; ZeRO-3: / ranks
    gradients      of what is trained; ZeRO-2 and 3: / ranks
    optimiser      AdamW: two fp32 moments, and an fp32 copy where weights are 16 bit (DeepSpeed: always);
                   ZeRO-1 and up: / ranks
    KV cache       slots x (prompt + response) tokens
    activations    trace.held: the trunk's own code, run without data; with gradient checkpointing one block's and
                   the input of each
    logits         one chunk of the fused losses, the fp32 gradient of the head they make, and its input's
    gathered       ZeRO-3: the whole policy while it generates; elsewhere the layers that are in use
Lengths are taken at their limits, so a run whose texts are shorter needs less."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppomax.planning.job import (
    GiB,
    Job,
    Role,
    in_bits,
    micro_batch,
    micro_batches,
    offloaded,
    optimiser_ranks,
    partitioned,
    roles,
)
from ppomax.planning.steady import (
    added,
    checkpoint_copies,
    fullest,
    kept,
    larger,
    masters,
    movable,
    overhead,
    sampler_process,
    second_copies,
    steady,
    weights,
)
from ppomax.planning.trace import Held, cache_bytes, decoded, held, packed_weight_bytes, prefill_tokens, sizes_of

if TYPE_CHECKING:
    from ppomax.rollout.slots import Prompt

DATA_PARALLEL_BUCKET = 1 << 25
"""Elements that ZeRO 0 sums in one float32 message (sharding/plain.py)."""
FRAGMENTATION = 0.05
"""Share of a GPU's allocations lost between blocks: an assumption."""
COPIES_AS_BITS, COPIES_AS_IDS, COPIES_FOR_KL = 6, 2, 5
"""Tensors of a chunk's size that live at once where its logits are worked on in plain torch (recipe/cut.py): with what
a token was drawn from recorded as bits or as ids, and for the KL over all tokens."""
SCRATCH = 4
"""Bytes that a C++ operator takes of its own for a 16-bit logit on a CPU, where torch does not see them."""
HOST_OVERHEAD = 3 * GiB
"""The same on the host beside a GPU, with CUDA libraries: an assumption."""


def device_bytes(job: Job) -> dict[str, dict[str, int]]:
    """Phase -> kind -> bytes that one rank's device holds at that phase's peak."""
    phases = {"load": added(weights(job), masters(job), kept(job), overhead(job))}
    before = {"evaluation": evaluation} if job.alone else {"rollout": rollout, "scoring": scoring}
    for phase, extra in (before | {"update": update, "step": step}).items():
        phases[phase] = added(steady(job, phase), extra(job), made_whole(job))
    copies = checkpoint_copies(job) if job.cpu and job.background_saves else {}
    phases["save"] = added(steady(job, "save"), copies)
    if not job.cpu:
        for kinds in phases.values():
            kinds["overhead"] += int(FRAGMENTATION * (sum(kinds.values()) - kinds["overhead"]))
    return phases


def host_bytes(job: Job) -> dict[str, int]:
    """Kind -> bytes that one node's host memory holds at its fullest; empty on a CPU, where the device is the host."""
    if job.cpu:
        return {}
    local, everyone = min(job.ranks, job.ranks_per_node), roles(job)
    held_there = {"processes": local * HOST_OVERHEAD}
    largest = max(r.elements for r in everyone) * job.width
    loading = {"loading": local * (largest // job.ranks if job.zero_stage == 3 else largest)}
    copies = {"checkpoint copies": local * checkpoint_copies(job)["checkpoint copies"] if job.background_saves else 0}
    held_there |= larger(loading, copies)  # the one at the start, the other later
    if job.sampler_memory is not None:
        held_there["sampler"] = local * (sampler_process(job) + HOST_OVERHEAD)
    there = [r for r in everyone if offloaded(job, r)]
    held_there["weights"] = local * (sum(r.elements for r in there) * job.width // job.ranks)
    held_there["weights"] += local * second_copies(job, there)
    if job.idle_on_host:
        held_there["idle models"] = local * sum(movable(job).values())
    if job.offload_optimizer:
        # fp32 copy, two moments and the fp32 gradient that the host's AdamW reads
        held_there["optimiser"] = local * 16 * sum(r.trained for r in everyone) // optimiser_ranks(job)
    return held_there


# ---- what a phase adds ----------------------------------------------------------------------------------------------


def rollout(job: Job) -> dict[str, int]:
    """KV cache, the prefill's activations, one row of logits a slot, the whole policy under ZeRO-3; or what vLLM takes,
    which on a GPU sleeps after it."""
    policy = sizes_of(job.policy, "causal_lm")
    in_few_bits = in_bits(job, roles(job)[0])  # which are not held a second time
    if job.sampler_memory is not None:
        return {"sampler": 0 if job.cpu else int(job.sampler_memory * job.memory)}
    slots = min(job.slots, job.sequences)
    whole = sum(sorted(job.drawn_prompts(job.sequences))[-slots:])
    at_once = min(whole, max(prefill_tokens(job.cpu), job.prompt_tokens)) + slots
    limits = job.response_tokens, job.cache_tokens
    cache = cache_bytes(job.policy, job.dtype, longest_prompts(job), slots, limits)
    prefill = _held(job, decoded(job.policy), 1, at_once)
    return {
        "KV cache": cache,
        "packed weights": max(0, packed_weight_bytes(job.policy, job.dtype, job.cpu) - in_few_bits * job.width),
        **larger({"activations": prefill.forward}, {"logits": slots * policy.vocab * job.width}),
        "gathered": _gathered_policy(job),
        "trunk states": _trunk_states(job),
        "sets of the cut": _kept_sets(job, job.sequences + slots),
    }


def longest_prompts(job: Job) -> list[Prompt]:
    """The prompts of one rank's buffer as the rollout groups them."""
    from ppomax.rollout.slots import Prompt

    each = min(job.samples_per_prompt, job.sequences)
    lengths = job.drawn_prompts(-(-job.sequences // each))
    return [Prompt([0] * length, list(range(each))) for length in lengths]


def scoring(job: Job) -> dict[str, int]:
    """A forward of each model in turn over one micro-batch; the gathered policy stays for its own."""
    return fullest(_scoring(job, *micro) for micro in micro_batches(job))


def _scoring(job: Job, rows: int, length: int) -> dict[str, int]:
    policy = sizes_of(job.policy, "causal_lm")
    own = [(job.policy, "causal_lm")] + [(c, "scorer") for c in (job.critic, job.reward) if c]
    forwards = [_held(job, config, rows, length).forward for config, _ in own]
    whole = torch_chunk(policy.vocab, job, rows, COPIES_FOR_KL) if job.whole_kl else 0
    logits = max(chunk_bytes(policy.vocab, job, rows), whole) + 2 * _picked(job, rows)
    return {
        **larger({"activations": max(forwards)}, {"logits": logits}),
        "states for the KL": _states_for_kl(job),
        "sets of the cut": _kept_sets(job, job.rollout_size),
        "gathered": _gathered_policy(job) + max(_live_layers(job, r) for r in roles(job) if r.name != "policy"),
        "trunk states": _trunk_states(job),
    }


def evaluation(job: Job) -> dict[str, int]:
    """A forward of the policy, whole, over held-out rows."""
    rows, length = micro_batch(job)
    logits = chunk_bytes(sizes_of(job.policy, "causal_lm").vocab, job, rows) + 2 * _picked(job, rows)
    forward = _held(job, job.policy, rows, length).forward
    return {**larger({"activations": forward}, {"logits": logits}), "gathered": _gathered_policy(job)}


def update(job: Job) -> dict[str, int]:
    """The larger of the policy's and the critic's turn on one micro-batch, gradients of both held; alone, its own."""
    return fullest(_update(job, *micro) for micro in micro_batches(job))


def _update(job: Job, rows: int, length: int) -> dict[str, int]:
    several = job.sequences * min(job.minibatch_size, job.rollout_size) // job.rollout_size > rows
    if job.alone:
        (policy,) = roles(job)
        return added(_policy_turn(job, policy, None, rows, length, several), {"buckets": _passing_buckets(job)})
    policy, critic = (next(r for r in roles(job) if r.name == name) for name in ("policy", "critic"))
    turns = [_policy_turn(job, policy, critic, rows, length, several)]
    if job.ptx_batch:
        at_once = max(1, min(job.ptx_batch, job.micro_tokens // max(1, job.ptx_tokens)))
        turns.append(_policy_turn(job, policy, critic, at_once, job.ptx_tokens, True))
    layers = critic.sizes.layers if job.critic else job.trained_layers
    act = _held(job, job.critic or job.policy, rows, length, layers, job.low_rank_critic)
    before = _gradient(job, policy) + (_gradient(job, critic) if several else 0)
    turns.append(_turn(before, _gradient(job, policy) + _gradient(job, critic), act, {}))
    turns[-1]["gathered"] = _live_layers(job, critic)
    held_on = {"trunk states": _trunk_states(job), "sets of the cut": _kept_sets(job, job.rollout_size)}
    return added(larger(*turns), held_on, {"buckets": _passing_buckets(job)})


def _passing_buckets(job: Job) -> int:
    """Flat buffers that gradients are reduced through under ZeRO 1 and 2, one of each engine."""
    engines = sum(r.trained > 0 for r in roles(job))
    return engines * job.bucket * job.width if job.zero_stage in (1, 2) else 0


def _policy_turn(job: Job, policy: Role, critic: Role | None, rows: int, length: int, several: bool) -> dict[str, int]:
    layers = job.trained_layers if job.train == "hydra" else policy.sizes.layers
    act = _held(job, job.policy, rows, length, layers, job.train == "lora")
    others = _gradient(job, critic) if several and critic else 0
    before = others + (_gradient(job, policy) if several else 0)
    head = policy.sizes.head * 4 if job.train == "full" else 0
    loss = {"logits": chunk_bytes(policy.sizes.vocab, job, rows, backward=True) + head + 2 * _picked(job, rows)}
    kinds = _turn(before, others + _gradient(job, policy), act, loss)
    kinds["gathered"] = _live_layers(job, policy)
    return kinds


def _turn(before: int, after: int, act: Held, loss: dict[str, int]) -> dict[str, int]:
    """At the loss (gradients `before`, all activations, the loss's buffers), or at one end of the backward: its start
    (gradients `before`) or its end (gradients `after`)."""
    at_loss = {"gradients": before, "activations": act.saved, **loss}
    begun = {"gradients": before, "activations": act.peak}
    # Without gradients from before, they grow as the activations shrink: never both whole.
    grown = {"gradients": after, "activations": act.peak if before == after else act.peak - act.saved}
    return larger(at_loss, begun, grown)


def step(job: Job) -> dict[str, int]:
    """Gradients of both, and fp32 copies of one model's (16-bit weights, or DeepSpeed's partition of them)."""
    trained = [r for r in roles(job) if r.trained]
    grads = {"gradients": sum(_gradient(job, r) for r in trained)}
    if job.offload_optimizer and not job.cpu:
        return grads
    if job.zero_stage == 0 and job.ranks > 1:
        message = min(DATA_PARALLEL_BUCKET, max(r.trained for r in trained))
        grads["buckets"] = 2 * 4 * message  # float32, its parts and their sum
    if job.width == 2 or job.zero_stage:
        grads["fp32 gradients"] = 4 * max(r.trained for r in trained) // optimiser_ranks(job)
    return grads


# ---- sizes ----------------------------------------------------------------------------------------------------------


def torch_chunk(vocab: int, job: Job, rows: int, copies: int) -> int:
    """Copies of one chunk of float32 logits of so many responses that is worked on in plain torch: where sampling is
    cut or the KL is over all tokens."""
    from ppomax.recipe.cut import CHUNK_BYTES

    return copies * 4 * vocab * min(max(1, CHUNK_BYTES // (4 * vocab)), rows * job.response_tokens)


def chunk_bytes(vocab: int, job: Job, rows: int, *, backward: bool = False) -> int:
    """One chunk of the logits of so many responses, in scoring (on a CPU in float32 a tile of it) or in the fused
    losses; 16-bit chunks on a CPU have an fp32 copy beside them, float32 ones the head's weight, packed. In plain
    torch, where sampling is cut."""
    import torch
    from ppomax_kernels.chunks import blocks, default_chunk, even_chunk

    if job.kept_row:
        whole = job.kept_row == -(-vocab // 8)
        return torch_chunk(vocab, job, rows, COPIES_AS_BITS if whole else COPIES_AS_IDS + backward)
    tokens, columns = rows * job.response_tokens, vocab
    if job.cpu and not backward:
        tokens, columns = blocks(0, tokens, torch.empty(vocab, 0, dtype=getattr(torch, job.dtype)), False)
    else:
        tokens = even_chunk(default_chunk(vocab, "cpu" if job.cpu else "cuda"), tokens, False)
    packed = columns * sizes_of(job.policy, "causal_lm").hidden * job.width if job.cpu and job.width == 4 else 0
    return tokens * columns * (job.width + (SCRATCH if job.cpu and job.width == 2 else 0)) + packed


def _kept_sets(job: Job, sequences: int) -> int:
    """What so many responses' tokens were drawn from."""
    return sequences * job.response_tokens * job.kept_row


def _states_for_kl(job: Job) -> int:
    """The policy's states at this rank's response tokens, until the reference has its own."""
    hidden = sizes_of(job.policy, "causal_lm").hidden
    return job.sequences * job.response_tokens * hidden * job.width if job.whole_kl else 0


def _picked(job: Job, rows: int) -> int:
    """Hidden states of the tokens of so many responses, which the head sees."""
    return rows * job.response_tokens * sizes_of(job.policy, "causal_lm").hidden * job.width


def _gradient(job: Job, role: Role) -> int:
    """What `backward` leaves behind until the step, beside what is always there."""
    if job.zero_stage == 3 or (job.zero_stage == 2 and job.offload_optimizer and not job.cpu):
        return 0
    return role.trained * job.width // (job.ranks if job.zero_stage == 2 else 1)


def _gathered_policy(job: Job) -> int:
    return sizes_of(job.policy, "causal_lm").params * job.width if job.zero_stage == 3 else 0


def _live_layers(job: Job, role: Role) -> int:
    return min(job.live, role.elements) * job.width if partitioned(job, role) else 0


def _trunk_states(job: Job) -> int:
    if job.train != "hydra":
        return 0
    tokens = sum(job.drawn_prompts(job.sequences)) + job.sequences * job.response_tokens
    return tokens * sizes_of(job.policy, "causal_lm").hidden * job.width


def _held(job: Job, config: str, rows: int, length: int, layers: int | None = None, adapted: bool = False) -> Held:
    """`layers` None: all of them."""
    everything = 1 << 30 if layers is None else layers
    targets = job.lora_targets if adapted else None
    fused = job.cpu and job.dtype == "float32" and job.zero_stage != 3
    return held(config, job.dtype, rows, length, everything, targets, job.gradient_checkpointing, fused)


def made_whole(job: Job) -> dict[str, int]:
    """The layer that is multiplied by, where it is stored in few bits; on a CPU int8 is made by way of float32."""
    each = [i * o for r in roles(job) if in_bits(job, r) for _, i, o in r.sizes.linears]
    width = job.width + (4 if job.frozen_bits == 8 and job.cpu else 0)
    return {"a layer made whole": max(each, default=0) * width}
