"""The same problems, on small shapes, as a pytest-benchmark suite: python -m pytest bench -n 0 --benchmark-enable
(its own tables, comparisons and storage). Results are checked here too; times are never asserted."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .ops import OPS
from .problem import Problem, error_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CASES = [
    pytest.param(problem, name, id=f"{problem.op}, {problem.mode}: {name}")
    for make in OPS.values()
    for problem in make(DEVICE, DTYPE, "quick")
    for name in problem.runs
    if name not in problem.needs_compile and name != "liger"  # both compile for a long time
]


@pytest.mark.parametrize(("problem", "name"), CASES)
def test_op(benchmark: BenchmarkFixture, problem: Problem, name: str) -> None:
    benchmark.group = f"{problem.op}, {problem.mode}"
    results = benchmark(problem.runs[name])
    if name not in problem.unchecked and not name.startswith("bare"):
        assert error_of(problem, results, list(problem.truth())) <= problem.tolerance
