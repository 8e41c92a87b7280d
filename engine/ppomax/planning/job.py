"""What the memory and the time of a run depend on, and how its models lie over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ppomax.planning.trace import ModelSizes, sizes_of

GiB = 2**30


@dataclass(frozen=True)
class Job:
    """What the memory and the time of a run depend on. `from_config` in plan.py fills it."""

    policy: str
    """HF configuration of the policy, as JSON; `reference`, `critic` and `reward` likewise."""
    critic: str | None
    """None: a branch on the policy's trunk."""
    reward: str | None
    """None: a function."""
    alone: bool = False
    """The policy is all there is, and rows of given text are what it is trained on: a stage before PPO. A row is then
    a response without a prompt, and the batch of a step is the buffer."""
    dtype: str = "bfloat16"
    train: str = "full"
    trained_layers: int = 2
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    adapted_critic: bool = False
    """The critic is trained by adapters too, on frozen weights of its own."""
    borrowing_critic: bool = False
    """The critic is adapters and a head on `critic`'s weights, which another model holds."""
    frozen_bits: int | None = None
    """Of the weights of frozen linear layers in the blocks."""
    idle_on_host: bool = False
    """Reference, reward model and critic lie on the host while a phase does without them."""
    gradient_checkpointing: bool = False
    """Blocks are run again in the backward."""
    zero_stage: int | None = None
    """None: plain torch, one process."""
    offload_optimizer: bool = False
    offload_param: bool = False
    frozen: str = "auto"
    hpz: int = 1
    """Ranks that hold a second copy of the weights among them."""
    bucket: int = 500_000_000
    """Elements of DeepSpeed's reduction bucket (reduce_bucket_size)."""
    live: int = 1_000_000_000
    """Gathered parameters that ZeRO-3 keeps at a time (stage3_max_live_parameters)."""
    ranks: int = 1
    ranks_per_node: int = 8
    memory: int = 80 * GiB
    """Bytes of one device; on a CPU those of the machine."""
    host_memory: int = 1024 * GiB
    """Bytes of a node."""
    cpu: bool = False
    prompt_tokens: int = 512
    prompt_lengths: tuple[int, ...] = ()
    """Of some prompts of the run, ascending, none above `prompt_tokens`. (): unknown, all are taken to be at it."""
    padded: bool = False
    """Scoring and update pad a micro-batch to its longest text."""
    response_tokens: int = 512
    slots: int = 64
    """Sequences decoded together on one rank."""
    cache_tokens: int | None = None
    """Tokens that the KV cache holds. None: what the slots need."""
    samples_per_prompt: int = 1
    sampler_memory: float | None = None
    """Share of a GPU that vLLM takes while it draws. None: our decoder draws."""
    kept_row: int = 0
    """Bytes of what a token was drawn from, where sampling is cut and recorded."""
    whole_kl: bool = False
    """The reward's KL is summed over the vocabulary."""
    refreshed: bool = False
    """Checkpoints hold the reference, which follows the policy."""
    rollout_size: int = 128
    minibatch_size: int = 32
    epochs: int = 1
    micro_tokens: int = 4096
    background_saves: bool = False
    """Checkpoints are written from a copy on the host."""
    ptx_batch: int = 0
    ptx_tokens: int = 0

    @property
    def low_rank_critic(self) -> bool:
        """Whether adapters alone are trained of the critic."""
        return self.adapted_critic or self.borrowing_critic

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 4 if self.dtype == "float32" else 2

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def mean_prompt(self) -> float:
        """Tokens of a prompt in the mean."""
        return sum(self.prompt_lengths) / len(self.prompt_lengths) if self.prompt_lengths else self.prompt_tokens

    @property
    def mean_length(self) -> float:
        """Tokens of a whole text in the mean, its response at the limit."""
        return self.mean_prompt + self.response_tokens

    def drawn_prompts(self, count: int) -> list[int]:
        """Lengths of so many prompts, spread as the known ones are, the longest among them."""
        known = self.prompt_lengths or (self.prompt_tokens,)
        return [known[(2 * i + 1) * len(known) // (2 * count)] for i in range(count - 1)] + [known[-1]]

    @property
    def sequences(self) -> int:
        """Sequences of one rank's buffer."""
        return -(-self.rollout_size // self.ranks)


@dataclass(frozen=True)
class Role:
    """One model as a rank holds it, in elements over all ranks."""

    name: str
    sizes: ModelSizes
    elements: int
    trained: int = 0


def roles(job: Job) -> list[Role]:
    """Policy, reference, critic, reward: what each adds to what is there already."""
    policy = sizes_of(job.policy, "causal_lm")
    top = job.trained_layers * policy.block + policy.hidden
    adapters = policy.adapters(job.lora_rank, job.lora_targets)
    trained = {"full": policy.params, "lora": adapters, "hydra": top}[job.train]
    out = [
        Role("policy", policy, policy.params + (adapters if job.train == "lora" else 0), trained),
    ]
    if job.alone:
        return out
    out += [
        Role("reference", policy, {"full": policy.params, "lora": 0, "hydra": top}[job.train]),
    ]
    if job.critic is None:
        out.append(Role("critic", policy, top + policy.hidden, top + policy.hidden))
    else:
        own = sizes_of(job.critic, "scorer")
        low_rank = own.adapters(job.lora_rank, job.lora_targets)
        if job.borrowing_critic:
            out.append(Role("critic", own, low_rank + own.hidden, low_rank + own.hidden))
        elif job.adapted_critic:
            out.append(Role("critic", own, own.params + low_rank, low_rank))
        else:
            out.append(Role("critic", own, own.params, own.params))
    if job.reward is not None:
        out.append(Role("reward", sizes_of(job.reward, "scorer"), sizes_of(job.reward, "scorer").params))
    return out


def partitioned(job: Job, role: Role) -> bool:
    """Whether the ranks hold a part each, as ZeRO-3 does."""
    if role.trained or job.frozen == "auto":
        return job.zero_stage == 3
    return job.frozen != "whole"


def offloaded(job: Job, role: Role) -> bool:
    """Whether that part lies on the host."""
    return partitioned(job, role) and (job.offload_param or (job.frozen == "offloaded" and not role.trained))


def in_bits(job: Job, role: Role) -> int:
    """Weights of the role's frozen linear layers, where `frozen_bits` stores them; 0 where it does not."""
    if job.frozen_bits is None:
        return 0
    layers = role.sizes.layers
    if role.name == "policy":
        layers = {"full": 0, "lora": layers, "hydra": layers - job.trained_layers}[job.train]
    if (role.name == "reference" and job.train != "full") or (role.name == "critic" and not job.adapted_critic):
        layers = 0
    return layers * sum(i * o for _, i, o in role.sizes.linears)


def optimiser_ranks(job: Job) -> int:
    """How many ranks the optimiser's state lies on."""
    return job.ranks if job.zero_stage else 1


def micro_batch(job: Job) -> tuple[int, int]:
    """(sequences, length) of the micro-batch in which a forward computes most tokens."""
    return max(micro_batches(job), key=lambda micro: micro[0] * micro[1])


def micro_batches(job: Job) -> list[tuple[int, int]]:
    """(sequences, length) of the micro-batches of one rank's part of a minibatch that may hold most: the one with most
    tokens that a forward computes, and the one with most sequences. length: of uneven texts that are not padded, the
    mean."""
    mine = max(1, job.sequences * min(job.minibatch_size, job.rollout_size) // job.rollout_size)
    if not job.prompt_lengths:
        return [(max(1, min(job.micro_tokens // job.length, mine)), job.length)]
    import torch

    from ppomax.recipe.batch import split_minibatches

    lengths = torch.tensor([p + job.response_tokens for p in job.drawn_prompts(mine)])
    (micros,) = split_minibatches(lengths, mine, job.micro_tokens, None, padded=job.padded)
    found = [(len(m), int(lengths[m].max()) if job.padded else -(-int(lengths[m].sum()) // len(m))) for m in micros]
    most = max(found, key=lambda micro: micro[0] * micro[1])
    return list(dict.fromkeys([most, max(found)]))
