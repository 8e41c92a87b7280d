"""Cases that all ranks of one launch run one after the other, so that each is a test of its own afterwards.

A launch of several ranks takes 10 to 20 seconds, so a driver runs many cases in one: `tried(function, ...)` keeps what
a case gave, or each rank's traceback if it failed, and goes on with the next one. The test module asks for one case by
name: a case that failed fails the test that asked, with the words of the ranks, and no other."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppomax.sharding import ranks

Kept = dict[str, Any]
"""Of one case: `values`, what each rank gave, and `failures`, each rank's traceback or None."""


def tried(case: Callable[..., Any], *args: Any, **named: Any) -> Kept:
    """Run a case; every rank calls."""
    value, failure = None, None
    try:
        value = case(*args, **named)
    except Exception:
        failure = traceback.format_exc()
    return {"values": ranks.gather_objects(value), "failures": ranks.gather_objects(failure)}


def keep(path: Path, cases: dict[str, Kept]) -> None:
    """Rank 0 writes what the cases gave."""
    if ranks.rank() == 0:
        path.write_text(json.dumps(cases), encoding="utf-8")


class Cases:
    """The cases of one launch, as a test module reads them."""

    def __init__(self, path: Path):
        self._kept: dict[str, Kept] = json.loads(path.read_text(encoding="utf-8"))

    def names(self) -> list[str]:
        return list(self._kept)

    def on_all(self, name: str) -> list[Any]:
        """What each rank gave. AssertionError with the tracebacks if the case failed."""
        if name not in self._kept:
            raise AssertionError(f"the driver ran no case {name!r}; it ran {', '.join(self._kept)}")
        failures = {rank: words for rank, words in enumerate(self._kept[name]["failures"]) if words}
        said = "\n".join(f"---- rank {rank} ----\n{words}" for rank, words in failures.items())
        assert not failures, f"case {name!r} failed on {len(failures)} ranks\n{said}"
        return self._kept[name]["values"]

    def __getitem__(self, name: str) -> Any:
        """What rank 0 gave."""
        return self.on_all(name)[0]
