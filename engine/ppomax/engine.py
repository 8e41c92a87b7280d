"""The object that others embed: rollout -> experience -> update.

    engine = Engine(policy, reference, critic, reward, config)
    metrics, scores = engine.step(prompts)             # or the three by themselves:
    experience = engine.experience(engine.rollout(prompts)); metrics = engine.update(experience)

Holds the two trained models, the frozen ones, and the little state between steps (running moments, KL coefficient,
counters). No global state; two engines in one process do not see each other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppomax.config import PtxConfig, TrainConfig, to_dict
from ppomax.data.encode import prompt_ids
from ppomax.models import load_policy, load_tokenizer, pick_device, set_attention
from ppomax.models.adapter_critic import AnyCritic
from ppomax.models.checks import check_prompts, check_vocabularies, eos_ids_of
from ppomax.models.critic_choice import critic_of
from ppomax.models.fingerprints import fingerprints
from ppomax.models.frozen_bits import place
from ppomax.models.modes import module_of, refresh, set_up, trunk_layers
from ppomax.models.recompute import recompute_blocks
from ppomax.recipe.batch import Experience, Rollout
from ppomax.recipe.exact import exact_rollout
from ppomax.recipe.measures import GivenUp, StepResult, experience_metrics
from ppomax.recipe.moments import RunningMoments
from ppomax.recipe.outside import Outside, Wanted
from ppomax.recipe.reward_sources import ModelOrFunction, SumReward, Weighed, model_path, reward_source
from ppomax.recipe.rewards import (
    KLController,
    advantages_and_returns,
    check_columns,
    judged_by,
    shape_scores,
    spread,
    token_rewards,
)
from ppomax.recipe.rollout import Scorers, rollout
from ppomax.recipe.streams import Purpose, stream
from ppomax.recipe.units import RAW, Units, moved, units_of
from ppomax.recipe.update import Health, NextTexts, update
from ppomax.rollout import RolloutSizes, Sampling
from ppomax.rollout.sampler import Sampler
from ppomax.saving.background import BackgroundWriter, PendingSave
from ppomax.saving.engine_state import Parts, contents, read_state, restore_state, save_state, saved_parts
from ppomax.sharding import Idle, Trained, freeze_model, is_sharded, sharded_reads, train_model

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ModelSource = str | Path | PreTrainedModel
Prompt = Sequence[int] | str | Sequence[Mapping[str, str]]
"""Token ids, text, or a chat: messages with `role` and `content`."""
Columns = Mapping[str, Sequence[Any]] | None
"""Lists of one entry for each prompt, by the names that a reward function asks for."""


class _Models(NamedTuple):
    """The models of an engine as they were read, before anything is frozen or sharded."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    """None: the policy's own start."""
    critic: AnyCritic


class Engine:
    """PPO-max on HF models.

    policy: causal LM, or a path to one; trained in place, as `config.model.train` says. reference: likewise, frozen;
    None: the policy as it is now (copied, or shared where only adapters or top blocks are trained: see modes.py).
    critic: a Critic, a model or path to start one from, or None for what `config.model.critic` says.
    reward: reward model, path to one, f(prompts: list[str], responses: list[str]) -> one number each or a list of one
    for each token, or a list of (weight, one of these) with at most one model, whose scores are added.
    tokenizer: needed for text prompts and function rewards; read from the policy's path if that is one.
    texts: n -> the next n token lists for the ptx term; None leaves the term out and needs `ptx.coef: 0`. config: None
    is the default one, its ptx term left out if there are no texts. sampler: draws the responses, in place of what
    `config.rollout.sampler` says.
    """

    def __init__(
        self,
        policy: ModelSource,
        reference: ModelSource | None,
        critic: ModelSource | AnyCritic | None,
        reward: ModelOrFunction | Weighed,
        config: TrainConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        texts: NextTexts | None = None,
        sampler: Sampler | None = None,
    ):
        self.config = config or TrainConfig(ptx=PtxConfig(coef=0.0 if texts is None else PtxConfig.coef))
        self.device = pick_device(self.config.run.device)
        self.dtype = DTYPES[self.config.model.dtype]
        self.sources = {
            "policy": model_path(policy),
            "reference": model_path(reference) or model_path(policy),
            "reward": model_path(reward),
            "tokenizer": self.config.model.tokenizer or model_path(policy),
        }
        self.texts = texts
        if self.config.ptx.coef and texts is None:
            raise ValueError(
                f"Engine: ptx.coef is {self.config.ptx.coef} but there are no texts for it; pass texts=, or set "
                "ptx.coef: 0"
            )
        models = self._read(policy, reference, critic, reward, tokenizer)
        self._set_up(models)
        self._shard(models)
        self.outside = Outside.of(sampler, models.policy, self.config.rollout)
        self.moments, self.controller, self.health = RunningMoments(), KLController(self.config.kl), Health()
        self.units = RAW if self.critic.module.raw else None
        """Of the critic's values; None: a new head's, which are the first ones that rewards have."""
        self.buffers, self.episodes = 0, 0
        self._announced: tuple[int, str] | None = None
        self._writer = BackgroundWriter()

    def _read(
        self,
        policy: ModelSource,
        reference: ModelSource | None,
        critic: ModelSource | AnyCritic | None,
        reward: Any,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> _Models:
        """All models, whole or in this rank's parts, each on the device; and the tokenizer."""
        zero = sharded_reads(self.config, self.dtype, from_files=self.sources["policy"] is not None)
        lm = self._language_model(policy, zero.policy, trained=True).eval().requires_grad_(True)
        self.tokenizer = tokenizer
        if tokenizer is None and self.sources["tokenizer"]:
            trust = self.config.model.trust_remote_code
            self.tokenizer = load_tokenizer(self.sources["tokenizer"], trust_remote_code=trust)
        found = reward_source(reward, self.config, self.device, self.dtype, self.tokenizer, zero.frozen)
        self.reward, self.reward_model, self._read_by = found
        self.trunk_layers = trunk_layers(lm, self.config.model)
        wanted = self.config.model.critic if critic is None else critic
        parts = (lm, self.reward_model, self.sources, self.trunk_layers)
        value_model = critic_of(wanted, *parts, self.config, self.dtype, zero.critic).to(self.device).eval()
        attends = getattr(value_model, "base", value_model)
        own, its = set_attention(lm, self.config.attention), set_attention(attends, self.config.model.attention)
        log.info("attention of scoring and update: %s", own if own == its else f"{own}, the critic's {its}")
        self.exact = exact_rollout(lm, self.config)
        if reference is None and self.config.model.train == "full" and is_sharded(lm):
            reference = self.sources["policy"]  # parts are read again, not copied
        given = None if reference is None else self._language_model(reference, zero.frozen, trained=False)
        return _Models(lm, given, value_model)

    def _set_up(self, models: _Models) -> None:
        """What is trained of the policy and what the reference then is; and that all models fit each other."""
        self.reference = set_up(models.policy, models.reference, self.config.model, seed=self.config.run.seed)
        if self.config.model.gradient_checkpointing:
            recompute_blocks(models.policy)
            recompute_blocks(models.critic)
        self.eos_ids = eos_ids_of(models.policy, self.tokenizer)
        by_tokens = None if self.config.reward.tokenizer else self.reward_model
        check_vocabularies(models.policy, models.reference, models.critic, by_tokens)
        self.fingerprints = fingerprints(models.policy, models.critic, self.reference, self.reward_model)

    def _shard(self, models: _Models) -> None:
        """Each model over the ranks as `config.sharding` says, the trained ones under their optimisers."""
        config, steps = self.config, self.config.optimizer_steps
        self.policy: Trained[PreTrainedModel] = train_model(models.policy, config.policy_optim, steps, config.sharding)
        self.critic: Trained[Any] = train_model(models.critic, config.critic_optim, steps, config.sharding)
        if isinstance(self.reference, PreTrainedModel):
            self.reference = freeze_model(self.reference, config.sharding)
        if self._read_by is not None and self.reward_model is not None:
            self._read_by.model = freeze_model(self.reward_model, config.sharding)
        between = {"reference": self.reference, "reward": self.reward_model, "critic": self.critic}
        self.idle = Idle(between, self.policy, self.device, config.sharding)

    def rollout(
        self, prompts: Sequence[Prompt], columns: Columns = None, *, following: Sequence[Prompt] | None = None
    ) -> Rollout:
        """One scored response to each prompt (token ids; text or a chat with a tokenizer). Counts the buffer and its
        episodes, which name the random streams of the next ones. following: the prompts of the next buffer, which a
        sampler of its own then draws while this one is trained on."""
        known = check_columns(columns or {}, len(prompts))
        ids = self._ids(prompts)
        uids = range(self.episodes, self.episodes + len(ids))
        self.episodes += len(ids)
        self.buffers += 1
        shuffle = stream(self.config.run.seed, Purpose.MINIBATCHES, self.buffers)
        more = None if following is None else self._ids(following)
        after = None if more is None else (more, list(range(self.episodes, self.episodes + len(more))))
        return replace(self._generate(ids, uids, shuffle, after), columns=known)

    def experience(self, roll: Rollout) -> Experience:
        """Raw scores -> running moments -> shaped scores, values in their units -> token rewards -> advantages and
        returns. Changes nothing of the engine: `update` takes up the moments that these scores lead to."""
        self.idle.work_with("reward")
        parts = self.reward.each(roll) if isinstance(self.reward, SumReward) else {}
        found = self.reward.total(parts, roll) if isinstance(self.reward, SumReward) else self.reward(roll)
        scores = found.total
        moments = self.moments.with_scores(judged_by(found, roll, self.config))
        units = units_of(moments, self.config.reward)
        before, last = self.units or units, roll.last_values
        last = None if last is None else moved(last, before, units)
        roll = replace(roll, values=moved(roll.values, before, units), last_values=last)
        shaped = shape_scores(scores, roll.finished, moments, self.config.reward)
        rewards = token_rewards(shaped, roll, self.controller.coef, self.config.kl.estimator, self.config.impl)
        if found.tokens is not None:
            rewards = spread(rewards, found.tokens, roll, units.std)
        advantages, returns = advantages_and_returns(rewards, roll, self.config.advantage, self.config.impl)
        return Experience(
            rollout=roll,
            scores=scores,
            shaped_scores=shaped,
            rewards=rewards,
            advantages=advantages,
            returns=returns,
            kl_coef=self.controller.coef,
            moments=moments,
            units=units,
            score_parts={name: x.total for name, x in parts.items()},
        )

    def take_up(self, experience: Experience) -> None:
        """The running moments that its scores led to; the critic's values mean from here on what its own do."""
        self.idle.work_with("critic")
        self.moments = experience.moments
        self.critic.module.scale.move(*(self.units or experience.units), *experience.units)
        self.units = experience.units

    def update(self, experience: Experience) -> dict[str, float]:
        """PPO epochs over the buffer, then the KL controller; takes up the experience's moments. Returns metrics;
        Diverged after too many bad steps in a row."""
        self.take_up(experience)
        metrics = update(
            self.policy,
            self.critic,
            experience,
            self.config,
            self.health,
            generator=stream(self.config.run.seed, Purpose.EPOCHS, self.buffers),
            texts=self.texts,
        )
        roll = experience.rollout
        self.controller.update(float((roll.logprobs - roll.ref_logprobs).mean()), len(roll.finished))
        if self.config.kl.refreshes_after(self.buffers):
            refresh(self.policy, self.reference)
        return metrics

    def step(
        self,
        prompts: Sequence[Prompt],
        columns: Columns = None,
        *,
        following: Sequence[Prompt] | None = None,
        go_on: Callable[[], bool] | None = None,
    ) -> StepResult:
        """Rollout, experience and update: one PPO-max iteration. The metrics hold phase times in seconds too.
        following: see `rollout`. go_on: asked before the update; GivenUp if it says no: only counters have moved."""
        times = [time.perf_counter()]
        roll = self.rollout(prompts, columns, following=following)
        times.append(time.perf_counter())
        experience = self.experience(roll)
        metrics = experience_metrics(experience, self.config.impl, self.config.advantage.gamma) | roll.stats
        times.append(time.perf_counter())
        if go_on is not None and not go_on():
            raise GivenUp
        metrics.update(self.update(experience))
        times.append(time.perf_counter())
        names = ("time/rollout", "time/experience", "time/update")
        metrics |= {n: b - a for n, a, b in zip(names, times[:-1], times[1:], strict=True)}
        metrics |= {
            "time/step": times[-1] - times[0],
            "episode": float(self.episodes),
            "val/skipped_total": float(self.health.skipped),
            "perf/tokens_per_second": float(len(roll.states)) / (times[1] - times[0]),
        }
        return StepResult(metrics, experience.scores)

    def preview(self, prompts: Sequence[Prompt], columns: Columns = None) -> tuple[Rollout, Tensor]:
        """Responses and raw scores without leaving a trace: own random streams (the same ones each time), nothing
        counted."""
        known = check_columns(columns or {}, len(prompts))
        ids = self._ids(prompts)
        roll = replace(self._generate(ids, range(-1, -1 - len(ids), -1), None), columns=known)
        self.idle.work_with("reward")
        return roll, self.reward(roll).total

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> Path:
        """Write the whole state to the folder `path`, atomically; `extra` (plain data) is given back by `restore`."""
        return save_state(Path(path), self._parts, self._whole_state(), extra or {})

    def start_save(self, path: str | Path, extra: dict[str, Any] | None = None) -> PendingSave:
        """The same while training goes on: the state is copied to the host now, and the folder is there after
        `PendingSave.finish`. One at a time."""
        return self._writer.start(Path(path), *contents(self._parts, self._whole_state(), extra or {}))

    def restore(self, path: str | Path, *, verified: bool = False) -> dict[str, Any]:
        """Put the state saved in `path` into this engine, to the bit; returns `extra`. Refuses a checkpoint of other
        models, unless config.run.accept_changes. verified: all ranks have just hashed it."""
        state = read_state(Path(path), verified=verified)
        extra = restore_state(Path(path), state, self._parts, self.fingerprints, self.config.run.accept_changes)
        self.set_state(state)
        if self.outside is not None:
            self.outside.restore(state.get("ahead"))
        return extra

    @classmethod
    def load(cls, path: str | Path, **parts: Any) -> Engine:
        """An engine from a folder of `save` alone. `reward=`, `reference=`, `tokenizer=`, `texts=` must be given where
        they were passed as objects, since a checkpoint holds no frozen model and no function."""
        state = read_state(Path(path))
        engine = cls(**saved_parts(Path(path), state, parts))
        engine.sources = state["sources"]
        engine.restore(path, verified=True)
        return engine

    def state(self) -> dict[str, Any]:
        """All that an engine is besides its weights, optimisers and random generators, as plain data: configuration,
        where its models came from, counters, running moments, the KL coefficient."""
        return {
            "config": to_dict(self.config),
            "sources": self.sources,
            "fingerprints": self.fingerprints,
            "buffers": self.buffers,
            "episodes": self.episodes,
            "moments": asdict(self.moments),
            "units": None if self.units is None else list(self.units),
            "critic_scale": vars(self.critic.module.scale),
            "kl_coef": self.controller.coef,
            "skipped": self.health.skipped,
            "skipped_in_a_row": self.health.in_a_row,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Take up counters, running moments and the KL coefficient from what `state` gave; configuration and models
        stay this engine's own."""
        self.buffers, self.episodes = state["buffers"], state["episodes"]
        self.moments = RunningMoments(**state["moments"])
        self.units = None if state["units"] is None else Units(*state["units"])
        vars(self.critic.module.scale).update(state["critic_scale"])
        self.controller.coef = state["kl_coef"]
        self.health.skipped, self.health.in_a_row = state["skipped"], state["skipped_in_a_row"]

    def _whole_state(self) -> dict[str, Any]:
        return self.state() | {"ahead": None if self.outside is None else self.outside.saved()}

    @property
    def _parts(self) -> Parts:
        moving = {"reference": module_of(self.reference)} if self.config.kl.refresh_every else {}
        return Parts({"policy": self.policy, "critic": self.critic}, moving)

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        ids = [prompt_ids(p, self.tokenizer) for p in prompts]
        return check_prompts(ids, self.policy.module, self.config.rollout.max_new_tokens)

    def _generate(
        self, ids: list[list[int]], uids: Sequence[int], generator: torch.Generator | None, following: Any = None
    ) -> Rollout:
        seed, impl = self.config.run.seed, self.config.impl
        sampling = Sampling.of(self.config.rollout, seed=seed, exact=self.exact, impl=impl)
        self.idle.work_with()
        drawn, fetch, began = None, partial(self.idle.work_with, "reference", "critic"), time.perf_counter()
        if self.outside is not None:
            now, ends = (ids, list(uids)), list(self.eos_ids)
            both = [x and Wanted(x[0], x[1], sampling, ends) for x in (now, following)]
            drawn = self.outside.draw(self.policy, *both)
        cost = {} if drawn is None else {"time/drawing": time.perf_counter() - began}
        with self.policy.gathered() as policy:
            roll = rollout(
                Scorers(policy, self.reference, self.critic, self.trunk_layers, drawn, fetch),
                ids,
                uids,
                sampling,
                self.config.batch,
                eos_ids=self.eos_ids,
                generator=generator,
                announce=self._announce,
                last_values=self.config.advantage.bootstrap_truncated,
                whole_kl=self.config.kl.estimator == "vocabulary",
            )
        return replace(roll, stats=roll.stats | cost)

    def _announce(self, sizes: RolloutSizes) -> None:
        """Log what decoding will take, when its slots or its attention are not what they were."""
        kind = (sizes.slots, sizes.attention)
        if kind != self._announced:
            self._announced = kind
            log.info(sizes.sentence())

    def _language_model(self, source: ModelSource, zero: dict[str, Any] | None, trained: bool) -> PreTrainedModel:
        model = load_policy(source, self.dtype, trust_remote_code=self.config.model.trust_remote_code, zero=zero)
        set_attention(place(model, self.device, self.config.model, trained=trained), self.config.attention)
        return model
