"""Runs of `ppomax train` that are killed at any moment of theirs, and then resumed.

    python -m tests.engine.kill_clock FOLDER [KILLS]     prints one JSON line a kill
Half of them write checkpoints while training goes on. Each is a forked process, so that start-up, loading, rollout,
update, saving, pruning and the report are met as often as they take time, from the first millisecond on. A resumed run
must end as the undisturbed one did: the exported policy, both models and optimisers of the last checkpoint, and every
row, times aside, to the bit. Where the kill came before anything was begun, the resume says so, and the job starts
anew."""

import io
import json
import random
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

from ppomax.cli import main as ppomax

from tests.engine.kill_driver import child, digest
from tests.engine.tiny import SMALL, tiny_assets

KILLS = 60
STEPS = 4


def words(root: Path, name: str, beside: bool = False) -> list[str]:
    """Of the command; beside: checkpoints are written while training goes on."""
    knobs = {**SMALL, **json.loads((root / "names.json").read_text()), "ptx.coef": 0.1, "ptx.pool": 16,
             "critic.pretrain_steps": 2, "monitor.samples_every": 2, "monitor.sample_prompts": 2,
             "run.keep_checkpoints": 1, "run.threads": 1, "run.steps": STEPS, "run.background_saves": beside,
             "run.checkpoint_every": 1}  # fmt: skip
    return ["train", *(f"--{k}={v}" for k, v in knobs.items()), "--out", str(root / name)]


def train(argv: list[str], said: Path) -> None:
    """In a child: the exit status is the command's, and what it said on standard error is kept."""
    err = io.StringIO()
    with redirect_stderr(err):
        status = ppomax(argv)
    said.write_text(err.getvalue(), encoding="utf-8")
    if status:
        raise SystemExit(status)


def rows(run: Path) -> list[dict[str, object]]:
    """Every row that a run left, without times."""
    found = []
    for name in ("metrics.jsonl", "samples.jsonl", "scores.jsonl", "alarms.jsonl"):
        if (run / name).is_file():
            for line in (run / name).read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                found.append({k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} | {"file": name})
    return found


def main(root: Path, kills: int = KILLS) -> list[dict[str, object]]:
    assert child(lambda: (root / "names.json").write_text(json.dumps(tiny_assets(root))) and None) == 0
    began = time.monotonic()
    assert child(lambda: train(words(root, "alone"), root / "said")) == 0
    whole = time.monotonic() - began
    want, want_rows = digest(root / "alone"), rows(root / "alone")
    generator, out = random.Random(0), []
    for i in range(kills):
        name, delay = f"killed-{i}", generator.random() * whole
        argv = words(root, name, beside=i % 2 == 1)
        first = child(lambda: train(argv, root / "said"), delay)  # noqa: B023
        resumed = child(lambda: train(["train", "--resume", "--out", str(root / name)], root / "said"))  # noqa: B023
        said = (root / "said").read_text(encoding="utf-8") if resumed else ""
        begun = not ("no run was begun there" in said or "there is no folder" in said)
        if not begun:
            resumed = child(lambda: train(argv, root / "said"))  # noqa: B023
        out.append(
            {
                "after": round(delay / whole, 3),
                "first": first,
                "begun": begun,
                "resumed": resumed,
                "same": digest(root / name) == want,
                "rows": rows(root / name) == want_rows,
            }
        )
        print(json.dumps(out[-1]), flush=True)
    return out


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
