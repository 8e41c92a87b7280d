"""`python -m bench.lab run | judge | page`; see the package's docstring."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from bench.lab.grid import GRID, GridError, read_grid
from bench.lab.runs import RESULTS, run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lab", description="The paper's figures, with seeds.")
    parser.add_argument("what", choices=("run",))
    parser.add_argument("--figures", nargs="*", default=[], help="numbers of the paper's; none: all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--work", type=Path, default=Path("build/lab"), help="folder of runs and their samples")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the append-only results")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, a thread each")
    given = parser.parse_args()
    try:
        grid = read_grid(given.grid)
        others = [subprocess.Popen([sys.executable, "-m", "bench.lab", *sys.argv[1:], "--processes", "1"])
                  for _ in range(given.processes - 1)]  # fmt: skip
        for line in run_all(grid, given.figures, given.seeds, given.work, given.results):
            print(line, flush=True)
        codes = [other.wait() for other in others]
    except GridError as error:
        sys.exit(f"bench.lab: {error}")
    if any(codes):
        sys.exit(f"bench.lab: {sum(map(bool, codes))} of the processes failed; what they say is above")


if __name__ == "__main__":
    main()
