"""What is watched while a run goes on: progress line, metrics, TensorBoard, sample texts, scores, the collapse alarm.

    <run>/metrics.jsonl   a row a step, under TRL's names; critic pre-training has step 0
          samples.jsonl   responses to the fixed prompts as training goes on
          scores.jsonl    all raw scores of a step's buffer, at the steps that have samples
          alarms.jsonl    each alarm with its signs
          tensorboard/    the same metrics, under TRL's names and verl's
A resumed run appends; rows of steps that are done again are cut first, so no step is there twice."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppomax.config import TrainConfig, to_dict
from ppomax.reporting.alarm import CollapseAlarm
from ppomax.reporting.heartbeat import beat
from ppomax.reporting.lines import TimeLeft, plain_line, short
from ppomax.reporting.monitors import Halt
from ppomax.reporting.trackers import Trackers
from ppomax.saving.jsonl import append_row, keep_rows

log = logging.getLogger(__name__)

METRICS, SAMPLES, SCORES, ALARMS = "metrics.jsonl", "samples.jsonl", "scores.jsonl", "alarms.jsonl"

VERL_NAMES = {
    "loss/policy_avg": "actor/pg_loss",
    "policy/clipfrac_avg": "actor/pg_clipfrac",
    "policy/approxkl_avg": "actor/ppo_kl",
    "policy/entropy_avg": "actor/entropy",
    "policy/grad_norm": "actor/grad_norm",
    "lr": "actor/lr",
    "policy/dual_clipfrac_avg": "actor/pg_clipfrac_lower",
    "objective/kl_per_token": "actor/reward_kl_penalty",
    "objective/kl_coef": "actor/reward_kl_penalty_coeff",
    "loss/value_avg": "critic/vf_loss",
    "val/clipfrac_avg": "critic/vf_clipfrac",
    "critic/values": "critic/vpred_mean",
    "val/explained_var": "critic/vf_explained_var",
    "objective/scores": "critic/score/mean",
    "objective/rlhf_reward": "critic/rewards/mean",
    "policy/advantages": "critic/advantages/mean",
    "critic/returns": "critic/returns/mean",
    "rollout/length": "response_length/mean",
    "rollout/length_max": "response_length/max",
    "rollout/truncated": "response_length/clip_ratio",
    "time/rollout": "timing_s/gen",
    "time/update": "timing_s/update",
    "time/step": "timing_s/step",
    "perf/tokens_per_second": "perf/throughput",
}
"""verl's name of a metric where it differs from TRL's, which is the one in metrics.jsonl."""

STABILITY = {
    "score": "objective/scores",
    "kl": "objective/kl_per_token",
    "ppl": "rollout/ref_perplexity",
    "len": "rollout/length",
    "ent": "policy/entropy_avg",
}
"""The progress line: mean raw score, k3 per token, response perplexity under the start model, tokens, nats."""


class RunMonitor:
    """Watches one PPO run in folder `out`; a Monitor. `console`: a rich one; None: standard output."""

    def __init__(self, out: Path, config: TrainConfig, console: Any = None):
        self.out, self.config, self.settings = Path(out), config, config.monitor
        self.alarm = CollapseAlarm(self.settings)
        self.line = progress_line(config.run.steps, config.critic.pretrain_steps, console)
        self.halt: Halt | None = None
        """What the alarm asked for, once it did."""
        self.trackers = Trackers(self.settings.trackers, self.out, to_dict(config))
        self._begun = False
        self._board: Any = None

    def log(self, step: int, metrics: dict[str, float]) -> Halt | None:
        """Take one step's metrics; what the collapse alarm asks for if this step raises it."""
        self._begin(step, metrics.get("pretrain/buffers"))
        append_row(self.out / METRICS, {"step": step, **metrics})
        self._scalars(step, metrics)
        self.trackers.log(step, metrics)
        beat(self.out, step, self.config.run.steps, metrics.get("time/step", 0.0))
        self.line.show(step, metrics)
        if step < 1 or self.settings.alarm == "off" or not self.alarm.update(metrics):
            return None
        self.halt = self._alarm(step)
        return self.halt

    def scores(self, step: int, scores: list[float]) -> None:
        """Take all raw scores of a step's buffer; kept at the steps that have samples, and at the first and last."""
        every = self.settings.samples_every
        if step in (1, self.config.run.steps) or (every and step % every == 0):
            append_row(self.out / SCORES, {"step": step, "scores": [float(f"{s:.5g}") for s in scores]})
            if self.settings.tensorboard:
                import torch

                self._writer(step).add_histogram("objective/scores_histogram", torch.tensor(scores), step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Take sample texts."""
        self._begin(step, None)
        for row in rows:
            append_row(self.out / SAMPLES, {"step": step, **row})
        if self.settings.tensorboard:
            text = "\n\n".join(f"**{row['prompt']}** {row['response']}  _(score {row['score']:.2f})_" for row in rows)
            self._writer(step).add_text("samples", text, step)

    def close(self) -> None:
        """End the progress line and flush TensorBoard."""
        self.line.close()
        if self._board is not None:
            self._board.close()
        self.trackers.close()

    def _begin(self, step: int, buffers: float | None) -> None:
        """Before the first row: cut what an interrupted run left of `step` and later; the alarm sees the rest."""
        if self._begun:
            return
        self._begun = True
        kept = {}
        for name in (METRICS, SAMPLES, SCORES, ALARMS):
            kept[name] = keep_rows(self.out / name, before(step, buffers if name == METRICS else None, name))
        for row in kept[METRICS]:
            if row["step"] >= 1:
                self.alarm.update(row)

    def _alarm(self, step: int) -> Halt | None:
        signs = self.alarm.signs
        append_row(self.out / ALARMS, {"step": step, "action": self.settings.alarm, "signs": [vars(s) for s in signs]})
        answers: dict[str, tuple[str, Halt | None]] = {
            "warn": ("going on", None),
            "stop": ("stopping", "stop"),
            "rollback": ("stopping at the last checkpoint", "rollback"),
        }
        words, halt = answers[self.settings.alarm]
        log.warning("COLLAPSE ALARM at step %d: %s; %s", step, "; ".join(s.text for s in signs), words)
        return halt

    def _scalars(self, step: int, metrics: dict[str, float]) -> None:
        if not self.settings.tensorboard:
            return
        board = self._writer(step)
        at = step if step else int(metrics.get("pretrain/buffers", 0))
        for name, value in metrics.items():
            if step or name.startswith("pretrain/"):  # the rest of pre-training has no axis here
                board.add_scalar(name, value, at)
            if step and name in VERL_NAMES:
                board.add_scalar(VERL_NAMES[name], value, at)

    def _writer(self, step: int) -> Any:
        """TensorBoard's writer; what an interrupted run wrote for `step` and later is hidden."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=step or None)
        return self._board


def before(step: int, buffers: float | None, name: str) -> Callable[[dict[str, Any]], bool]:
    """Which rows of the file `name` a run that goes on with `step` keeps; at step 0, with pre-training buffer
    `buffers`."""
    if step == 0 and buffers is not None:
        return lambda row: row["step"] == 0 and row.get("pretrain/buffers", math.inf) < buffers
    if step == 0 and name == METRICS:
        return lambda row: row["step"] == 0  # pre-training is over
    return lambda row: row["step"] < step


# ---- the progress line ----------------------------------------------------------------------------------------------


def figures(metrics: dict[str, float]) -> list[str]:
    """The figures that tell stability, as words: `score 0.31`, `kl 0.012` ..."""
    shown = STABILITY | {"critic ev": "pretrain/explained_var"}
    return [f"{name} {short(metrics[key])}" for name, key in shown.items() if key in metrics]


def progress_line(steps: int, pretrain: int, console: Any = None) -> PlainLine | RichLine:
    """A moving line on a terminal, a plain line a step elsewhere."""
    from rich.console import Console

    console = console or Console()
    return RichLine(steps, pretrain, console) if console.is_terminal else PlainLine(steps, pretrain)


class PlainLine:
    """One printed line a step, for logs and pipes, its last figure the time that is left by the newest steps."""

    def __init__(self, steps: int, pretrain: int):
        self.steps, self.pretrain = steps, pretrain
        self.left = TimeLeft()

    def show(self, step: int, metrics: dict[str, float]) -> None:
        buffers, took = metrics.get("pretrain/buffers", 0), metrics.get("time/step", 0.0)
        where = f"step {step}/{self.steps}" if step else f"critic {buffers:.0f}/{self.pretrain}"
        words = [where, *figures(metrics), f"{took:.1f} s"]
        if step and took:
            self.left.take(took)
            words.append(self.left.words(self.steps - step))
        print(plain_line(words), flush=True)

    def close(self) -> None:
        pass


class RichLine:
    """One line that moves: bar, step, figures, time left."""

    def __init__(self, steps: int, pretrain: int, console: Any):
        from rich import progress as rich

        self.steps, self.pretrain = steps, pretrain
        self.progress = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(bar_width=20),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[figures]}"),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
            console=console,
        )
        self.task: Any = None

    def show(self, step: int, metrics: dict[str, float]) -> None:
        if self.task is None:
            self.task = self.progress.add_task("", total=None, figures="")
            self.progress.start()
        buffers = int(metrics.get("pretrain/buffers", 0))
        done, total, name = (step, self.steps, "ppo") if step else (buffers, self.pretrain, "critic")
        self.progress.update(
            self.task, description=name, completed=done, total=total, figures="  ".join(figures(metrics))
        )

    def close(self) -> None:
        self.progress.stop()
