"""The training loop that supervised fine-tuning and the reward model share: batches, schedule, steps, metrics.

A batch is a pure function of (seed, step), so that a resumed run needs no state of its data order. Rows of like length
share a batch: the padded layout of models.packed_hidden then computes on little else than real tokens.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppomax.config import OptimConfig, RunConfig
from ppomax.recipe.streams import Purpose, stream
from ppomax.saving.engine_state import refuse_not_finite
from ppomax.saving.folder import CheckpointError, atomic_folder, check_space, newest, prune
from ppomax.saving.jsonl import append_row, keep_rows
from ppomax.saving.random_state import python_random_state, random_state, restore_random_state, seed_all
from ppomax.sharding import Trained
from ppomax.stages.signals import Stopped, stop_requests

log = logging.getLogger(__name__)

LOG_EVERY = 10
CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"


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


def run_loop(
    module: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, dict[str, Any]]],
    optim: OptimConfig,
    run: RunConfig,
    out: Path,
    identity: dict[str, Any],
    evaluate: Callable[[], dict[str, float]],
    *,
    eval_every: int,
) -> None:
    """Train `module` for run.steps optimiser steps, loss_of(step) -> (loss, metrics), and put it in evaluation mode.

    Appends a line of metrics to out/metrics.jsonl every LOG_EVERY steps, and to out/tensorboard; checkpoints in
    out/checkpoints; with run.resume goes on from the newest whole one, to the bit. `identity` (the configuration; of
    `run` only the seed) must be the same then. SIGTERM and Ctrl-C checkpoint and raise Stopped. A NaN or infinite loss
    or gradient skips the step; run.max_bad_steps in a row stop the run.
    """
    seed_all(run.seed)
    trained = Trained(module, optim, run.steps)
    bad = _resume(trained, out, identity) if run.resume else _fresh(out)
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(out / "tensorboard"), purge_step=trained.steps + 1)
    with closing(board), stop_requests() as stop:
        while trained.steps < run.steps:
            began = time.perf_counter()
            lr = trained.lr
            loss, metrics = loss_of(trained.steps)
            trained.backward(loss)
            norm = trained.grad_norm()
            bad = _step(trained, loss, norm, bad, run)
            step = trained.steps
            if step % LOG_EVERY == 0 or step == run.steps or step % eval_every == 0:
                row = {
                    "step": step,
                    "loss": loss.item(),
                    "grad_norm": norm.item(),
                    "lr": lr,
                    "step_seconds": time.perf_counter() - began,
                    **{name: float(value) for name, value in metrics.items()},
                }
                if step == run.steps or step % eval_every == 0:
                    row |= evaluate()
                append_row(out / METRICS, row)
                for name, value in row.items():
                    board.add_scalar(name, value, step)
                log.info("%s", "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
            if stop.asked or step == run.steps or (run.checkpoint_every and step % run.checkpoint_every == 0):
                _save(trained, out, identity, bad)
                prune(out / CHECKPOINTS, run.keep_checkpoints)
            if stop.signal and step < run.steps:
                raise Stopped(stop.signal, f"stopped by {stop.signal.name} after step {step}; go on with --resume")
    module.eval()


def _step(trained: Trained, loss: Tensor, norm: Tensor, bad: int, run: RunConfig) -> int:
    """One optimiser step, or a skipped one; returns how many were skipped in a row."""
    if bool(torch.isfinite(loss) & torch.isfinite(norm)):
        trained.step(norm)
        return 0
    log.warning("step %d skipped: loss %s, gradient norm %s", trained.steps, loss.item(), norm.item())
    trained.skip()
    if bad + 1 >= run.max_bad_steps:
        raise FloatingPointError(
            f"{bad + 1} steps in a row had a NaN or infinite loss or gradient; lower the learning rate, or look at "
            "the rows of the last step"
        )
    return bad + 1


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def _save(trained: Trained, out: Path, identity: dict[str, Any], bad: int) -> None:
    refuse_not_finite({"model": trained})
    weights, state = trained.tensors()
    with atomic_folder(out / CHECKPOINTS / f"step-{trained.steps:06d}") as folder:
        check_space(folder, sum(x.numel() * x.element_size() for x in [*weights.values(), *state.values()]))
        for name, tensors in (("weights", weights), ("optim", state), ("rng", random_state())):
            save_file(
                {key: x.detach().contiguous().cpu() for key, x in tensors.items()}, folder / f"{name}.safetensors"
            )
        (folder / "state.json").write_text(
            json.dumps(
                {
                    "steps": trained.steps,
                    "skipped_in_a_row": bad,
                    "identity": identity,
                    "random": python_random_state(),
                }
            )
        )


def _resume(trained: Trained, out: Path, identity: dict[str, Any]) -> int:
    path = newest(out / CHECKPOINTS)
    if path is None:
        return _fresh(out)
    state = json.loads((path / "state.json").read_text())
    if state["identity"] != identity:
        names = [name for name in identity if state["identity"].get(name) != identity[name]]
        raise CheckpointError(
            f"{path} is of another run: {', '.join(names) or 'its configuration'} differs; resume with the same "
            "configuration, or start anew in another folder"
        )
    trained.load(load_file(path / "weights.safetensors"), load_file(path / "optim.safetensors"), state["steps"])
    restore_random_state(load_file(path / "rng.safetensors"), state["random"])
    keep_rows(out / METRICS, lambda row: row["step"] <= state["steps"])
    log.info("resumed %s", path)
    return int(state["skipped_in_a_row"])


def _fresh(out: Path) -> int:
    if newest(out / CHECKPOINTS) is not None:
        raise CheckpointError(f"{out} holds checkpoints of an earlier run; resume it, or choose another run.out")
    (out / METRICS).unlink(missing_ok=True)
    return 0


def chunks(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of all rows in batches of like length, for evaluation."""
    order = BatchOrder(lengths, batch_tokens, seed=0)
    for step in range(len(order)):
        yield order.batch(step)
