"""Two ranks that write checkpoints while they train, killed in the middle of a save, and resumed.

    python -m tests.engine.kill_ranks FOLDER [KILLS]     prints one JSON line a kill
A kill strikes one rank at a random moment from the start of a save on, up to twice as long as saves took; the other
goes down with it, as under a launcher. The resumed job must end as the undisturbed one did: exported policy, models
and optimisers of the last checkpoint, and steps, to the bit."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ppomax.cli import main as ppomax
from ppomax.saving import background
from ppomax.saving.folder import checkpoints

from tests.engine.kill_driver import KILL, child, digest, fork
from tests.engine.tiny import SMALL, tiny_assets

KILLS = 20
RANKS = 2


def words(root: Path, name: str) -> list[str]:
    """Of the command."""
    knobs = {**SMALL, **json.loads((root / "names.json").read_text(encoding="utf-8")), "run.device": "cpu",
             "sharding.zero_stage": 2, "run.background_saves": True, "run.checkpoint_every": 1, "run.steps": 4,
             "run.keep_checkpoints": 2, "run.threads": 1}  # fmt: skip
    return ["train", *(f"--{k}={v}" for k, v in knobs.items() if v is not None), "--out", str(root / name)]


def both(argv: list[str], port: int, prepare: Callable[[int], None] = lambda rank: None) -> list[int]:
    """The statuses of a job of two ranks; once one has died the other is killed, too."""

    def work(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
        prepare(rank)
        if status := ppomax(argv):
            raise SystemExit(status)

    left = {fork(lambda: work(rank)): rank for rank in range(RANKS)}  # noqa: B023
    ended = [0] * RANKS
    while left:
        pid, status = os.wait()
        ended[left.pop(pid)] = os.waitstatus_to_exitcode(status)
        for other in left if status else ():
            os.kill(other, KILL)
    return ended


def strike(victim: int, nth: int, share: float, longest: float) -> Callable[[int], None]:
    """What kills one rank, from the start of its nth save on after that share of the time."""

    def prepare(rank: int) -> None:
        plain, count = background.BackgroundWriter.start, [0]

        def start(*args: object) -> object:
            count[0] += 1
            if rank == victim and count[0] == nth:
                threading.Timer(share * longest, os.kill, (os.getpid(), KILL)).start()
            return plain(*args)  # type: ignore[arg-type]

        background.BackgroundWriter.start = start  # type: ignore[assignment,method-assign]

    return prepare


def seconds_of(save: Path) -> Callable[[int], None]:
    """What writes into a file how long the first rank's saves took."""

    def prepare(rank: int) -> None:
        plain, began = background.write_share, time.monotonic

        def written(*args: object) -> object:
            at = began()
            found = plain(*args)  # type: ignore[arg-type]
            with save.open("a", encoding="utf-8") as file:
                file.write(f"{began() - at}\n")
            return found

        if rank == 0:
            background.write_share = written  # type: ignore[assignment]

    return prepare


def main(root: Path, kills: int = KILLS) -> list[dict[str, object]]:
    import deepspeed  # noqa: F401  (loads once, before the forks)

    assert child(lambda: (root / "names.json").write_text(json.dumps(tiny_assets(root))) and None) == 0
    port = 24000 + os.getpid() % 4000
    assert both(words(root, "alone"), port, seconds_of(root / "seconds")) == [0, 0]
    longest = 2 * max(map(float, (root / "seconds").read_text(encoding="utf-8").split()))
    want, generator, out = digest(root / "alone"), random.Random(0), []
    for i in range(kills):
        name, share, nth = f"killed-{i}", generator.random(), generator.choice((1, 2, 3))
        first = both(words(root, name), port + 2 * i + 1, strike(i % RANKS, nth, share, longest))
        kept = [p.name for p in checkpoints(root / name / "checkpoints")]
        resumed = both(["train", "--resume", "--out", str(root / name)], port + 2 * i + 2)
        same = digest(root / name) == want
        out.append(
            {
                "save": nth,
                "after": round(share * longest, 4),
                "first": first,
                "kept": kept,
                "resumed": resumed,
                "same": same,
            }
        )
        print(json.dumps(out[-1]), flush=True)
    return out


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
