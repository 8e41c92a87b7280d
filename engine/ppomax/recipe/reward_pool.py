"""A slow reward function, spread over processes of its own and held to a time limit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from ppomax.recipe.rewards import RewardError, load_function, run_function

_function: Any = None
"""In a worker: what it was started for."""


def _load(spec: str) -> None:
    global _function
    _function = load_function(spec)


def _score(prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> list[Any]:
    """What the function gives, as plain data; the process that asked looks at it."""
    given = run_function(_function, prompts, responses, columns)
    given = given.tolist() if hasattr(given, "tolist") else list(given)
    return [x.tolist() if hasattr(x, "tolist") else x for x in given]


class Pooled:
    """The function `spec` (`file.py:name`), called in `workers` processes on a share of the responses each.

    It is called as the function itself is, and asks for the same columns. RewardError: it took longer than `timeout`
    seconds (None: any time), which its processes do not survive, or one of them died."""

    def __init__(self, spec: str, workers: int, timeout: float | None = None):
        self.spec, self.workers, self.timeout = spec, workers, timeout
        function = load_function(spec)
        self.__name__ = getattr(function, "__name__", spec)
        self.__signature__ = inspect.signature(function)
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[Any]:
        if self._pool is None:
            spawned = get_context("spawn")  # torch's threads do not survive a fork
            self._pool = ProcessPoolExecutor(self.workers, spawned, initializer=_load, initargs=(self.spec,))
        each = -(-len(responses) // self.workers)
        cuts = [slice(i, i + each) for i in range(0, len(responses), each)]
        futures = [self._pool.submit(_score, *_part(prompts, responses, columns, cut)) for cut in cuts]
        try:
            return [score for future in futures for score in future.result(self.timeout)]
        except TimeoutError:
            self.close()
            raise RewardError(
                f"the reward function {self.__name__} took longer than reward.timeout={self.timeout:g} s for "
                f"{len(responses)} responses; make it faster, or raise reward.timeout or reward.workers"
            ) from None
        except BrokenProcessPool as error:
            self.close()
            raise RewardError(f"a process of the reward function {self.__name__} died ({error})") from error

    def close(self) -> None:
        """End the processes, also those that are at work."""
        if self._pool is not None:
            for process in list((getattr(self._pool, "_processes", None) or {}).values()):
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _part(
    prompts: Sequence[str], responses: Sequence[str], columns: Mapping[str, Sequence[Any]], cut: slice
) -> tuple[list[str], list[str], dict[str, list[Any]]]:
    return list(prompts[cut]), list(responses[cut]), {name: list(x[cut]) for name, x in columns.items()}
