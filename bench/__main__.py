"""python -m bench: check each implementation's result, time it in turns with its rivals, print ratios, append rows
to bench/results/<card>.csv.

    python -m bench                               every op, full shapes, float32 on a CPU, bfloat16 on a GPU
    python -m bench --ops gae sample --threads 2
    python -m bench --ops losses --cold           with caches that hold something else, as after a forward
    python -m bench --quick                       small shapes, seconds
    python -m bench --ops linear_nll --shape qwen2.5-7b        on a model's own width and vocabulary
    python -m bench --ops gae --compare COMMIT    this checkout beside another commit of it, in turns
    python -m bench table                         the newest rows as a Markdown table; --readme FILE puts it there
    python -m bench page                          bench/results as one HTML page with plots

A result that is wrong is not timed; if it is one of ours the exit status is 1. What cannot run is named, with its
reason."""

import argparse
import dataclasses
import datetime
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import compare, machine, memory, page, results
from .ops import OPS
from .problem import SHAPES, Problem, error_of
from .results import Row
from .timing import GRAPH_CALLS, Stats, colder, graphed, in_turns, quantile

SMALL = 64 * 2**20  # bytes: ops on less are bound by launches
BEGIN, END = "<!-- table: bench/results -->", "<!-- end table -->"


class Session:
    """One run of the benchmark on one device: its ceilings, its rows, what went wrong."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        self.card, self.commit, self.versions = (
            machine.card(self.device),
            args.commit or machine.commit(),
            machine.versions(self.device),
        )
        self.threads = torch.get_num_threads() if self.device.type == "cpu" else 0
        self.size = args.shape or ("quick" if args.quick else "full")
        self.peak_bytes = machine.bandwidth(
            self.device, args.seconds, 16 if args.quick else 1024 if self.device.type == "cuda" else 128
        )
        self.peak_flops: dict[torch.dtype, float] = {}
        self.wrong: list[str] = []

    def measure(self, problem: Problem) -> None:
        title = f"{problem.op} {problem.mode}, {str(problem.dtype)[6:]} {problem.shape}"
        print(f"\n{title}", flush=True)
        for name, reason in problem.missing.items():
            print(f"  {name:27} not here: {reason}"[:80])
        right = self.right_ones(problem)
        if not any(name.startswith("ppomax") for name in right):
            return
        cool = colder(self.device) if self.args.cold else None
        stats = in_turns({name: problem.runs[name] for name in right}, self.device, self.args.seconds, cool=cool)
        self.record([self.row(problem, name, stats[name]) for name in right])
        if self.device.type == "cuda" and problem.bytes and problem.bytes < SMALL:
            self.measure_on_device(problem, right)

    def measure_on_device(self, problem: Problem, names: list[str]) -> None:
        """Small ops again as CUDA graphs: above, Python and the launches are what is timed."""
        graphs = {}
        for name in names:
            try:
                graphs[name] = graphed(problem.runs[name])
            except RuntimeError as error:
                torch.cuda.synchronize()
                print(f"  {name:32} no CUDA graph: {str(error).splitlines()[0]}"[:200])
        if any(name.startswith("ppomax") for name in graphs):
            stats = in_turns(graphs, self.device, self.args.seconds, GRAPH_CALLS)
            rows = [self.row(problem, name, stats[name]) for name in graphs]
            self.record(
                [dataclasses.replace(row, mode=f"{row.mode}, CUDA graph", peak_memory_mib=None) for row in rows]
            )

    def record(self, rows: list[Row]) -> None:
        self.show(rows)
        results.append(self.args.out, rows)

    def right_ones(self, problem: Problem) -> list[str]:
        """The runs that give the right result. One of ours that fails or is wrong fails the whole session."""
        truth, right = list(problem.truth()), []
        limit = self.limit(problem, truth)
        for name, run in problem.runs.items():
            if name in problem.needs_compile and not self.args.compile:
                print(f"  {name:27} left out by --no-compile")
                continue
            mine = name.startswith("ppomax")
            try:
                found = run()
                if name not in problem.unchecked and not name.startswith("bare"):
                    error = error_of(problem, found, truth)
                    if not error <= limit:
                        raise ArithmeticError(f"relative error {error:.3g} > {limit:.3g}")
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                print(f"  {name:27} not timed: {type(error).__name__}: {first}"[:200])
                if mine:
                    self.wrong.append(f"{problem.op} {problem.mode} {name}: {error}")
                continue
            right.append(name)
        return right

    def limit(self, problem: Problem, truth: Sequence[Tensor]) -> float:
        """The largest relative error that counts as right: in 16 bit, where a loss near 0 may have few right digits,
        no less than that of eager torch."""
        if problem.dtype in (torch.float32, torch.float64) or "eager" not in problem.runs:
            return problem.tolerance
        eager = error_of(problem, problem.runs["eager"](), truth)
        return max(problem.tolerance, eager) if math.isfinite(eager) else problem.tolerance

    def row(self, problem: Problem, name: str, stats: Stats) -> Row:
        seconds = stats.median
        rate = problem.bytes / seconds if problem.bytes else None
        flops = problem.flops / seconds if problem.flops else None
        share = rate / self.peak_bytes if rate else flops / self.gemm_peak(problem.dtype) if flops else None
        return Row(
            date=self.date,
            commit=self.commit,
            card=self.card,
            threads=self.threads,
            versions=self.versions,
            op=problem.op,
            impl=name,
            mode=f"{problem.mode}, cold" if self.args.cold else problem.mode,
            dtype=str(problem.dtype)[6:],
            shape=problem.shape,
            median_us=1e6 * seconds,
            p20_us=1e6 * quantile(stats, 0.2),
            p80_us=1e6 * quantile(stats, 0.8),
            gb_per_s=rate / 1e9 if rate else None,
            tflop_per_s=flops / 1e12 if flops else None,
            share_of_peak=share,
            peak_memory_mib=self.peak_memory(problem, name),
        )

    def gemm_peak(self, dtype: torch.dtype) -> float:
        if dtype not in self.peak_flops:
            self.peak_flops[dtype] = machine.gemm_rate(self.device, dtype, self.args.seconds)
            print(f"  ({str(dtype)[6:]} GEMM: {self.peak_flops[dtype] / 1e12:.3g} TFLOP/s)")
        return self.peak_flops[dtype]

    def peak_memory(self, problem: Problem, name: str) -> float | None:
        if not problem.memory or not self.args.memory or name in problem.unchecked:
            return None
        if self.device.type == "cuda":
            return memory.on_gpu(problem.runs[name]) / 2**20
        if name in problem.needs_compile:
            return None
        used = memory.on_cpu(problem, name, self.size)
        return None if used is None else used / 2**20

    def show(self, rows: list[Row]) -> None:
        """Lines of at most 80 columns: what a row of the file holds besides is rates and memory."""
        own = next(row.median_us for row in rows if row.impl.startswith("ppomax"))
        for row in rows:
            spread = f"{microseconds(row.p20_us)} to {microseconds(row.p80_us)}"
            share = f"{100 * row.share_of_peak:3.0f} %" if row.share_of_peak else ""
            extra = f"{row.peak_memory_mib:7.1f}" if row.peak_memory_mib is not None else ""
            time = microseconds(row.median_us)
            line = f"  {row.impl:27.27} {time:>9} {spread:>18} {row.median_us / own:6.2f} {share:>5} {extra}"
            print(line.rstrip(), flush=True)


def microseconds(x: float) -> str:
    """Three digits or more, no exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    session = Session(args)
    print(f"{session.card}, commit {session.commit}, {torch.get_num_threads()} threads\n{session.versions}")
    print(
        f"memory: {session.peak_bytes / 1e9:.1f} GB/s ({'copy' if session.device.type == 'cuda' else 'threaded read'})"
    )
    print(f"  {'':27} {'median us':>9} {'p20 to p80':>18} {'ratio':>6} {'peak':>5} MiB")
    for name in args.ops or OPS:
        for dtype in args.dtype or ([torch.bfloat16] if session.device.type == "cuda" else [torch.float32]):
            for problem in OPS[name](session.device, dtype, session.size):
                session.measure(problem)
                torch._dynamo.reset()  # else the rivals of the next problem meet the recompilation limit
    for line in session.wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if session.wrong else 0


def table(args: argparse.Namespace) -> int:
    text = results.table(results.read(args.out))
    if args.readme is None:
        print(text)
        return 0
    try:
        results.put_between(args.readme, BEGIN, END, text)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def dtype_named(name: str) -> torch.dtype:
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in names:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(names)}")
    return names[name]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("run", "table", "page"), default="run")
    parser.add_argument("--ops", nargs="+", choices=tuple(OPS), help="which ops (default: all)")
    parser.add_argument("--dtype", nargs="+", type=dtype_named, help="float32, bfloat16, float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU (default: as torch has it)")
    parser.add_argument("--seconds", type=float, help="spent on each implementation (default: 2, with --quick 0.05)")
    parser.add_argument("--quick", action="store_true", help="small shapes; no memory")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="width and vocabulary of a model, in place of ours")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--cold", action="store_true", help="empty the caches before each call; rows say so")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave peak memory out")
    parser.add_argument("--commit", help="what the rows are labelled with (default: as git says)")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the CSV files")
    parser.add_argument("--readme", type=Path, help="with table: the file to put it into")
    parser.add_argument("--compare", metavar="COMMIT", help="run that commit's kernels too, in turns, and print ratios")
    parser.add_argument("--page", type=Path, default=Path("bench.html"), help="with page: where it goes")
    args = parser.parse_args()
    args.seconds = args.seconds if args.seconds is not None else 0.05 if args.quick else 2.0
    args.memory = args.memory and not args.quick
    if args.what == "page":
        print(page.write(results.read(args.out), args.page))
        return 0
    if args.compare:
        return compare.against(args.compare, sys.argv[1:])
    return table(args) if args.what == "table" else run(args)


if __name__ == "__main__":
    sys.exit(main())
