"""The examples run as their head notes say."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ppomax.cli import main
from ppomax.saving.model_folder import save_model

from tests.engine.tiny_text import tiny_llama, tiny_tokenizer

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


def commands_of(script: str, **named: str) -> list[list[str]]:
    """The lines of a shell script that call ppomax, as words, its variables put in."""
    text = re.sub(r"\\\n\s*", "", script)
    text = re.sub(r"\$(\w+)", lambda found: named.get(found[1], found[0]), text)
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("ppomax ")]


def test_the_three_stages_lead_from_a_base_model_to_an_exported_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of three_stages.sh, word for word, on a model of seconds and data of dialogues.py."""
    monkeypatch.chdir(tmp_path)
    save_model(tiny_llama(), tiny_tokenizer(), "base")
    run("dialogues.py", str(tmp_path / "data"))
    script = (EXAMPLES / "three_stages.sh").read_text(encoding="utf-8")
    given = commands_of(script, base="base", data="data", out="out")
    assert [words[0] for words in given] == ["sft", "reward-model", "train", "evaluate", "export"]
    for words in given:
        assert main(words) == 0, capsys.readouterr().err[-2000:]
    assert json.loads((tmp_path / "out" / "evaluation" / "evaluation.json").read_text())["win_rate"] is not None
    [last] = re.findall(r"<<'PYTHON'\n(.*?)\nPYTHON", script, re.S)
    monkeypatch.setattr(sys, "argv", ["-", "out/exported"])
    exec(compile(last, "three_stages.sh", "exec"), {})
    assert "Assistant" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh")]), ids=lambda p: p.stem)
def test_every_example_has_a_test(path: Path) -> None:
    """Here, or where two hosts are made."""
    here = Path(__file__)
    tests = [here, here.parent / "engine" / "test_two_hosts.py"]
    assert any(f'"{path.name}"' in test.read_text(encoding="utf-8") for test in tests)
