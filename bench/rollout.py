"""The engine's rollout against `model.generate` of the installed transformers, in one process, in turns.

    python -m bench.rollout [--threads 2] [--rounds 5] [--rows equal uneven samples bf16] [--cpu-time]

Both sample from the shipped policy in float32 at temperature 1; the rollout also records each token's logprob. Rows:
    equal    64 prompts of 12 tokens, 48 new tokens each
    uneven   256 prompts, responses as long as the policy makes them, at most 128 tokens; 64 slots
    samples  8 prompts of 256 tokens, 8 samples of 32 new tokens each
    bf16     the first row by the rollout alone, bfloat16 against float32
`generate` runs in its fastest setting for the row: attention sdpa or eager, growing or static cache, 64 sequences a
batch or all, found by one run of each. Tokens a second count response tokens alone. Medians and ratios; --cpu-time
takes processor time instead of the clock, for one thread on a machine with other work."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from ppomax.assets import default_assets
from ppomax.data import load_prompts
from ppomax.models import load_policy, load_tokenizer
from ppomax.rollout import decode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = list[list[int]]


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


def jobs(tokenizer: PreTrainedTokenizerBase) -> dict[str, Job]:
    texts, _ = load_prompts(str(default_assets() / "prompts.jsonl"), tokenizer, 512)
    generator = torch.Generator().manual_seed(0)

    def random(count: int, length: int) -> Rows:
        return torch.randint(3, len(tokenizer), (count, length), generator=generator).tolist()

    uneven = [texts[i % len(texts)] for i in range(256)]
    made = (
        Job("equal", random(64, 12), 48, 48, 1, 64, 2.0),
        Job("uneven", uneven, 128, 0, 1, 64, 3.0),
        Job("samples", random(8, 256), 32, 32, 8, 64, 3.0),
    )
    return {job.name: job for job in made}


def ours(model: PreTrainedModel, job: Job, eos: int) -> tuple[int, object]:
    rows = [p for p in job.prompts for _ in range(job.samples)]
    given = decode(
        model,
        rows,
        range(len(rows)),
        eos_ids=[eos],
        max_new_tokens=job.new,
        min_new_tokens=job.least,
        slots=job.slots,
    )
    return sum(map(len, given.tokens)), given.stats


def theirs(model: PreTrainedModel, job: Job, eos: int, attention: str, cache: str | None, batch: int) -> int:
    """Response tokens, EOS included, of one pass over the job by `generate`."""
    model.set_attn_implementation(attention)
    tokens = 0
    step = max(1, batch // job.samples)
    for start in range(0, len(job.prompts), step):
        part = job.prompts[start : start + step]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
        out = model.generate(
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


def fastest(model: PreTrainedModel, job: Job, eos: int, clock: Callable[[], float]) -> tuple[str, str | None, int]:
    """The quickest setting of `generate` for this job, by one run of each."""
    count = len(job.prompts) * job.samples
    found = {}
    theirs(model, dataclasses.replace(job, prompts=job.prompts[:8], new=4, least=0), eos, "sdpa", None, 8)
    for setting in itertools.product(("sdpa", "eager"), (None, "static"), sorted({min(64, count), count})):
        began = clock()
        tokens = theirs(model, job, eos, *setting)
        found[setting] = tokens / (clock() - began)
        name = f"{setting[0]:5} cache {setting[1] or 'growing':7} batch {setting[2]:3}"
        print(f"    generate {name}: {found[setting]:7.0f}", flush=True)
    return max(found, key=found.__getitem__)


def compare(runs: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median tokens a second of each, in turns."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            began = clock()
            tokens = run()
            rates[name].append(tokens / (clock() - began))
    return {name: statistics.median(x) for name, x in rates.items()}


def row(model: PreTrainedModel, job: Job, eos: int, rounds: int, clock: Callable[[], float]) -> None:
    """Print one job's medians and their ratio."""
    setting = fastest(model, job, eos, clock)
    runs = {"ours": lambda: ours(model, job, eos)[0], "generate": lambda: theirs(model, job, eos, *setting)}
    rate = compare(runs, rounds, clock)
    stats = ours(model, job, eos)[1]
    print(
        f"{job.name:8} ours {rate['ours']:7.0f}   generate {rate['generate']:7.0f}   ratio "
        f"{rate['ours'] / rate['generate']:.2f} (goal {job.goal})\n    {stats}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.rollout", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = ("equal", "uneven", "samples", "bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=names, default=list(names))
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    path = default_assets() / "policy"
    tokenizer, model = load_tokenizer(path), load_policy(path).eval()
    eos, todo = int(tokenizer.eos_token_id), jobs(tokenizer)
    print(f"tokens a second, {args.threads} threads, torch {torch.__version__}")
    for name in (n for n in args.rows if n != "bf16"):
        row(model, todo[name], eos, args.rounds, clock)
    if "bf16" in args.rows:
        half = load_policy(path, torch.bfloat16).eval()
        runs = {n: lambda m=m: ours(m, todo["equal"], eos)[0] for n, m in (("bfloat16", half), ("float32", model))}
        rate = compare(runs, args.rounds, clock)
        print(
            f"bf16     bfloat16 {rate['bfloat16']:7.0f}   float32 {rate['float32']:7.0f}   ratio "
            f"{rate['bfloat16'] / rate['float32']:.2f} (goal above 1)",
            flush=True,
        )


if __name__ == "__main__":
    main()
