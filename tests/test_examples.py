"""The examples run as their head notes say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "engine" / "examples"


def run(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words], capture_output=True, text=True, cwd=EXAMPLES.parents[1]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_kernels_in_a_loop_of_ones_own_learn_the_task() -> None:
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", run("kernels_in_your_loop.py"))]
    assert len(rewards) == 12
    assert rewards[0] < 0.6
    assert rewards[-1] > 0.8


def test_a_whole_trainer_is_80_lines() -> None:
    assert len((EXAMPLES / "kernels_in_your_loop.py").read_text(encoding="utf-8").splitlines()) <= 80


def test_the_loss_in_an_accelerate_loop_learns_the_task() -> None:
    pytest.importorskip("accelerate", reason="accelerate: not installed")
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", run("loss_in_an_accelerate_loop.py"))]
    assert len(rewards) == 6
    assert rewards[-1] > rewards[0] + 0.2


def test_an_engine_takes_a_python_reward() -> None:
    lines = run("engine_with_python_reward.py", "--steps", "2").splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["step", "0"], ["step", "1"]]
    assert lines[2].startswith("held-out preview:")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_every_example_has_a_test(path: Path) -> None:
    assert f'"{path.name}"' in Path(__file__).read_text(encoding="utf-8")
