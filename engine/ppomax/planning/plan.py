"""Memory and time of a run on given devices, before it is started.

    plan = make_plan(job_of(config, ranks=8, memory=80 * GiB), DEVICES["a100-80g"])
    plan.fits, plan.peak, plan.advice            which knob to turn, largest saving first
From configurations alone: no weight is read, nothing is downloaded for the models whose shapes ship with ppomax.
trace.py counts models, memory.py bytes, seconds.py seconds; advice.py turns knobs and looks again;
tables.py shows all of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppomax.assets.sources import named_model, named_sources
from ppomax.config import CONFIG_DIR, ConfigError, ModelConfig, ShardingConfig, TrainConfig
from ppomax.config.launcher import local_rank, ranks_on_node, started_ranks
from ppomax.config.stages import RewardModelConfig, SftConfig
from ppomax.planning.advice import Advice, advice_for, most_parameters
from ppomax.planning.job import Job
from ppomax.planning.memory import device_bytes, host_bytes
from ppomax.planning.saves import Saves, saves_of
from ppomax.planning.seconds import Assumptions, Device, seconds, tokens_per_second
from ppomax.planning.trace import packs, sizes_of

AnyConfig = TrainConfig | SftConfig | RewardModelConfig

SHAPE_DIR = CONFIG_DIR / "shapes"
"""`<owner>--<name>.json`: architecture of a hub model that a shipped configuration names."""


@dataclass(frozen=True)
class Plan:
    """What a job needs, and whether it is there."""

    job: Job
    phases: dict[str, dict[str, int]]
    """Phase -> kind -> bytes on one rank's device."""
    host: dict[str, int]
    """Kind -> bytes on one node's host; empty on a CPU."""
    times: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds of one iteration; empty without a device."""
    device: Device | None = None
    assumptions: Assumptions = field(default_factory=Assumptions)
    saves: Saves | None = None
    """What checkpoints take; None without a device."""
    advice: tuple[Advice, ...] = ()
    most_parameters: float | None = None
    """Of a policy that each GPU can hold whole while it decodes; none on a CPU and for a stage that draws nothing."""
    notes: tuple[str, ...] = ()

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Bytes on one rank's device at its fullest."""
        return sum(self.phases[self.peak_phase].values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.job.memory and self.host_fits

    @property
    def host_fits(self) -> bool:
        return sum(self.host.values()) <= self.job.host_memory

    @property
    def tokens_per_second(self) -> dict[str, float]:
        return tokens_per_second(self.job, self.times)


def make_plan(
    job: Job,
    device: Device | None = None,
    assumed: Assumptions | None = None,
    *,
    advise: bool = True,
    notes: tuple[str, ...] = (),
) -> Plan:
    """The plan of `job`; with `advise`, what each knob would save, by planning again with it turned."""
    assumed = assumed or Assumptions()
    phases, host = device_bytes(job), host_bytes(job)
    times = seconds(job, device, assumed) if device else {}
    saves = saves_of(job, device, assumed) if device else None
    plan = Plan(job, phases, host, times, device, assumed, saves, notes=notes)
    if not advise:
        return plan
    whole = None if job.alone or job.cpu else most_parameters(job)
    return replace(plan, advice=advice_for(job), most_parameters=whole)


def refuse_if_too_large(plan: Plan) -> None:
    """ConfigError if the job cannot fit, with the knob that saves most."""
    if plan.fits:
        return
    job, best = plan.job, next(iter(plan.advice or advice_for(plan.job)), None)
    what, need, there = plan.peak_phase, plan.peak, job.memory
    if plan.peak <= job.memory:
        what, need, there = "host memory of a node", sum(plan.host.values()), job.host_memory
    mend = f"; {best.knob} saves {gib(best.saves)}" + (" and makes it fit" if best.fits else "") if best else ""
    raise ConfigError(
        f"config: this run needs {gib(need)} ({what}) and there are {gib(there)}{mend}. `ppomax plan` with the same "
        "flags shows all of it; --run.ignore_plan true starts the run in spite of this"
    )


# ---- from a configuration -------------------------------------------------------------------------------------------


def job_of(
    config: TrainConfig,
    *,
    ranks: int,
    memory: int,
    host_memory: int,
    ranks_per_node: int = 8,
    cpu: bool = False,
) -> tuple[Job, tuple[str, ...]]:
    """The job that `config` describes, and notes on what was assumed. ConfigError: a model's shape cannot be had."""
    model, notes = config.model, []
    policy, reward, *_ = named_sources(config)
    policy_shape = shape_of(policy)
    reward_shape = None
    if reward or not config.reward.terms:
        reward_shape = shape_of(reward) if reward else policy_shape
        if not reward:
            notes.append("model.reward_model is not set: planned as large as the policy")
    critic: str | None = {"reward_model": reward_shape, "policy": policy_shape, "trunk": None}.get(model.critic, "path")
    if critic == "path":
        critic = shape_of(model.critic)
    if model.critic == "reward_model" and critic is None:
        raise ConfigError("config: model.critic is reward_model, but no reward model scores; set model.critic")
    lengths = _prompt_lengths(config, config.model.tokenizer or policy)
    return (
        Job(
            policy=policy_shape,
            critic=critic,
            reward=reward_shape,
            dtype=model.dtype,
            train=model.train,
            trained_layers=model.trained_layers,
            borrowing_critic=model.critic_train == "lora" and model.critic in ("reward_model", "policy"),
            adapted_critic=model.critic_train == "lora" and model.critic not in ("reward_model", "policy"),
            lora_rank=model.lora_rank if "lora" in (model.train, model.critic_train) else 0,
            lora_targets=tuple(model.lora_targets or ()),
            frozen_bits=model.frozen_bits,
            idle_on_host=config.sharding.idle == "host",
            gradient_checkpointing=model.gradient_checkpointing,
            **_sharded(config.sharding, ranks),
            ranks=ranks,
            ranks_per_node=ranks_per_node,
            memory=memory,
            host_memory=host_memory,
            cpu=cpu,
            prompt_tokens=lengths[-1] if lengths else config.data.max_prompt_tokens,
            prompt_lengths=lengths,
            padded=_pads(model, cpu, policy_shape, critic),
            response_tokens=config.rollout.max_new_tokens,
            slots=config.rollout.slots,
            cache_tokens=config.rollout.cache_tokens,
            samples_per_prompt=config.rollout.samples_per_prompt,
            sampler_memory=None if config.rollout.sampler == "builtin" else config.rollout.sampler_memory,
            kept_row=_kept_row(config, policy_shape),
            whole_kl=config.kl.estimator == "vocabulary",
            refreshed=config.kl.refresh_every is not None,
            rollout_size=config.batch.rollout_size,
            minibatch_size=config.batch.minibatch_size,
            epochs=config.batch.epochs,
            background_saves=_in_background(config, cpu),
            micro_tokens=config.batch.micro_tokens,
            ptx_batch=config.ptx.batch_size if config.ptx.coef else 0,
            ptx_tokens=config.ptx.max_tokens,
        ),
        tuple(notes),
    )


PROMPTS = 64 << 20
"""Bytes of a file of prompts that the plan still reads."""


def _prompt_lengths(config: TrainConfig, tokenizer: str | None) -> tuple[int, ...]:
    """Tokens of the prompts, where their file and the tokenizer are at hand; else ()."""
    source = config.data.prompts
    if not (source and Path(source).is_file() and tokenizer and Path(tokenizer).is_dir()):
        return ()
    if Path(source).stat().st_size > PROMPTS:
        return ()
    from ppomax.data.encode import encode_prompt
    from ppomax.data.rows import DataError, read_rows
    from ppomax.models import load_tokenizer

    limit = config.data.max_prompt_tokens
    try:
        made = load_tokenizer(tokenizer, trust_remote_code=config.model.trust_remote_code)
        texts = [row[config.data.prompt_column] for _, row in read_rows(Path(source))]
        lengths = sorted(len(encode_prompt(text, made)) for text in texts)
    except (DataError, OSError, KeyError, TypeError, ValueError):  # who loads them says what is wrong
        return ()
    if config.data.overlong == "drop":
        lengths = [n for n in lengths if n <= limit]
    return tuple(min(n, limit) for n in lengths)


def _kept_row(config: TrainConfig, policy: str) -> int:
    """Bytes of one draw's set."""
    from ppomax.rollout.sampling import Sampling

    cut = Sampling.of(config.rollout, seed=0, impl="auto").cut
    return cut.row_bytes(sizes_of(policy, "causal_lm").vocab) if cut else 0


def _sharded(config: ShardingConfig, ranks: int) -> dict[str, Any]:
    """How the models lie over the ranks, as fields of a Job."""
    from ppomax.sharding import zero_config

    stage, zero = config.zero_stage, zero_config.extra(config).get("zero_optimization", {})
    return {
        "zero_stage": 2 if stage is None and ranks > 1 else stage,
        "offload_optimizer": config.offload_optimizer,
        "offload_param": config.offload_param,
        "frozen": config.frozen,
        "hpz": config.hpz,
        "bucket": int(zero.get("reduce_bucket_size", Job.bucket)),
        "live": int(zero.get("stage3_max_live_parameters", Job.live)),
    }


def _pads(model: ModelConfig, cpu: bool, policy: str, critic: str | None) -> bool:
    """Whether scoring and update pad micro-batches."""
    if model.attention in ("sdpa", "eager") or not cpu:
        return model.attention in ("sdpa", "eager")
    shapes = [(policy, "causal_lm"), *([] if critic is None else [(critic, "scorer")])]
    return not all(packs(shape, kind, model.dtype) for shape, kind in shapes)


def _in_background(config: AnyConfig, cpu: bool) -> bool:
    from ppomax.saving.background import in_background

    return in_background(config.run, config.sharding, gpu=not cpu)


def any_job_of(config: AnyConfig, **where: Any) -> tuple[Job, tuple[str, ...]]:
    """The job of any command that trains."""
    return job_of(config, **where) if isinstance(config, TrainConfig) else stage_job_of(config, **where)


def shape_of(source: str) -> str:
    """The HF configuration of a model folder or hub name, as JSON; those that ship with ppomax need no network."""
    from ppomax.models.files import LoadingError, model_config, read_json

    folder = Path(source)
    shipped = SHAPE_DIR / f"{source.replace('/', '--')}.json"
    if shipped.is_file() and not folder.is_dir():
        return json.dumps(read_json(shipped), sort_keys=True)
    try:
        if folder.is_dir():
            model_config(folder)
            return json.dumps(read_json(folder / "config.json"), sort_keys=True)
        return model_config(source).to_json_string(use_diff=False)  # type: ignore[no-any-return]
    except (OSError, LoadingError) as error:
        raise ConfigError(f"plan: the architecture of {source} cannot be read: {error}") from error


def stage_job_of(
    config: SftConfig | RewardModelConfig,
    *,
    ranks: int,
    memory: int,
    host_memory: int,
    ranks_per_node: int = 8,
    cpu: bool = False,
) -> tuple[Job, tuple[str, ...]]:
    """The job of a stage before PPO, as `job_of`."""
    shape = shape_of(named_model(config.model))
    if isinstance(config, RewardModelConfig) and config.layers is not None:
        shape = json.dumps({**json.loads(shape), "num_hidden_layers": config.layers})
    rows = max(ranks, config.batch_tokens // config.max_tokens)
    return (
        Job(
            policy=shape,
            critic=None,
            reward=None,
            alone=True,
            dtype=config.dtype,
            train=config.train,
            lora_rank=config.lora_rank if config.train == "lora" else 0,
            lora_targets=tuple(config.lora_targets or ()),
            gradient_checkpointing=config.gradient_checkpointing,
            **_sharded(config.sharding, ranks),
            ranks=ranks,
            ranks_per_node=ranks_per_node,
            memory=memory,
            host_memory=host_memory,
            cpu=cpu,
            prompt_tokens=0,
            response_tokens=config.max_tokens,
            rollout_size=rows,
            minibatch_size=rows,
            micro_tokens=config.micro_tokens,
            background_saves=_in_background(config, cpu),
        ),
        ("without float32 activations of autocast",) if config.autocast else (),
    )


def plan_here(config: AnyConfig) -> Plan:
    """The plan of `config` on the machine and the ranks that this process is one of."""
    import torch

    ranks = started_ranks()
    local = ranks_on_node()
    host = free_host_memory()
    cpu = config.run.device == "cpu" or (config.run.device == "auto" and not torch.cuda.is_available())
    memory = host // local if cpu else torch.cuda.get_device_properties(local_rank()).total_memory
    where = {"ranks": ranks, "memory": memory, "host_memory": host, "ranks_per_node": local}
    job, notes = any_job_of(config, **where, cpu=cpu)
    return make_plan(job, advise=False, notes=notes)


def plan_line(config: AnyConfig) -> str:
    """One line about the plan of a run that is about to start here. ConfigError: it cannot fit, and
    `run.ignore_plan` is off."""
    if isinstance(config, TrainConfig) and config.model.trust_remote_code:
        return "plan: none for models that bring code of their own"
    try:
        plan = plan_here(config)
    except ConfigError:
        raise
    except Exception as error:  # an architecture that the estimate cannot run
        words = f"plan: none, the estimate failed ({type(error).__name__}: {' '.join(str(error).split()):.200})"
        if config.run.ignore_plan:
            return words
        raise ConfigError(f"{words}; set run.ignore_plan=true to start without one") from error
    if not config.run.ignore_plan:
        refuse_if_too_large(plan)
    room = gib(plan.job.memory) + (" a rank" if plan.job.ranks > 1 else "")
    return f"plan: {gib(plan.peak)} of {room} at most, in {plan.peak_phase}"


def free_host_memory() -> int:
    """Bytes that new processes can have, without swapping: the system's word, and the control group's limit."""
    available = 1 << 60
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        return available if limit == "max" else min(available, int(limit) - used)
    except OSError:  # no Linux, or no control group: then the first figure, or no limit that could be known
        return available


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
