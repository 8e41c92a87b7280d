"""The engine's rollout against `model.generate` of the installed transformers, in turns.

    python -m bench.rollout [--threads 2] [--rounds 5] [--rows equal uneven samples bf16] [--cpu-time]
                            [--model FOLDER] [--continuous]

Both sample from the shipped policy in float32 at temperature 1; the rollout also records each token's logprob. Rows:
    equal    64 prompts of 12 tokens, 48 new tokens each
    uneven   256 prompts, responses as long as the policy makes them, at most 128 tokens; 64 slots
    samples  8 prompts of 256 tokens, 8 samples of 32 new tokens each
    bf16     the first row by the rollout alone, bfloat16 against float32
    laptop   with --model, whose policy is then used, this one alone: 16 prompts of 12 tokens, 32 new tokens each
`generate` runs in its fastest setting for the row: attention sdpa or eager, growing or static cache, 64 sequences a
batch or all, OpenMP threads that spin for a while (libgomp's default) or sleep, found by one run of each. The rollout
runs as `ppomax` does, with threads that sleep. Each has a process of its own, since that choice is made once a process
and spinning threads take the other's cores; one works at a time. Tokens a second count response tokens alone. Medians
and ratios; --continuous adds transformers' continuous batching, which takes a minute a row; --cpu-time takes processor
time instead of the clock, for one thread on a machine with other work."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers
from ppomax.assets import FOLDER
from ppomax.data import load_prompts
from ppomax.models import load_policy, load_tokenizer
from ppomax.rollout import Sampling, decode
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Rows = list[list[int]]
CONTINUOUS = "continuous"
Setting = tuple[str, str | None, int]
"""Of `generate`: attention, cache, sequences a batch."""


@dataclass(frozen=True)
class Job:
    """What is to be sampled."""

    name: str
    prompts: Rows
    new: int
    least: int
    samples: int
    slots: int
    goal: float
    """How many times as fast as `generate` the rollout is meant to be."""


@dataclass(frozen=True)
class Turn:
    """What one pass over a job came to."""

    rate: float
    """Response tokens a second."""
    said: str


def jobs(tokenizer: PreTrainedTokenizerBase) -> dict[str, Job]:
    texts, _ = load_prompts(str(FOLDER / "prompts.jsonl"), tokenizer, 512)
    generator = torch.Generator().manual_seed(0)

    def random(count: int, length: int) -> Rows:
        return torch.randint(3, len(tokenizer), (count, length), generator=generator).tolist()

    uneven = [texts[i % len(texts)] for i in range(256)]
    made = (
        Job("equal", random(64, 12), 48, 48, 1, 64, 2.0),
        Job("uneven", uneven, 128, 0, 1, 64, 3.0),
        Job("samples", random(8, 256), 32, 32, 8, 64, 3.0),
        Job("laptop", random(16, 12), 32, 32, 1, 64, 1.5),
    )
    return {job.name: job for job in made}


def ours(model: PreTrainedModel, job: Job, eos: int) -> tuple[int, object]:
    rows = [p for p in job.prompts for _ in range(job.samples)]
    given = decode(
        model,
        rows,
        range(len(rows)),
        Sampling(job.new, min_new_tokens=job.least, slots=job.slots),
        eos_ids=[eos],
    )
    return sum(map(len, given.tokens)), given.stats


def theirs(model: PreTrainedModel, job: Job, eos: int, attention: str, cache: str | None, batch: int) -> int:
    """Response tokens, EOS included, of one pass over the job by `generate`, or by `generate_batch`, transformers'
    continuous batching, which takes no least length."""
    model.set_attn_implementation(attention)
    tokens = 0
    if cache == CONTINUOUS:
        rows = [p for p in job.prompts for _ in range(job.samples)]
        how = GenerationConfig(max_new_tokens=job.new, do_sample=True, top_k=0, eos_token_id=eos, pad_token_id=0)
        found = model.generate_batch(rows, generation_config=how, progress_bar=False)  # type: ignore[operator]
        return sum(len(x.generated_tokens) for x in found.values())
    step = max(1, batch // job.samples)
    for start in range(0, len(job.prompts), step):
        part = job.prompts[start : start + step]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            max_new_tokens=job.new,
            min_new_tokens=job.least,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            num_return_sequences=job.samples,
            eos_token_id=eos,
            pad_token_id=0,
            cache_implementation=cache,
        )[:, longest:]
        ended = (out == eos).int()
        tokens += int(((ended.cumsum(1) - ended) == 0).sum())
    return tokens


class Side:
    """A process with the models, which works when it is asked to."""

    def __init__(self, waiting: str, threads: int, cpu_time: bool, path: Path):
        """`waiting`: OMP_WAIT_POLICY, or "default", with which threads spin for a while and then sleep."""
        self.waiting = waiting
        os.environ.pop("OMP_WAIT_POLICY", None)  # read when the child loads its OpenMP
        if waiting != "default":
            os.environ["OMP_WAIT_POLICY"] = waiting
        here, there = (context := multiprocessing.get_context("spawn")).Pipe()
        self.process = context.Process(target=serve, args=(there, threads, cpu_time, path), daemon=True)
        self.process.start()
        self.connection = here

    def run(self, job: str, how: Setting | str) -> Turn:
        """One pass over a job by `generate` in a setting, or by the rollout in "float32" or "bfloat16"."""
        self.connection.send((job, how))
        return self.connection.recv()  # type: ignore[no-any-return]


def serve(connection: Connection, threads: int, cpu_time: bool, path: Path) -> None:
    """Do what is asked through the connection until its other end closes."""
    torch.set_num_threads(threads)
    clock = time.process_time if cpu_time else time.perf_counter
    tokenizer, models = load_tokenizer(path), {}
    eos, todo = int(tokenizer.eos_token_id), jobs(tokenizer)
    while True:
        try:
            name, how = connection.recv()
        except EOFError:
            return
        dtype = how if isinstance(how, str) else "float32"
        if dtype not in models:
            models[dtype] = load_policy(path, getattr(torch, dtype)).eval()
        began = clock()
        if isinstance(how, str):
            tokens, stats = ours(models[dtype], todo[name], eos)
        else:
            tokens, stats = theirs(models[dtype], todo[name], eos, *how), None
        connection.send(Turn(tokens / (clock() - began), str(stats)))


def fastest(sides: Sequence[Side], job: str, counts: Sequence[int]) -> tuple[Side, Setting]:
    """The quickest process and setting of `generate` for this job, by one run of each."""
    found = {}
    for side in sides:
        side.run(job, ("sdpa", None, counts[0]))
        for setting in itertools.product(("sdpa", "eager"), (None, "static"), counts):
            found[side, setting] = side.run(job, setting).rate
            name = f"{setting[0]:5} cache {setting[1] or 'growing':7} batch {setting[2]:3} threads {side.waiting:7}"
            print(f"    generate {name}: {found[side, setting]:7.0f}", flush=True)
    return max(found, key=found.__getitem__)


def compare(runs: dict[str, Callable[[], Turn]], rounds: int) -> tuple[dict[str, float], dict[str, str]]:
    """Median tokens a second of each, in turns, and what each said last."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    said = {name: run().said for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            rates[name].append(run().rate)
    return {name: statistics.median(x) for name, x in rates.items()}, said


def row(job: Job, rollout: Side, rivals: Sequence[Side], rounds: int, continuous: bool) -> None:
    """Print one job's medians and their ratio."""
    count = len(job.prompts) * job.samples
    rival, setting = fastest(rivals, job.name, sorted({min(64, count), count}))
    runs: dict[str, Callable[[], Turn]] = {
        "ours": lambda: rollout.run(job.name, "float32"),
        "generate": lambda: rival.run(job.name, setting),
    }
    rate, said = compare(runs, rounds)
    print(
        f"{job.name:8} ours {rate['ours']:7.0f}   generate {rate['generate']:7.0f}   ratio "
        f"{rate['ours'] / rate['generate']:.2f} (goal {job.goal})\n    {said['ours']}",
        flush=True,
    )
    if continuous:
        best = max(rivals[0].run(job.name, ("eager", CONTINUOUS, 0)).rate for _ in range(2))
        print(f"    continuous batching of transformers, the better of two runs: {best:.0f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rollout", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = ("equal", "uneven", "samples", "bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=names, default=list(names))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--continuous", action="store_true")
    parser.add_argument("--model", type=Path)
    args = parser.parse_args(arguments)
    path = args.model or FOLDER / "policy"
    args.rows = ["laptop"] if args.model else args.rows
    todo = jobs(load_tokenizer(path))
    rollout, spins, sleeps = (Side(w, args.threads, args.cpu_time, path) for w in ("passive", "default", "passive"))
    print(
        f"tokens a second, {args.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    for name in (n for n in args.rows if n != "bf16"):
        row(todo[name], rollout, (spins, sleeps), args.rounds, args.continuous)
    if "bf16" in args.rows:
        half: dict[str, Callable[[], Turn]] = {
            "bfloat16": lambda: rollout.run("equal", "bfloat16"),
            "float32": lambda: rollout.run("equal", "float32"),
        }
        rate, _ = compare(half, args.rounds)
        print(
            f"bf16     bfloat16 {rate['bfloat16']:7.0f}   float32 {rate['float32']:7.0f}   ratio "
            f"{rate['bfloat16'] / rate['float32']:.2f} (goal above 1)",
            flush=True,
        )


if __name__ == "__main__":
    main()
