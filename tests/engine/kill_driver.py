"""Runs one training job many times over in forked children, killing them; a test module reads the verdicts.

    python -m tests.engine.kill_driver FOLDER  ->  one JSON line: {scenario: [first exit, weights equal, steps logged,
    resumed from]}
Models and torch load once; the parent computes nothing, so that forking is safe."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from ppomax import sharding
from ppomax.config import load_config
from ppomax.rollout import decode as decode_module  # noqa: F401  (loads the rollout package)
from ppomax.saving import dealt, folder
from ppomax.stages import ppo
from ppomax.stages.signals import Stopped

from tests.engine.tiny import SMALL, tiny_assets

KILL = signal.SIGKILL


def die(number: int = KILL) -> None:
    os.kill(os.getpid(), number)


def on_call(owner: object, name: str, nth: int, number: int = KILL, after: bool = False) -> None:
    """Send a signal to this process at the nth call of owner.name."""
    plain, calls = getattr(owner, name), itertools.count(1)

    def wrapped(*args: object, **named: object) -> object:
        call = next(calls)  # several threads may call
        if call == nth and not after:
            die(number)
        result = plain(*args, **named)
        if call == nth and after:
            die(number)
        return result

    setattr(owner, name, wrapped)


SCENARIOS: dict[str, Callable[[], None]] = {
    "in a rollout": lambda: on_call(ppo.Engine, "rollout", 4, after=True),
    "in an update, between two optimiser steps": lambda: on_call(sharding.Trained, "step", 9, after=True),
    "in critic pre-training": lambda: on_call(sharding.Trained, "step", 3),
    "in a save, first file": lambda: on_call(dealt, "write_file", 5, after=True),
    "in a save, before the manifest": lambda: on_call(folder, "seal", 2),
    "in a save, before the rename": lambda: on_call(folder, "take_place", 2),
    "in a save, after the rename": lambda: on_call(folder, "take_place", 2, after=True),
    "while old checkpoints are deleted": lambda: on_call(folder, "take_place", 3, after=True),
    "by SIGTERM": lambda: on_call(ppo.Engine, "rollout", 4, signal.SIGTERM),
    "by Ctrl-C": lambda: on_call(ppo.Engine, "rollout", 4, signal.SIGINT),
}


def fork(work: Callable[[], object]) -> int:
    """A child that runs `work`, silent; its number."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            work()
            status = 0
        except Stopped as stopped:
            status = stopped.status
        finally:
            os._exit(status)
    return pid


def child(work: Callable[[], None], delay: float | None = None) -> int:
    """Fork, run `work`, wait; kill after `delay` seconds. Returns the exit status, minus the signal if one killed
    it."""
    pid = fork(work)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, KILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(folder: Path, names: dict[str, object], resume: bool, prepare: Callable[[], None] = lambda: None) -> None:
    prepare()
    ppo.train_ppo(
        load_config(
            overrides={
                **SMALL,
                **names,
                "ptx.coef": 0.1,
                "ptx.pool": 16,
                "run.out": str(folder),
                "run.resume": resume,
                "critic.pretrain_steps": 2,
            }
        )
    )


def digest(folder: Path) -> str:
    """Hash of the exported policy and of the final checkpoint's weights and optimiser state."""
    files = [
        folder / "policy" / "model.safetensors",
        *sorted((folder / "checkpoints" / "step-000004").glob("*.safetensors")),
    ]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest() if files[0].is_file() else "no export"


def main(root: Path) -> dict[str, list[object]]:
    names: dict[str, object] = {}
    assert (
        child(lambda: (root / "names.json").write_text(json.dumps(tiny_assets(root)), encoding="utf-8") and None) == 0
    )
    names = json.loads((root / "names.json").read_text(encoding="utf-8"))
    times = []
    for place in (root / "first", root / "alone"):  # the machine may have been busy, and caches cold
        began = time.monotonic()
        assert child(lambda: run(place, names, False)) == 0  # noqa: B023
        times.append(time.monotonic() - began)
    whole = min(times)
    want, verdicts = digest(root / "alone"), {}
    jobs = [(name, prepare, None) for name, prepare in SCENARIOS.items()]
    jobs += [(f"after {share:.0%} of the run's time", lambda: None, whole * share) for share in (0.25, 0.5, 0.75)]
    for i, (name, prepare, delay) in enumerate(jobs):
        folder = root / f"killed-{i}"
        first = child(lambda: run(folder, names, False, prepare), delay)  # noqa: B023
        kept = sorted(p.name for p in (folder / "checkpoints").glob("step-*"))
        second = child(lambda: run(folder, names, True))  # noqa: B023
        steps = [
            json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        verdicts[name] = [first, second, digest(folder) == want, [s for s in steps if s], kept]
    return verdicts


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
