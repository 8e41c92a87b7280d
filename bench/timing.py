"""Rivals are timed in turns, round by round, so that what else the machine does falls on all alike; medians and
quantiles by pytest-benchmark. On a CUDA device the clock is the device's own (events around a few calls), after a
first round that is thrown away."""

import time
from collections.abc import Callable, Mapping

import torch
from pytest_benchmark.stats import Stats

ROUND_SECONDS = 2e-3  # a round repeats short calls until it lasts about this long
LEAST_ROUNDS, MOST_ROUNDS = 7, 400


COLD_BYTES = 256 << 20
"""Written before each call that shall find nothing in a cache: more than the last level of any card or server here."""


def colder(device: torch.device) -> Callable[[], object]:
    """What takes the place of everything in the caches."""
    return torch.empty(COLD_BYTES, dtype=torch.uint8, device=device).zero_


def seconds_of(run: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


GRAPH_CALLS = 20


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """GRAPH_CALLS calls as one CUDA graph: what the device needs, without Python and launches from the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            run()
    return graph.replay


def in_turns(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    per_run: int = 1,
    *,
    cool: Callable[[], object] | None = None,
) -> dict[str, Stats]:
    """Statistics of each run's seconds per call (a run is `per_run` calls); about `seconds` are spent on each. cool:
    done before each call, whose time it is not part of."""
    if cool is not None:
        return _cold(runs, device, seconds, cool)
    calls, stats = {}, {name: Stats() for name in runs}
    longest = 0.0
    for name, run in runs.items():
        once = seconds_of(run, 1, device)
        calls[name] = max(1, min(1000, int(ROUND_SECONDS / max(once, 1e-7))))
        longest = max(longest, seconds_of(run, calls[name], device) * calls[name])
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(longest, 1e-7))))
    names = list(runs)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            stats[name].update(seconds_of(runs[name], calls[name], device) / per_run)
    return stats


def _cold(
    runs: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, cool: Callable[[], object]
) -> dict[str, Stats]:
    stats, names = {name: Stats() for name in runs}, list(runs)
    longest = max(seconds_of(lambda run=run: (cool(), run()), 1, device) for run in runs.values())  # type: ignore[misc]
    for i in range(max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(longest, 1e-7))))):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            cool()
            stats[name].update(seconds_of(runs[name], 1, device))
    return stats


def quantile(stats: Stats, share: float) -> float:
    ordered = stats.sorted_data
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
