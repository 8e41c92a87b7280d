"""The training loop that supervised fine-tuning and the reward model share: batches, schedule, steps, metrics.

A batch is a pure function of (seed, step), so that a resumed run needs no state of its data order. Rows of like length
share a batch: the padded layout of models.packed_hidden then computes on little else than real tokens. A batch is dealt
out over ranks and micro-batches, whose losses and metrics are shares of the whole batch's: they only add up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppomax.config.mapping import to_dict
from ppomax.config.stages import RewardModelConfig, SftConfig
from ppomax.models import pick_device, set_attention, use_threads
from ppomax.models.fingerprints import fingerprint
from ppomax.recipe.streams import Purpose, stream
from ppomax.reporting.heartbeat import beat
from ppomax.reporting.lines import TimeLeft, plain_line, short
from ppomax.reporting.trackers import Trackers
from ppomax.saving.background import BackgroundWriter, Checkpoints
from ppomax.saving.engine_state import Parts, contents, read_state, restore_state, save_state
from ppomax.saving.folder import CheckpointError, newest
from ppomax.saving.jsonl import append_row, keep_rows
from ppomax.saving.lock import claimed
from ppomax.saving.random_state import seed_all
from ppomax.sharding import Trained, ranks, stage_of, train_model, zero_config
from ppomax.sharding.settle import agreed, agreed_rows
from ppomax.stages.signals import STOP, Stopped, stop_requests

log = logging.getLogger(__name__)

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", SftConfig, RewardModelConfig)
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What a stage trains on, and how that is measured."""

    sizes: list[int]
    """Tokens of each row."""
    loss_of: Callable[[Any, Sequence[int], Sequence[int]], tuple[Tensor, Metrics]]
    """(module, rows, batch) -> the share of `rows` in the loss and in the metrics of `batch`; 0-d each. The shares of
    a batch's rows add up to the batch's own."""
    evaluate: Callable[[Any], dict[str, float]]
    """Held-out figures of the module; every rank calls."""
    rows: str | None = None
    """Fingerprint of the rows, which a resumed run must have again."""


class BatchOrder:
    """Row indices of each step's batch: every row once an epoch, rows of like length together, order from the seed.

    lengths: tokens of each row; batch_tokens: most tokens in a batch (a longer row is a batch of its own)."""

    POOL = 50
    """Batches' worth of shuffled rows sorted by length together: enough to pad little, few enough to mix lengths."""

    def __init__(self, lengths: Sequence[int], batch_tokens: int, seed: int):
        self.lengths, self.batch_tokens, self.seed = lengths, batch_tokens, seed
        self._epoch = 0
        self._batches = self._shuffled(0)
        self._start = 0  # step at which the current epoch began

    def batch(self, step: int) -> list[int]:
        """Rows of optimiser step `step` (from 0). Steps must not go back before the current epoch."""
        while step >= self._start + len(self._batches):
            self._start += len(self._batches)
            self._epoch += 1
            self._batches = self._shuffled(self._epoch)
        return self._batches[step - self._start]

    def __len__(self) -> int:
        return len(self._batches)

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = stream(self.seed, Purpose.ROWS, epoch)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        mean = max(1, sum(self.lengths) // len(self.lengths))
        pool = max(1, self.POOL * self.batch_tokens // mean)
        batches: list[list[int]] = []
        for i in range(0, len(rows), pool):
            batches += self._cut(sorted(rows[i : i + pool], key=lambda row: self.lengths[row]))
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[i] for i in order]

    def _cut(self, rows: list[int]) -> list[list[int]]:
        batches: list[list[int]] = [[]]
        total = 0
        for row in rows:
            if batches[-1] and total + self.lengths[row] > self.batch_tokens:
                batches.append([])
                total = 0
            batches[-1].append(row)
            total += self.lengths[row]
        return batches


@contextmanager
def claimed_run(config: C, default: str) -> Iterator[tuple[C, Path]]:
    """Inside, this process is a rank of the job, `config` is what all its ranks run with, and the folder (`default`
    where none is named) is this job's own."""
    use_threads(config.run.threads)
    ranks.start(config.run.device, config.sharding.timeout)
    config = agreed(config)
    out = Path(config.run.out or default)
    with ExitStack() as held:
        with ranks.fail_together():
            if ranks.rank() == 0:
                held.enter_context(claimed(out, config))
        yield config, out


def sharded_read(config: SftConfig | RewardModelConfig) -> dict[str, Any] | None:
    """DeepSpeed's settings of a model of which each rank reads its part alone: under ZeRO-3 on several ranks."""
    if ranks.world_size() == 1 or stage_of(config.sharding) != 3:
        return None
    return zero_config.trained(config.sharding, 3, getattr(torch, config.dtype), config.optim.grad_clip)


def placed(model: PreTrainedModel, config: SftConfig | RewardModelConfig) -> PreTrainedModel:
    """`model` on the device of `config`, attending as it says, in evaluation mode: nothing in it is random."""
    model.to(pick_device(config.run.device))  # type: ignore[arg-type]
    log.info("attention: %s", set_attention(model, config.attention))
    return model.eval()


def run_loop(module: M, task: Task, config: SftConfig | RewardModelConfig, out: Path) -> Trained[M]:
    """Train `module` for config.run.steps optimiser steps, or config.epochs passes over the rows; returns it with its
    weights as they are at the end, which other ranks may hold in part.

    Appends a row of metrics to out/metrics.jsonl every `log_every` steps, to out/tensorboard and to the trackers;
    checkpoints in out/checkpoints; with run.resume goes on from the newest whole one, to the bit. The configuration (of
    `run` only the seed) and the rows must be the same then. SIGTERM and Ctrl-C checkpoint and raise Stopped. A NaN or
    infinite loss or gradient skips the step; run.max_bad_steps in a row stop the run."""
    run = config.run
    seed_all(run.seed)
    order = BatchOrder(task.sizes, config.batch_tokens, run.seed)
    steps = run.steps if config.epochs is None else max(1, round(config.epochs * len(order)))
    log.info("%d rows, %d tokens, %d steps an epoch", len(task.sizes), sum(task.sizes), len(order))
    prints = {"start": fingerprint(module), **agreed_rows({"rows": task.rows})}
    trained = train_model(module, config.optim, steps, config.sharding)
    checkpoints = Checkpoints(out / CHECKPOINTS, run, config.sharding, pick_device(run.device))
    saved = Saved(out, _identity(config), prints, run.accept_changes, checkpoints)
    bad = saved.resume(trained) if run.resume else saved.fresh()
    if ranks.rank() == 0:
        (out / STOP).unlink(missing_ok=True)
    with Curves(out, config, trained.steps, steps) as curves, stop_requests() as stop:
        while trained.steps < steps:
            began, lr = time.perf_counter(), trained.lr
            metrics = add_gradients(trained, task, order.batch(trained.steps), config.micro_tokens)
            norm = trained.grad_norm()
            bad = _step(trained, metrics["loss"], norm, bad, run.max_bad_steps)
            step = trained.steps
            evaluated = step == steps or step % config.eval_every == 0
            curves.took(time.perf_counter() - began)
            if step % config.log_every == 0 or evaluated:
                row = {"loss": metrics["loss"].item(), "grad_norm": norm.item(), "lr": lr}
                row |= {name: value.item() for name, value in metrics.items() if name != "loss"}
                held_out: dict[str, float] = {}
                if evaluated:
                    with trained.gathered() as whole:
                        held_out = task.evaluate(whole)
                curves.add(step, row, held_out)
            stop.agreed(out, norm.device)
            if stop.asked or step == steps or (run.checkpoint_every and step % run.checkpoint_every == 0):
                saved.save(trained, bad)
            checkpoints.finish(only_if_ready=not stop.asked and step < steps)
            if stop.asked and step < steps:
                words = stop.signal.name if stop.signal else "another rank's signal"
                raise Stopped(stop.signal, f"stopped by {words} after step {step}; go on with --resume")
    return trained


def add_gradients(trained: Trained[Any], task: Task, batch: Sequence[int], micro_tokens: int) -> Metrics:
    """Add the gradient of a batch's loss; its `loss` and metrics, over all ranks."""
    micros = micro_batches(batch, task.sizes, micro_tokens)
    totals: Metrics = {}
    for i, rows in enumerate(micros):
        # A rank without a row of its own for this one keeps step with the others on a row that counts for nothing.
        weight = float(bool(rows))
        loss, metrics = trained.call(task.loss_of, rows or batch[:1], batch)
        trained.backward(loss * weight, last=i + 1 == len(micros))
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] = totals.get(name, 0.0) + value * weight
    summed = ranks.sum(torch.stack([value.float() for value in totals.values()]))
    return dict(zip(totals, summed, strict=True))


def micro_batches(batch: Sequence[int], sizes: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """This rank's rows of a batch, in as many parts on every rank as keep each within `micro_tokens` tokens (a longer
    row is a part of its own); a part is empty where there are fewer rows than parts."""
    lengths, count = [sizes[row] for row in batch], ranks.world_size()
    each = max(1, -(-sum(lengths) // (count * micro_tokens)))
    while True:
        hands: list[list[int]] = [[] for _ in range(count * each)]
        for row, hand in zip(batch, ranks.deal(lengths, len(hands)), strict=True):
            hands[hand].append(row)
        if all(len(rows) < 2 or sum(sizes[row] for row in rows) <= micro_tokens for rows in hands):
            return hands[ranks.rank() * each :][:each]
        each += 1


def _step(trained: Trained[Any], loss: Tensor, norm: Tensor, bad: int, most: int) -> int:
    """One optimiser step, or a skipped one; returns how many were skipped in a row."""
    if bool(torch.isfinite(loss) & torch.isfinite(norm)):
        trained.step(norm)
        return 0
    log.warning("step %d skipped: loss %s, gradient norm %s", trained.steps, loss.item(), norm.item())
    trained.skip()
    if bad + 1 >= most:
        raise FloatingPointError(
            f"{bad + 1} steps in a row had a NaN or infinite loss or gradient; lower the learning rate, or look at "
            "the rows of the last step"
        )
    return bad + 1


class Curves:
    """metrics.jsonl, TensorBoard, trackers and the log's lines, all by rank 0."""

    SHOWN = ("loss", "accuracy", "grad_norm", "lr")
    """Of a row, in the log."""

    def __init__(self, out: Path, config: SftConfig | RewardModelConfig, done: int, steps: int):
        self.path, self.steps, self.left, self.seconds, self.board = out / METRICS, steps, TimeLeft(), 0.0, None
        self.trackers = Trackers(config.trackers if ranks.rank() == 0 else (), out, to_dict(config))
        if ranks.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.board is not None:
            self.board.close()
        self.trackers.close()

    def took(self, seconds: float) -> None:
        """Take a step's time."""
        self.seconds = seconds
        self.left.take(seconds)

    def add(self, step: int, figures: dict[str, float], held_out: dict[str, float]) -> None:
        """Write a step's metrics down; held_out: `eval_...`."""
        if self.board is None:
            return
        row = {**figures, "step_seconds": self.seconds, **held_out}
        append_row(self.path, {"step": step, **row})
        for name, value in row.items():
            self.board.add_scalar(name, value, step)
        self.trackers.log(step, row)
        beat(self.path.parent, step, self.steps, self.seconds)
        words = [f"{name} {short(figures[name])}" for name in self.SHOWN if name in figures]
        words += [f"{self.seconds:.1f} s", self.left.words(self.steps - step)]
        log.info(plain_line([f"step {step}/{self.steps}", *words]))
        if held_out:
            words = [f"{name.removeprefix('eval_')} {short(value)}" for name, value in held_out.items()]
            log.info(plain_line(["held out:", *words]))


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """The checkpoints of a run, in the layout of engine_state.py: any other number of ranks can go on from them."""

    out: Path
    identity: dict[str, Any]
    """The configuration, as far as a resumed run must have the same one."""
    prints: dict[str, str | None]
    """Fingerprints of rows and frozen weights."""
    accept_changes: bool
    checkpoints: Checkpoints
    writer: BackgroundWriter = field(default_factory=BackgroundWriter)

    def save(self, trained: Trained[Any], bad: int) -> None:
        """A checkpoint of now."""
        parts = Parts({"model": trained}, {})
        state = {"identity": self.identity, "fingerprints": self.prints, "skipped_in_a_row": bad}
        self.checkpoints.save(
            f"step-{trained.steps:06d}",
            lambda path: save_state(path, parts, state, {}),
            lambda path: self.writer.start(path, *contents(parts, state, {})),
        )

    def resume(self, trained: Trained[Any]) -> int:
        """Go on from the newest checkpoint; how many steps were skipped in a row before it."""
        path = newest(self.out / CHECKPOINTS)
        if path is None:
            return self.fresh()
        state = read_state(path, verified=True)
        before = state["identity"]
        if before != self.identity:
            names = [name for name in self.identity if before.get(name) != self.identity[name]]
            raise CheckpointError(
                f"{path} is of another run: {', '.join(names) or 'its configuration'} differs; resume with the same "
                "configuration, or start anew in another folder"
            )
        restore_state(path, state, Parts({"model": trained}, {}), self.prints, self.accept_changes)
        if ranks.rank() == 0:
            keep_rows(self.out / METRICS, lambda row: row["step"] <= trained.steps)
        log.info("resumed %s", path)
        return int(state["skipped_in_a_row"])

    def fresh(self) -> int:
        """Start anew. CheckpointError: the folder holds another run's checkpoints."""
        if newest(self.out / CHECKPOINTS) is not None:
            raise CheckpointError(
                f"{self.out} holds checkpoints of an earlier run; resume it, or choose another run.out"
            )
        if ranks.rank() == 0:
            (self.out / METRICS).unlink(missing_ok=True)
        return 0


def _identity(config: SftConfig | RewardModelConfig) -> dict[str, Any]:
    found = to_dict(config) | {"run": {"seed": config.run.seed}}
    for knob in ("sharding", "trackers", "log_every"):
        del found[knob]
    return found


def own_chunks(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of this rank's stretch of the rows, in batches of like length, for evaluation."""
    mine = ranks.part_of(len(lengths))
    if not mine:
        return
    order = BatchOrder([lengths[row] for row in mine], batch_tokens, seed=0)
    for step in range(len(order)):
        yield [mine[i] for i in order.batch(step)]
