"""`python -m bench ... --compare COMMIT`: this checkout's kernels and another commit's, each built and in processes of
its own, in turns; the ratio of medians of every problem that both have."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ppomax_kernels.backends import abi

from . import results
from .machine import ROOT

TURNS = 3
START = (
    "import runpy, sys; "
    "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in type(f).__name__ and 'Redirect' not in "
    "type(f).__name__]; "
    "sys.argv[0] = 'bench'; runpy.run_module('bench', run_name='__main__')"
)
"""An editable install's own finder would give this checkout's package to both."""
KEY = ("op", "impl", "mode", "dtype", "shape", "threads")


def against(commit: str, words: Sequence[str]) -> int:
    """Run `python -m bench` with `words` in both trees, print the ratios; exit status 1 if a run fails."""
    rest = [w for i, w in enumerate(words) if w != "--compare" and (i == 0 or words[i - 1] != "--compare")]
    rest = [w for w in rest if not w.startswith("--compare=")] + ["--no-memory", "--no-compile"]
    with tempfile.TemporaryDirectory() as scratch:
        trees = {"this": _copied(Path(scratch) / "this"), commit: _built(commit, Path(scratch) / "other")}
        medians: dict[str, dict[tuple[str, ...], list[float]]] = {name: defaultdict(list) for name in trees}
        try:
            for turn in range(TURNS):
                for name, tree in trees.items():
                    print(f"turn {turn + 1} of {TURNS}: {name}", flush=True)
                    out = Path(scratch) / f"rows-{turn}-{name}"
                    done = _run(tree, [*rest, "--commit", name, "--out", str(out)])
                    if done.returncode:
                        print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
                        return 1
                    for row in results.read(out):
                        medians[name][tuple(row[k] for k in KEY)].append(float(row["median_us"]))
        finally:
            _git("worktree", "remove", "--force", str(trees[commit]))
    _report(commit, medians["this"], medians[commit])
    return 0


def _report(commit: str, this: dict[tuple[str, ...], list[float]], other: dict[tuple[str, ...], list[float]]) -> None:
    print(f"\n{'':48} {'this us':>9} {commit[:9]:>9} {'ratio':>6}")
    for key in sorted(this.keys() & other.keys()):
        if key[1].startswith("ppomax"):
            mine, theirs = (statistics.median(x[key]) for x in (this, other))
            print(f"{' '.join((key[0], key[2], key[3], key[4])):48.48} {mine:9.4g} {theirs:9.4g} {mine / theirs:6.2f}")
    lost = sorted(k for k in this.keys() ^ other.keys() if k[1].startswith("ppomax"))
    if lost:
        print(f"{len(lost)} problems are in one of the two alone: {' '.join(lost[0][:4])} ...")


def _copied(tree: Path) -> Path:
    """This checkout's packages, changed files included, with its library."""
    for part in ("bench", "kernels"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(abi.library_path(), tree / "kernels" / "ppomax_kernels" / abi.LIBRARY)
    return tree


def _built(commit: str, tree: Path) -> Path:
    """A work tree of `commit` with its library built in it."""
    _git("worktree", "add", "--detach", str(tree), commit)
    build = tree / "build" / "bench"
    for words in (["-S", str(tree), "-B", str(build), "-DPPOMAX_CUDA=OFF"], ["--build", str(build), "--parallel", "2"]):
        done = subprocess.run(["cmake", *words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{commit} could not be built: {done.stderr[-1000:]}")
    shutil.copy(build / abi.LIBRARY, tree / "kernels" / "ppomax_kernels" / abi.LIBRARY)
    return tree


def _run(tree: Path, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(tree), str(tree / "kernels"), str(ROOT / "engine")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", START, *words]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def _git(*words: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"git {' '.join(words)}: {done.stderr.strip()}")
