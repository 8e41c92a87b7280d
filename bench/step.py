"""A whole PPO step on a CPU against TRL's PPOTrainer, in turns, and the share of it that its products alone take.

    python -m bench.step [--threads 2] [--rounds 5] [--prompts 64] [--tokens 48] [--modes full hydra+branch]
                         [--model FOLDER] [--rivals TRL "TRL on our ops"]

The shipped policy, reward model and prompts, float32; or another policy (--model), whose reward model is its trunk with
a random head; every response has all its tokens, one epoch, one optimiser step
on two micro-batches. TRL (`bench/rivals.sh trl`, version 1.0 to 1.10) does the same work: generate, log-probabilities
of policy and reference, values, scores, update of policy and critic; without it ours is timed alone.
Each side has a process of its own, since how OpenMP's threads wait is chosen once a process: ours sleep, as `ppomax`
has it; TRL's spin for a while (libgomp's default) in one process and sleep in another, and the faster counts. Turns
alternate; a turn of TRL's is a step of its own `train`, told by its callbacks. `TRL on our ops` is that trainer after
`ppomax.integrations.trl.patch_ppo()`.
`products` are the matrix products of our step, by their shapes as they occur in it, done alone in the same turns by
torch.mm and by our own; those of attention by torch.bmm. Prints medians, the median ratio in a turn, and the shares:
above 100 % by torch.mm where our products are the faster ones."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ppomax.assets import FOLDER
from ppomax.config import load_config
from ppomax.engine import Engine
from ppomax.integrations.trl import patch_ppo
from ppomax.models import (
    RewardModel,
    load_policy,
    load_reward_model,
    load_tokenizer,
    make_critic,
    make_reward_model,
)
from ppomax_kernels.internal import decode_block, packed_attention, packed_linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import machine
from .modes import MODES, read_prompts

PHASES = ("rollout", "experience", "update")
WAITING = {"spinning": "default", "asleep": "passive"}

Shapes = collections.Counter[tuple[int, ...]]


class Products(TorchDispatchMode):
    """Counts the matrix products (M, K) @ (K, N) of what runs inside, those of our ops included, and those of attention
    as (batch, M, K, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Shapes = collections.Counter()
        self.attention: Shapes = collections.Counter()

    def __enter__(self) -> Products:
        """Ours are plain functions, which no dispatch sees."""
        self.patch = pytest.MonkeyPatch()

        def before(module: ModuleType, name: str, count: Callable[..., None]) -> None:
            real = getattr(module, name)

            def counted(*given: Any) -> Any:
                count(*given)
                return real(*given)

            self.patch.setattr(module, name, counted)

        before(packed_linear, "_run", lambda x, panels, bias, y, add: self.seen.update([(*x.shape, y.shape[1])]))
        before(decode_block, "_run", self._block)
        before(packed_attention, "_forward", lambda q, k, v, ends, *rest: self._packed(q, ends, back=False))
        before(packed_attention, "_backward", lambda q, k, v, ends, *rest: self._packed(q, ends, back=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.patch.undo()
        super().__exit__(*error)

    def _block(self, block: Any, x: Tensor, *rest: Any) -> None:
        """The four products of a decoder block."""
        rows, inside = len(x), block.heads * block.dim
        every = inside + 2 * block.kv_heads * block.dim
        for inputs, outputs in (
            (block.hidden, every), (inside, block.hidden), (block.hidden, 2 * block.inner), (block.inner, block.hidden)
        ):  # fmt: skip
            self.seen[rows, inputs, outputs] += 1

    def _packed(self, query: Tensor, ends: Tensor, *, back: bool) -> None:
        """Of packed sequences, as if all were of their mean length."""
        count, (tokens, heads, dim) = len(ends) - 1, query.shape
        mean = -(-tokens // count)
        self._attend(count * heads, mean, dim, mean, back=back)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name in ("aten::mm", "aten::addmm"):
            a, b = args if name == "aten::mm" else args[1:3]
            self.seen[a.shape[0], a.shape[1], b.shape[1]] += 1
        elif "flash_attention_for_cpu" in name:
            back = "backward" in name
            query, key = args[1:3] if back else args[:2]
            self._attend(query.shape[0] * query.shape[1], *query.shape[2:], key.shape[2], back=back)
        return func(*args, **(kwargs or {}))

    def _attend(self, rows: int, t: int, d: int, s: int, *, back: bool) -> None:
        """Scores and mixture of so many heads of sequences; backward the scores again, and the gradients of both
        factors of each. Half of the scores is masked, so each product is counted at half its rows."""
        self.attention[rows, -(-t // 2), d, s] += 3 if back else 1
        self.attention[rows, -(-t // 2), s, d] += 2 if back else 1


def replay(shapes: Shapes, times: Callable[..., Tensor]) -> Callable[[], None]:
    """Does them all by `times(a, b, out=)`, on operands that are made before."""
    made = {}
    for *outer, m, k, n in shapes:
        made[*outer, m, k, n] = torch.randn(*outer, m, k), torch.randn(*outer, k, n), torch.empty(*outer, m, n)

    def run() -> None:
        for shape, count in shapes.items():
            a, b, out = made[shape]
            for _ in range(count):
                times(a, b, out=out)

    return run


def reward_model(model: Path | None) -> RewardModel:
    """The shipped one, or one as large as the policy `model`."""
    if model is None:
        return load_reward_model(FOLDER / "reward_model")
    return make_reward_model(load_policy(model))


def ours(mode: str, prompts: int, tokens: int, model: Path | None) -> tuple[Engine, list[list[int]]]:
    """An engine, and its prompts."""
    config = load_config(
        overrides={
            "ptx.coef": 0.0, "batch.rollout_size": prompts, "batch.minibatch_size": prompts, "run.device": "cpu",
            "batch.micro_tokens": prompts * 32, "rollout.max_new_tokens": tokens, "rollout.min_new_tokens": tokens,
            "rollout.allow_biased_sampling": True, "reward.missing_eos_penalty": 0.0, **MODES[mode],
        }
    )  # fmt: skip
    engine = Engine(model or FOLDER / "policy", None, None, reward_model(model), config)
    return engine, read_prompts(engine, prompts)


def theirs(prompts: list[list[int]], tokens: int, model: Path | None, connection: Connection) -> Any:
    """TRL's trainer on the same models, which waits before each step until it is asked for, and tells its seconds."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Turns(TrainerCallback):
        began = 0.0
        before = peak()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            connection.recv()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            connection.send({"step": time.perf_counter() - self.began, "peak": peak() - self.before})
            self.on_train_begin()

    policy = model or FOLDER / "policy"
    tokenizer = load_tokenizer(policy)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    count = len(prompts)
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, num_sample_generations=0, logging_steps=10**6,
        per_device_train_batch_size=count // 2, gradient_accumulation_steps=2, num_mini_batches=1,
        total_episodes=10**6 * count, num_ppo_epochs=1, response_length=tokens, temperature=1.0,
        local_rollout_forward_batch_size=count, learning_rate=1e-6,
    )  # fmt: skip
    reward = reward_model(model)
    return PPOTrainer(
        args=args, processing_class=tokenizer, model=load_policy(policy),
        ref_model=load_policy(policy), reward_model=reward.model, value_model=make_critic(reward).model,
        train_dataset=Dataset.from_dict({"input_ids": prompts}), callbacks=[Turns()],
    )  # fmt: skip


def peak() -> float:
    """The most memory that this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(connection: Connection, side: str, args: argparse.Namespace) -> None:
    """Do a turn whenever it is asked for, until the other end closes."""
    torch.set_num_threads(args.threads)
    with contextlib.suppress(EOFError):
        if side.startswith("TRL"):
            _, prompts = ours("hydra+branch", args.prompts, args.tokens, args.model)
            try:
                if side == "TRL on our ops":
                    patch_ppo()
                trainer = theirs(prompts, args.tokens, args.model, connection)
            except ImportError as error:
                connection.recv()
                connection.send(str(error))
                return
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
        engine, prompts = ours(side, args.prompts, args.tokens, args.model)
        with Products() as counted:
            engine.step(prompts)
        alone = {
            "products": replay(counted.seen, torch.mm),
            "own": replay(counted.seen, lambda a, b, out: packed_linear.product(a, b.t(), out=out)),
            "attention": replay(counted.attention, torch.bmm),
        }
        while True:
            connection.recv()
            times = [time.perf_counter()]
            metrics, _ = engine.step(prompts)
            times.append(time.perf_counter())
            for run in alone.values():
                run()
                times.append(time.perf_counter())
            found = dict(zip(("step", *alone), (b - a for a, b in itertools.pairwise(times)), strict=True))
            connection.send(found | {"peak": peak()} | {phase: metrics[f"time/{phase}"] for phase in PHASES})


class Side:
    """A process that does a turn when it is asked to."""

    def __init__(self, side: str, waiting: str, args: argparse.Namespace):
        """`waiting`: OMP_WAIT_POLICY, or "default", with which threads spin for a while and then sleep."""
        os.environ.pop("OMP_WAIT_POLICY", None)  # read when the child loads its OpenMP
        if waiting != "default":
            os.environ["OMP_WAIT_POLICY"] = waiting
        self.turns: list[dict[str, float]] = []
        self.connection, there = (context := multiprocessing.get_context("spawn")).Pipe()
        self.process = context.Process(target=serve, args=(there, side, args), daemon=True)
        self.process.start()

    def turn(self) -> str | None:
        """One, kept in `turns`; or why there is none."""
        self.connection.send("go")
        found = self.connection.recv()
        if isinstance(found, str):
            return found
        self.turns.append(found)
        return None

    def median(self, name: str) -> float:
        """Seconds, without the first turn, which warms up."""
        return statistics.median(t[name] for t in self.turns[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=["full", "hydra+branch"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rivals", nargs="*", default=["TRL", "TRL on our ops"])
    args = parser.parse_args()
    print(f"{machine.card(torch.device('cpu'))}, {machine.versions(torch.device('cpu'))}, {args.threads} threads")
    rivals = {
        f"{side}, threads {how}": Side(side, waiting, args) for side in args.rivals for how, waiting in WAITING.items()
    }
    sides = {mode: Side(mode, "passive", args) for mode in args.modes}
    for _ in range(args.rounds + 1):
        for name, rival in list(rivals.items()):
            if (why := rival.turn()) is not None:
                print(f"{name}: not here: {why}")
                del rivals[name]
        for side in sides.values():
            side.turn()
    report(rivals, sides)


def report(rivals: dict[str, Side], sides: dict[str, Side]) -> None:
    """Medians, and what they come to."""
    for name, rival in rivals.items():
        print(f"{name:32} {rival.median('step') * 1e3:6.0f} ms   {rival.median('peak'):5.0f} MiB more than before")
    plain = [rival for name, rival in rivals.items() if name.startswith("TRL, ")]
    best = min(plain, key=lambda r: r.median("step"), default=None)
    for mode, side in sides.items():
        split = "  ".join(f"{phase} {side.median(phase) * 1e3:.0f}" for phase in PHASES)
        held = f"{side.median('peak'):5.0f} MiB in all"
        print(f"ppomax, {mode:24} {side.median('step') * 1e3:6.0f} ms   {split}   {held}")
        shares = [
            100 * statistics.median(t[name] / t["step"] for t in side.turns[1:])
            for name in ("products", "own", "attention")
        ]
        print(
            "    its products by torch.mm alone {:.0f} % of it, by ours {:.0f} %, attention's {:.0f} %".format(*shares)
        )
        if best is not None:
            pairs = zip(best.turns[1:], side.turns[1:], strict=True)
            print(f"    TRL takes {statistics.median(a['step'] / b['step'] for a, b in pairs):.2f} times as long")


if __name__ == "__main__":
    main()
