"""The engine's rollout against vLLM's CPU build on the same model and lengths, in turns.

    bench/rivals.sh vllm
    build/rivals/vllm/bin/python -m bench.vllm [--threads 2] [--rounds 5]

The shipped policy in float32 at temperature 1, each token's log-probability recorded by both. Rows:
    equal    64 prompts, 48 new tokens each
    uneven   256 prompts, responses as long as the policy makes them, at most 128 tokens: EOS ends most early
Each side has a process of its own. Response tokens a second; medians, and the median ratio in a turn."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from ppomax.assets import FOLDER

ROWS = ("equal", "uneven")


def job(name: str) -> tuple[list[list[int]], int, list[int]]:
    """Prompts, the most tokens of a response, and what ends one before."""
    from ppomax.models import load_tokenizer

    tokenizer: Any = load_tokenizer(FOLDER / "policy")
    lines = (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [list(tokenizer(json.loads(line)["prompt"])["input_ids"]) for line in lines]
    if name == "equal":
        return ids[:64], 48, []
    return [ids[i % len(ids)] for i in range(256)], 128, [int(tokenizer.eos_token_id)]


def ours(connection: Connection, threads: int) -> None:
    """Serve rows by our decoder."""
    torch.set_num_threads(threads)
    from ppomax.models import load_policy
    from ppomax.rollout import Sampling, decode

    model = load_policy(FOLDER / "policy").eval()
    while True:
        prompts, most, ends = job(connection.recv())
        began = time.perf_counter()
        found = decode(model, prompts, range(len(prompts)), Sampling(most), eos_ids=ends)
        connection.send(sum(map(len, found.tokens)) / (time.perf_counter() - began))


def theirs(connection: Connection, threads: int) -> None:
    """Serve rows by vLLM."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    model = LLM(str(FOLDER / "policy"), dtype="float32", max_model_len=256, enforce_eager=True, disable_log_stats=True)
    while True:
        prompts, most, ends = job(connection.recv())
        rule = SamplingParams(temperature=1.0, max_tokens=most, ignore_eos=True, stop_token_ids=ends, logprobs=0)
        began = time.perf_counter()
        found = model.generate([{"prompt_token_ids": p} for p in prompts], rule, use_tqdm=False)
        seconds = time.perf_counter() - began
        connection.send(sum(len(f.outputs[0].token_ids) for f in found) / seconds)


def start(serve: Any, threads: int, waiting: str | None) -> Connection:
    """A process that serves rows."""
    os.environ.pop("OMP_WAIT_POLICY", None)  # read when the child loads its OpenMP
    if waiting:
        os.environ["OMP_WAIT_POLICY"] = waiting
    here, there = (context := multiprocessing.get_context("spawn")).Pipe()
    context.Process(target=serve, args=(there, threads)).start()
    return here


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.vllm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sides = {"ppomax": start(ours, args.threads, "passive"), "vLLM": start(theirs, args.threads, None)}
    for row in ROWS:
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(args.rounds + 1):  # the first warms up
            for name, side in sides.items():
                side.send(row)
                rate = side.recv()
                if turn:
                    rates[name].append(rate)
        pairs = zip(rates["ppomax"], rates["vLLM"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        each = "   ".join(f"{name} {statistics.median(x):6.0f} tokens/s" for name, x in rates.items())
        print(f"{row:7} {each}   ratio {ratio:.2f}", flush=True)
    for child in multiprocessing.active_children():
        child.terminate()


if __name__ == "__main__":
    main()
