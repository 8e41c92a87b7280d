"""The benchmark tool runs, checks results before the clock starts, and appends rows of the agreed form. No time is
asserted."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import ppomax_kernels as K
import pytest
import torch

from bench import cases, machine, page, results, timing
from bench.__main__ import BEGIN, END
from bench.ops import OPS
from bench.problem import SHAPES, error_of
from bench.results import COLUMNS

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    quick = [
        "--quick",
        "--no-compile",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--ops",
        "gae",
        "sample",
        "--out",
        str(out),
    ]
    for _ in range(2):
        done = bench(*quick)
        assert done.returncode == 0, done.stdout + done.stderr
        assert max(map(len, done.stdout.splitlines())) <= 80
    return out


def test_rows_are_appended(folder: Path) -> None:
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == COLUMNS
    half = len(rows) // 2
    assert [row[5:10] for row in rows[:half]] == [row[5:10] for row in rows[half:]]
    impls = {(row["op"], row["impl"]) for row in (dict(zip(COLUMNS, r, strict=True)) for r in rows)}
    assert {("gae", "ppomax cpu"), ("gae", "loop as in verl"), ("sample", "ppomax cpu")} <= impls
    for row in (dict(zip(COLUMNS, r, strict=True)) for r in rows):
        assert 0.0 < float(row["p20_us"]) <= float(row["median_us"]) <= float(row["p80_us"])
        assert float(row["gb_per_s"]) > 0.0
        assert float(row["share_of_peak"]) > 0.0
        assert (row["threads"], row["dtype"]) == ("1", "float32")


def test_the_file_is_named_by_the_instruction_set(folder: Path) -> None:
    """Machines of one name differ by half of their rate."""
    (path,) = folder.glob("*.csv")
    assert path.stem.endswith(machine.instruction_set().lower().replace(" ", "-"))


@pytest.mark.parametrize("op", ["token_logprobs", "linear_nll", "sample"])
def test_a_named_shape_is_the_model_s(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "llama-2-7b", (24, 320))  # of the same form, without its size
    problem = next(OPS[op](torch.device("cpu"), torch.float32, "llama-2-7b"))
    width = "x24" if op.startswith("linear") else ""
    assert problem.shape.endswith(f"{width}x320")


def test_named_shapes_are_those_of_the_models() -> None:
    assert SHAPES["llama-2-7b"] == (4096, 32000)
    assert SHAPES["qwen2.5-7b"] == (3584, 152064)


def test_results_become_a_page(folder: Path, tmp_path: Path) -> None:
    done = bench("page", "--out", str(folder), "--page", str(tmp_path / "bench.html"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "bench.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 2
    assert "loop as in verl" in text
    assert "<td>8x64</td>" in text
    assert page.size_of("1024x512x32000") == 1024 * 512 * 32000
    assert page.size_of("32768 in 8") == 32768


@pytest.mark.slow
def test_a_commit_is_compared_in_turns() -> None:
    """Built, run beside this checkout, and nothing is left of it."""
    done = bench("--quick", "--ops", "gae", "--threads", "1", "--compare", "HEAD")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("gae forward float32 8x64")
    assert float(last.split()[-1]) > 0.0
    kept = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(kept.splitlines()) == 1


def test_a_step_s_products_are_counted() -> None:
    """Those of a linear layer and its gradients, and of a fused loss."""
    from bench.step import Products, replay

    x, layer = torch.randn(6, 8), torch.nn.Linear(8, 5)
    with Products() as counted:
        layer(x).sum().backward()
        hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
        K.linear_nll(hidden, weight, torch.arange(6))[0].backward()
    assert counted.seen == {(6, 8, 5): 1, (5, 6, 8): 1, (6, 8, 30): 1, (6, 30, 8): 1, (30, 6, 8): 1}
    replay(counted.seen, torch.mm)()


def test_table_goes_into_a_readme(folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    done = bench("table", "--out", str(folder), "--readme", str(readme))
    assert done.returncode == 0, done.stderr
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| card |")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| `gae` (cpu) | forward | float32 | 8x64 |" in text


def test_a_wrong_result_is_seen() -> None:
    (problem,) = cases.gae(torch.device("cpu"), torch.float32, "tiny")
    truth = list(problem.truth())
    assert error_of(problem, problem.runs["ppomax cpu"](), truth) <= problem.tolerance
    for wrong in (
        torch.zeros_like(truth[0]),
        truth[0] * 1.01,
        truth[0].roll(1, 1),
        truth[0] + torch.nan,
        truth[0][:, 1:],
    ):
        assert not error_of(problem, [wrong, truth[1]], truth) <= problem.tolerance
    for bad in ([0, 0], [63, 1]):
        (draws,) = cases.sample(torch.device("cpu"), torch.float32, "tiny")
        token = torch.tensor(bad[:1])
        assert not error_of(draws, [token, torch.zeros(1)], []) <= draws.tolerance


def test_wrong_results_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import __main__ as program
    from bench import rivals

    monkeypatch.setattr(rivals, "gae_loop_openrlhf", lambda r, v, m, gamma, lam: (r, v))
    quick = ["bench", "--quick", "--no-compile", "--device", "cpu", "--ops", "gae", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", quick)
    assert program.main() == 0
    assert "loop as in OpenRLHF         not timed: ArithmeticError: relative error" in capsys.readouterr().out
    impls = [row["impl"] for row in results.read(tmp_path)]
    assert impls == ["ppomax cpu", "loop as in TRL", "loop as in verl"]
    monkeypatch.setattr(rivals, "gae_loop_verl", lambda r, v, m, gamma, lam: (r, v))  # now the truth is another
    assert program.main() == 1
    assert len(results.read(tmp_path)) == len(impls)


def test_cold_calls_come_after_something_else_filled_the_caches(tmp_path: Path) -> None:
    given = ["--quick", "--cold", "--no-compile", "--device", "cpu", "--threads", "1", "--ops", "gae", "--no-memory"]
    done = bench(*given, "--seconds", "0.001", "--out", str(tmp_path), "--commit", "cold")
    assert done.returncode == 0, done.stdout + done.stderr
    with next(tmp_path.glob("*.csv")).open(encoding="utf-8") as file:
        modes = {row["mode"] for row in csv.DictReader(file)}
    assert modes
    assert all(mode.endswith(", cold") for mode in modes)


def test_what_empties_the_caches_is_not_timed() -> None:
    log: list[str] = []
    stats = timing.in_turns(
        {"a": lambda: log.append("a"), "b": lambda: log.append("b")},
        torch.device("cpu"),
        1e-6,
        cool=lambda: (log.append("cool"), time.sleep(0.01)),
    )
    assert all(x == "cool" for x in log[::2])
    assert {"a", "b"} == set(log[1::2])
    assert all(s.max < 0.005 for s in stats.values())
