"""`ppomax train`: load, pre-train the critic, run PPO-max, keep checkpoints, export the policy.

Everything random is a function of the seed and of counters that checkpoints hold, so a run that was killed and resumed
ends in the same weights, bit for bit, as one that was left alone."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ppomax.config import ConfigError, TrainConfig, save_config, to_dict
from ppomax.data import Text, check_same_vocabulary, load_prompts, load_texts
from ppomax.engine import Engine
from ppomax.launch import settled
from ppomax.models import load_tokenizer
from ppomax.models.modes import start_policy
from ppomax.recipe.rewards import load_function
from ppomax.recipe.rollout import joined
from ppomax.rollout import decode
from ppomax.saving.export_policy import export_policy
from ppomax.saving.folder import CheckpointError, newest, prune
from ppomax.sharding import agree, largest, rank, ranks, share, together
from ppomax.stages.critic import pretrain_critic

log = logging.getLogger(__name__)

Verdict = Literal["stop", "rollback"]


class Monitor(Protocol):
    """Who watches a run. Steps count from 1; critic pre-training reports under step 0."""

    def log(self, step: int, metrics: dict[str, float]) -> Verdict | None:
        """Take one step's metrics. `stop` ends the run here; `rollback` ends it at the newest checkpoint's weights."""

    def scores(self, step: int, scores: list[float]) -> None:
        """Take the raw scores of a step's buffer."""

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Take sample texts: prompt, response, score, length, finished."""

    def close(self) -> None:
        """The run is over, well or not."""


class PlainMonitor:
    """metrics.jsonl, samples.jsonl and a line a step. After a resume, rows of steps that will be done again are
    dropped."""

    def __init__(self, out: Path, steps: int, start: int = 0):
        self.out, self.steps = out, steps
        for name in ("metrics.jsonl", "samples.jsonl"):
            _drop_rows_after(out / name, start)

    def log(self, step: int, metrics: dict[str, float]) -> Verdict | None:
        self._append("metrics.jsonl", {"step": step, **metrics})
        shown = {
            "score": "objective/scores",
            "kl": "objective/kl_per_token",
            "ppl": "rollout/ref_perplexity",
            "len": "rollout/length",
            "ent": "policy/entropy_avg",
            "ev": "val/explained_var",
            "pre_ev": "pretrain/explained_var",
            "s": "time/step",
        }
        figures = "  ".join(f"{name} {metrics[key]:.3g}" for name, key in shown.items() if key in metrics)
        print(f"step {step}/{self.steps}  {figures}", flush=True)
        return None

    def scores(self, step: int, scores: list[float]) -> None:
        pass

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._append("samples.jsonl", {"step": step, **row})

    def close(self) -> None:
        pass

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class NoMonitor:
    """For the ranks but the first: nothing is kept twice."""

    def log(self, step: int, metrics: dict[str, float]) -> Verdict | None:
        return None

    def scores(self, step: int, scores: list[float]) -> None:
        pass

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        pass

    def close(self) -> None:
        pass


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


class Order:
    """An endless order over n items: one seeded permutation after the other. Any stretch can be had from its position
    alone."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed

    def take(self, start: int, count: int) -> list[int]:
        """Items `start` to `start + count`."""
        return [self._permutation(i // self.n)[i % self.n] for i in range(start, start + count)]

    def _permutation(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=shuffle).tolist()
        return self._order


def train_ppo(config: TrainConfig, monitor: Monitor | None = None) -> Path:
    """Run PPO-max as `config` says; returns the run's folder: checkpoints/, policy/ (HF), config.yaml, metrics.jsonl.

    Without a `monitor`, PlainMonitor. SIGTERM or Ctrl-C end the step under way, write a checkpoint and return."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    ranks.start(config.run.device, config.sharding.timeout)
    config = settled(config)
    torch.manual_seed(config.run.seed)
    with together():
        out = run_folder(config) if rank() == 0 else None
    out = agree(out)
    assert out is not None
    run = Run(config, out)
    found = newest(out / "checkpoints") if config.run.resume else None
    if found:
        run.resume(found)
    if rank() == 0:
        save_config(config, out / "config.yaml")
        monitor = monitor or PlainMonitor(out, config.run.steps, run.progress.step)
    else:
        monitor = NoMonitor()
    try:
        with stop_requested() as stop:
            run.pretrain(monitor, stop)
            run.train(monitor, stop)
    finally:
        monitor.close()
    if not run.stopped(stop):
        export_policy(run.engine, out / "policy")
    return out


class Run:
    """An engine with its prompts and its place in the loop."""

    def __init__(self, config: TrainConfig, out: Path):
        self.config, self.out, self.progress = config, out, Progress()
        self.saved_at: tuple[int, int] | None = None
        paths = model_paths(config)
        trust = config.model.trust_remote_code
        self.tokenizer = load_tokenizer(config.model.tokenizer or paths["policy"], trust_remote_code=trust)
        self.prompts, _ = load_prompts(
            paths["prompts"],
            self.tokenizer,
            config.data.max_prompt_tokens,
            column=config.data.prompt_column,
            overlong=config.data.overlong,
        )
        self.fixed = self.prompts[: config.monitor.sample_prompts]
        if config.data.eval_prompts:
            held_out, _ = load_prompts(
                config.data.eval_prompts,
                self.tokenizer,
                config.data.max_prompt_tokens,
                column=config.data.prompt_column,
                overlong=config.data.overlong,
            )
            self.fixed = held_out[: config.monitor.sample_prompts]
        reward = load_function(config.reward.function) if config.reward.function else paths["reward"]
        if not config.reward.function and (Path(paths["reward"]) / "tokenizer_config.json").is_file():
            check_same_vocabulary(self.tokenizer, load_tokenizer(paths["reward"], trust_remote_code=trust))
        critic = None if config.model.critic in ("reward_model", "policy", "trunk") else config.model.critic
        self.engine = Engine(
            paths["policy"],
            config.model.reference,
            critic,
            reward,
            config,
            tokenizer=self.tokenizer,
            texts=self.next_texts if config.ptx.coef else None,
        )
        self.order = Order(len(self.prompts), config.run.seed)
        self.texts = self._load_texts() if config.ptx.coef else []
        self.text_order = Order(max(1, len(self.texts)), config.run.seed + 1)

    def next_prompts(self) -> list[list[int]]:
        """The prompts of the next buffer, each as often as it is sampled."""
        each = self.config.rollout.samples_per_prompt
        count = self.config.batch.rollout_size // each
        drawn = self.order.take(self.progress.prompts_drawn, count)
        self.progress.prompts_drawn += count
        return [self.prompts[i] for i in drawn for _ in range(each)]

    def next_texts(self, count: int) -> list[Text]:
        """The next ptx texts."""
        drawn = self.text_order.take(self.progress.texts_drawn, count)
        self.progress.texts_drawn += count
        return [self.texts[i] for i in drawn]

    def pretrain(self, monitor: Monitor, stop: threading.Event) -> None:
        """Critic pre-training until the critic is good enough or its buffers are used up."""
        limit, every = self.config.critic.pretrain_steps, self.config.run.checkpoint_every
        while not self.progress.critic_ready and self.progress.pretrained < limit and not self.stopped(stop):
            began = time.perf_counter()
            metrics, self.progress.critic_ready = pretrain_critic(self.engine, self.next_prompts())
            self.progress.pretrained += 1
            monitor.log(
                0, {**metrics, "pretrain/buffers": self.progress.pretrained, "time/step": time.perf_counter() - began}
            )
            if every and self.progress.pretrained % every == 0:
                self.save()

    def train(self, monitor: Monitor, stop: threading.Event) -> None:
        """PPO steps until the last one, a signal, or the monitor's verdict; ends on a checkpoint."""
        progress, run, every = self.progress, self.config.run, self.config.monitor.samples_every
        if every and progress.step == 0 and not self.stopped(stop):
            monitor.samples(0, self.sample_rows())
        verdict = None
        while progress.step < run.steps and verdict is None and not self.stopped(stop):
            metrics = self.engine.step(self.next_prompts())
            progress.step += 1
            verdict = agree(monitor.log(progress.step, metrics))
            if self.engine.last_scores is not None:
                monitor.scores(progress.step, self.engine.last_scores.tolist())
            if every and (progress.step % every == 0 or progress.step == run.steps):
                monitor.samples(progress.step, self.sample_rows())
            if verdict == "rollback":
                self._roll_back()
            elif run.checkpoint_every and progress.step % run.checkpoint_every == 0:
                self.save()
        if self.saved_at != (progress.pretrained, progress.step):
            self.save()
        if stop.is_set():
            log.warning(
                "stopped by a signal after step %d; checkpoint written, go on with run.resume=true", progress.step
            )

    def stopped(self, stop: threading.Event) -> bool:
        """Whether a signal asked any rank to stop; then all of them do, at the same step."""
        if largest(torch.tensor(float(stop.is_set()), device=self.engine.device)):
            stop.set()
        return stop.is_set()

    def save(self) -> Path:
        """A checkpoint of now, older ones pruned."""
        name = f"step-{self.progress.step:06d}"
        if not self.progress.step:
            name += f"-critic-{self.progress.pretrained:03d}"
        path = self.engine.save(self.out / "checkpoints" / name, {"progress": asdict(self.progress)})
        prune(self.out / "checkpoints", self.config.run.keep_checkpoints)
        self.saved_at = (self.progress.pretrained, self.progress.step)
        return path

    def resume(self, path: Path) -> None:
        """Go on from the checkpoint `path`; knobs that differ from those it was saved with are named in the log."""
        self.progress = Progress(**self.engine.restore(path)["progress"])
        self.saved_at = (self.progress.pretrained, self.progress.step)
        saved = json.loads((path / "engine.json").read_text(encoding="utf-8"))["config"]
        for knob in differences(saved, to_dict(self.config)):
            if not knob.startswith(("run.resume", "run.out")):
                log.warning("resumed with another %s than %s was saved with", knob, path.name)
        log.info("resumed from %s at step %d", path, self.progress.step)

    def sample_rows(self) -> list[dict[str, Any]]:
        """Responses to the fixed prompts, from the same random streams each time."""
        roll, scores = self.engine.preview(self.fixed)
        return [
            {
                "prompt": self.tokenizer.decode(p, skip_special_tokens=True),
                "response": self.tokenizer.decode(r, skip_special_tokens=True),
                "score": score,
                "length": len(r),
                "finished": done,
            }
            for (p, r), score, done in zip(roll.sequences(), scores.tolist(), roll.finished.tolist(), strict=True)
        ]

    def _roll_back(self) -> None:
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
        prompts = [self.prompts[i % len(self.prompts)] for i in range(ptx.pool)]
        uids = range(-1_000_000, -1_000_000 - ptx.pool, -1)
        mine = share(ptx.pool)
        with start_policy(self.engine.policy, self.engine.reference) as start:
            given = decode(
                start,
                [prompts[i] for i in mine],
                [uids[i] for i in mine],
                eos_ids=self.engine.eos_ids,
                seed=config.run.seed,
                max_new_tokens=config.rollout.max_new_tokens,
                slots=config.rollout.slots,
                cache_tokens=config.rollout.cache_tokens,
                impl=config.impl,
            )
            given = joined(given, start)
        return [Text(list(p) + r, len(p)) for p, r in zip(prompts, given.tokens, strict=True)]


def model_paths(config: TrainConfig) -> dict[str, str]:
    """Policy, reward model and prompts of a run, the shipped ones where none is named; ConfigError if one is
    missing."""
    model = config.model
    if model.policy is None:
        from ppomax.assets import default_assets

        shipped = default_assets()
        return {
            "policy": str(shipped / "policy"),
            "reward": model.reward_model or str(shipped / "reward_model"),
            "prompts": config.data.prompts or str(shipped / "prompts.jsonl"),
        }
    if model.reward_model is None and config.reward.function is None:
        raise ConfigError("config: model.policy is set, so model.reward_model or reward.function must be too")
    if config.data.prompts is None:
        raise ConfigError("config: model.policy is set, so data.prompts must be too")
    return {"policy": model.policy, "reward": model.reward_model or "", "prompts": config.data.prompts}


def run_folder(config: TrainConfig) -> Path:
    """The run's folder, made if need be. ConfigError if it holds another run and `run.resume` is off."""
    out = Path(config.run.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if not config.run.resume and (out / "checkpoints").is_dir() and any((out / "checkpoints").iterdir()):
        raise ConfigError(
            f"config: run.out={out} holds checkpoints of a run; set run.resume=true to go on with it, or another "
            "run.out"
        )
    out.mkdir(parents=True, exist_ok=True)
    return out


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set; a second Ctrl-C interrupts at once. Outside the main thread no signal is
    taken."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        log.warning("%s: will stop after this step and write a checkpoint", signal.Signals(number).name)

    before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _drop_rows_after(path: Path, step: int) -> None:
    """Keep the rows of `path` up to `step`; a line cut short by a kill is dropped too."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
