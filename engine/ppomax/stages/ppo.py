"""`ppomax train`: load, pre-train the critic, run PPO-max, keep checkpoints, export the policy.

Everything random is a function of the seed and of counters that checkpoints hold, so a run that was killed and resumed
ends in the same weights, bit for bit, as one that was left alone."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ppomax.assets import named_model
from ppomax.assets.sources import run_sources
from ppomax.config import ConfigError, TrainConfig, save_config, to_dict
from ppomax.data import PromptRow, Text, check_same_vocabulary, load_prompt_rows, load_texts
from ppomax.engine import Engine, GivenUp, StepResult
from ppomax.models import load_tokenizer, use_threads
from ppomax.models.fingerprints import fingerprint_rows
from ppomax.models.modes import start_policy
from ppomax.recipe.reward_sources import named_rewards
from ppomax.recipe.streams import Purpose
from ppomax.reporting.about import note_start
from ppomax.reporting.heartbeat import last_beat
from ppomax.reporting.monitor import RunMonitor
from ppomax.reporting.monitors import Halt, Monitor, NoMonitor
from ppomax.rollout import Sampling, decode
from ppomax.rollout.joined import joined
from ppomax.saving.background import Checkpoints
from ppomax.saving.engine_state import compare_fingerprints
from ppomax.saving.export_policy import export_policy
from ppomax.saving.folder import CheckpointError, clean, newest, read_manifest
from ppomax.saving.lock import claimed
from ppomax.saving.random_state import python_random_state, random_state, restore_random_state, seed_all
from ppomax.sharding import ranks
from ppomax.sharding.settle import agreed_config, agreed_rows
from ppomax.stages.held_out import Given, HeldOut, judge_function, judge_name, sentence
from ppomax.stages.order import Order
from ppomax.stages.pretrain_critic import pretrain_critic
from ppomax.stages.signals import STOP, Stopped, StopRequest, stop_requests

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where the loop is; travels in each checkpoint."""

    step: int = 0
    """PPO steps done."""
    pretrained: int = 0
    """Buffers that the critic was pre-trained on."""
    critic_ready: bool = False
    """Pre-training is over."""
    prompts_drawn: int = 0
    """Position in the endless prompt order."""
    texts_drawn: int = 0
    """Position in the endless order of ptx texts."""
    eval_start: list[float] = field(default_factory=list)
    """The start policy's scores of the held-out prompts."""


def train_ppo(config: TrainConfig, monitor: Monitor | None = None) -> Path:
    """Run PPO-max as `config` says; returns the run's folder: checkpoints/, policy/ (HF), config.yaml, metrics.jsonl.

    Without a `monitor`, a RunMonitor. SIGTERM or Ctrl-C end the step under way, write a checkpoint and raise Stopped,
    unless that was the last step. ConfigError if another process writes in that folder."""
    use_threads(config.run.threads)
    ranks.start(config.run.device, config.sharding.timeout)
    config = agreed_config(config)
    seed_all(config.run.seed)
    with ExitStack() as held:
        with ranks.fail_together():
            out = run_folder(config, held) if ranks.rank() == 0 else None
        out = ranks.broadcast(out)
        assert out is not None
        began = time.perf_counter()
        loop = PpoLoop(config, out)
        loop.loading = time.perf_counter() - began
        ranks.wait_at_most(config.sharding.timeout)
        found = newest(out / "checkpoints") if config.run.resume else None
        if found:
            loop.resume(found)
            clean(out / "checkpoints")
        else:
            seed_all(config.run.seed)  # what was imported on the way may have drawn numbers
        if ranks.rank() == 0:
            (out / STOP).unlink(missing_ok=True)
            save_config(config, out / "config.yaml")
            note_start(out, ranks.world_size())
            monitor = monitor or RunMonitor(out, config)
        else:
            monitor = NoMonitor()
        try:
            with stop_requests() as stop:
                loop.pretrain(monitor, stop)
                loop.train(monitor, stop)
        finally:
            monitor.close()
            if ranks.world_size() == 1:  # else the others may be gone
                loop.checkpoints.finish()
        step = loop.progress.step
        if loop.stopped(stop) and step < config.run.steps:
            raise Stopped(stop.signal, f"stopped after step {step}; checkpoint written, go on with run.resume=true")
        export_policy(loop.engine, out / "policy")
    return out


class PpoLoop:
    """An engine with its prompts and its place in the loop."""

    def __init__(self, config: TrainConfig, out: Path):
        self.config, self.out, self.progress = config, out, Progress()
        self.saved_at: tuple[int, int] | None = None
        self.update_seconds = math.inf
        """What the last update took."""
        self.loading = 0.0
        """Seconds that models and rows took to be read."""
        self.back: str | None = None
        """What a resumed run says once its first step is done: what came before that, and how long it took."""
        sources = run_sources(config)
        trust = config.model.trust_remote_code
        self.tokenizer = load_tokenizer(config.model.tokenizer or sources.policy, trust_remote_code=trust)
        rows = self._load_prompts(sources.prompts)
        shown = self._load_prompts(sources.eval_prompts) if sources.eval_prompts else rows
        reward, functions = named_rewards(config.reward, sources.reward_model)
        self.evaluates = bool(config.monitor.eval_prompts and (sources.eval_prompts or config.monitor.eval_every))
        self.judge_name = judge_name(config.monitor.eval_judge, sources.eval_prompts)
        judge = judge_function(self.judge_name, self.tokenizer) if self.evaluates else None
        self.given = Given.of(rows, *functions)
        self.fixed = Given.of(shown[: config.monitor.sample_prompts], *functions)
        self.judged = Given.of(shown[: config.monitor.eval_prompts], *functions, judge)
        by_tokens = bool(sources.reward_model) and config.reward.tokenizer is None
        if by_tokens and (Path(sources.reward_model) / "tokenizer_config.json").is_file():
            check_same_vocabulary(self.tokenizer, load_tokenizer(sources.reward_model, trust_remote_code=trust))
        critic = None if config.model.critic in ("reward_model", "policy", "trunk") else config.model.critic
        self.engine = Engine(
            sources.policy,
            config.model.reference and named_model(config.model.reference),
            critic,
            reward,
            config,
            tokenizer=self.tokenizer,
            texts=self.next_texts if config.ptx.coef else None,
        )
        self.order = Order(len(self.given.prompts), config.run.seed)
        self.texts = self._load_texts() if config.ptx.coef else []
        self.text_order = Order(max(1, len(self.texts)), config.run.seed, Purpose.TEXTS)
        texts = fingerprint_rows(t.tokens for t in self.texts) if config.ptx.texts else None
        self.data = agreed_rows({"prompts": fingerprint_rows(self.given.prompts), "ptx texts": texts})
        self.held_out = HeldOut(self.engine, self.judged, judge, self.progress.eval_start)
        self.checkpoints = Checkpoints(out / "checkpoints", config.run, config.sharding, self.engine.device)

    def _load_prompts(self, source: str) -> list[PromptRow]:
        data = self.config.data
        rows, _ = load_prompt_rows(
            source, self.tokenizer, data.max_prompt_tokens, column=data.prompt_column, overlong=data.overlong
        )
        return rows

    def next_prompts(self) -> Given:
        """The prompts of the next buffer, each as often as it is sampled, with their columns."""
        each = self.config.rollout.samples_per_prompt
        count = self.config.batch.rollout_size // each
        drawn = self.order.take(self.progress.prompts_drawn, count)
        self.progress.prompts_drawn += count
        return self.given.at([i for i in drawn for _ in range(each)])

    def next_texts(self, count: int) -> list[Text]:
        """The next ptx texts."""
        drawn = self.text_order.take(self.progress.texts_drawn, count)
        self.progress.texts_drawn += count
        return [self.texts[i] for i in drawn]

    def pretrain(self, monitor: Monitor, stop: StopRequest) -> None:
        """Critic pre-training until the critic is good enough or its buffers are used up."""
        limit, every = self.config.critic.pretrain_steps, self.config.run.checkpoint_every
        while not self.progress.critic_ready and self.progress.pretrained < limit and not self.stopped(stop):
            began = time.perf_counter()
            metrics, self.progress.critic_ready = pretrain_critic(self.engine, *self.next_prompts())
            self.progress.pretrained += 1
            monitor.log(
                0, {**metrics, "pretrain/buffers": self.progress.pretrained, "time/step": time.perf_counter() - began}
            )
            if every and self.progress.pretrained % every == 0:
                self.save()
            self.checkpoints.finish(only_if_ready=True)

    def train(self, monitor: Monitor, stop: StopRequest) -> None:
        """PPO steps until the last one, a signal, or the monitor's halt; ends on a checkpoint."""
        progress, run, every = self.progress, self.config.run, self.config.monitor.samples_every
        if every and progress.step == 0 and not self.stopped(stop):
            monitor.samples(0, self.sample_rows())
        if self.evaluates and progress.step == 0 and not self.stopped(stop):
            self.held_out.metrics()
        halt: Halt | None = None
        while progress.step < run.steps and halt is None and not self.stopped(stop):
            try:
                metrics, scores = self._step(stop)
            except GivenUp:
                log.warning("step %d was given up: its update would not end within run.grace", progress.step + 1)
                break
            progress.step += 1
            self._say_back(metrics["time/step"])
            metrics |= self._evaluated()
            halt = ranks.broadcast(monitor.log(progress.step, metrics))
            monitor.scores(progress.step, scores.tolist())
            if every and (progress.step % every == 0 or progress.step == run.steps):
                monitor.samples(progress.step, self.sample_rows())
            if halt == "rollback":
                self._roll_back()
            elif run.checkpoint_every and progress.step % run.checkpoint_every == 0:
                self.save()
            self.checkpoints.finish(only_if_ready=True)
        if self.saved_at != (progress.pretrained, progress.step):
            self.save()
        self.checkpoints.finish()

    def _say_back(self, seconds: float) -> None:
        """Log how long it took from the last sign of life of the run before until the first step of this one is done;
        `seconds`: of that step."""
        if self.back is not None and ranks.rank() == 0:
            beat = last_beat(self.out)
            since = f"{time.time() - beat:.3g} s after the run's last heartbeat: " if beat is not None else ""
            log.info("first step after resuming is done, %s%s, step %.3g s", since, self.back, seconds)
        self.back = None

    def _step(self, stop: StopRequest) -> StepResult:
        """One step of the engine. GivenUp: there is no time for its update, and nothing is left of it."""
        if self.config.run.grace is None:
            prompts, columns = self.next_prompts()
            return self.engine.step(prompts, columns, following=self._following())
        state, drawn = self.engine.state(), self.progress.prompts_drawn
        generators = random_state(), python_random_state()
        try:
            done = self.engine.step(*self.next_prompts(), go_on=lambda: not self._too_late(stop))
        except GivenUp:
            self.engine.set_state(state)
            self.progress.prompts_drawn = drawn
            restore_random_state(*generators)
            raise
        self.update_seconds = done.metrics["time/update"]
        return done

    def _following(self) -> list[list[int]] | None:
        """The prompts of the next buffer, if it is to be drawn while this one is trained on."""
        if not self.config.rollout.ahead or self.progress.step + 1 >= self.config.run.steps:
            return None
        drawn = self.progress.prompts_drawn
        prompts, _ = self.next_prompts()
        self.progress.prompts_drawn = drawn
        return prompts

    def _too_late(self, stop: StopRequest) -> bool:
        """Whether, after a signal, an update and a checkpoint as long as the last ones would overrun `run.grace` on any
        rank."""
        if not self.stopped(stop):
            return False
        need = stop.seconds + self.update_seconds + self.checkpoints.seconds
        late = need > (self.config.run.grace or math.inf)
        return bool(ranks.max(torch.tensor(float(late), device=self.engine.device)))

    def stopped(self, stop: StopRequest) -> bool:
        """Whether all ranks are to stop."""
        return stop.agreed(self.out, self.engine.device)

    def save(self) -> None:
        """A checkpoint of now."""
        name = f"step-{self.progress.step:06d}"
        if not self.progress.step:
            name += f"-critic-{self.progress.pretrained:03d}"
        extra = {"progress": asdict(self.progress), "data": self.data}
        self.checkpoints.save(
            name, lambda path: self.engine.save(path, extra), lambda path: self.engine.start_save(path, extra)
        )
        self.saved_at = (self.progress.pretrained, self.progress.step)

    def resume(self, path: Path) -> None:
        """Go on from the checkpoint `path`; knobs that differ from those it was saved with are named in the log."""
        began = time.perf_counter()
        extra = self.engine.restore(path, verified=True)
        seconds, size = time.perf_counter() - began, sum(n for _, n, _ in read_manifest(path))
        self.back = (
            f"models and rows {self.loading:.3g} s, checkpoint {size / 1e9:.3g} GB in {seconds:.2g} s "
            f"({size / 1e9 / seconds:.2g} GB/s)"
        )
        compare_fingerprints(extra["data"], self.data, path, self.config.run.accept_changes)
        self.progress = Progress(**extra["progress"])
        self.held_out.start = self.progress.eval_start
        self.saved_at = (self.progress.pretrained, self.progress.step)
        saved = json.loads((path / "engine.json").read_text(encoding="utf-8"))["config"]
        for knob in differences(saved, to_dict(self.config)):
            if not knob.startswith(("run.resume", "run.out")):
                log.warning("resumed with another %s than %s was saved with", knob, path.name)
        log.info("resumed from %s at step %d", path, self.progress.step)

    def _evaluated(self) -> dict[str, float]:
        """Metrics of the held-out prompts, if this step is one that asks for them."""
        every, step = self.config.monitor.eval_every, self.progress.step
        due = step == self.config.run.steps or (every and step % every == 0)
        if not (self.evaluates and due and self.held_out.start):  # a run that was begun without has no start's scores
            return {}
        found = self.held_out.metrics()
        log.info(sentence(found, self.judge_name, len(self.judged.prompts)))
        return found

    def sample_rows(self) -> list[dict[str, Any]]:
        """Responses to the fixed prompts, from the same random streams each time."""
        roll, scores = self.engine.preview(*self.fixed)
        return [
            {
                "prompt": self.tokenizer.decode(p, skip_special_tokens=True),
                "response": self.tokenizer.decode(r, skip_special_tokens=True),
                "score": score,
                "prompt_ids": p,
                "response_ids": r,
                "length": len(r),
                "finished": done,
            }
            for (p, r), score, done in zip(roll.sequences(), scores.tolist(), roll.finished.tolist(), strict=True)
        ]

    def _roll_back(self) -> None:
        self.checkpoints.finish()
        path = newest(self.out / "checkpoints")
        if path is None:
            raise CheckpointError(
                "the collapse alarm asked for a rollback, but no checkpoint was written yet; lower run.checkpoint_every"
            )
        self.resume(path)

    def _load_texts(self) -> list[Text]:
        ptx, config = self.config.ptx, self.config
        if ptx.texts:
            return load_texts(ptx.texts, self.tokenizer, ptx.max_tokens, overlong="truncate")[0]
        known = self.given.prompts
        prompts = [known[i % len(known)] for i in range(ptx.pool)]
        uids = range(-1_000_000, -1_000_000 - ptx.pool, -1)
        mine = ranks.part_of(ptx.pool)
        self.engine.idle.work_with("reference")
        with start_policy(self.engine.policy, self.engine.reference) as start:
            log.info("sampling %d texts for the ptx term from the start policy", ptx.pool)
            sampling = Sampling.of(config.rollout, seed=config.run.seed, impl=config.impl)
            own, numbers = [prompts[i] for i in mine], [uids[i] for i in mine]
            given = decode(start, own, numbers, sampling, eos_ids=self.engine.eos_ids)
            given = joined(given, start)
        return [Text(list(p) + r, len(p)) for p, r in zip(prompts, given.tokens, strict=True)]


def run_folder(config: TrainConfig, held: ExitStack) -> Path:
    """The run's folder, made if need be, `held` by this process alone; the configuration is the first thing in it.
    ConfigError if it holds another run and `run.resume` is off."""
    out = Path(config.run.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if not config.run.resume and (out / "checkpoints").is_dir() and any((out / "checkpoints").iterdir()):
        raise ConfigError(
            f"config: run.out={out} holds checkpoints of a run; set run.resume=true to go on with it, or another "
            "run.out"
        )
    held.enter_context(claimed(out))
    if not (out / "config.yaml").is_file():
        save_config(config, out / "config.yaml")
    return out


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the knobs in which two configurations differ."""
    out: list[str] = []
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            out += differences(x, y, f"{prefix}{key}.")
        elif x != y:
            out.append(prefix + key)
    return out
