"""What fuzz.py, kill_clock.py and kill_ranks.py find, which is to be nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.kill_clock import KILLS
from tests.engine.kill_ranks import KILLS as RANK_KILLS

ROOT = Path(__file__).parents[2]


def module(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.parametrize(("kind", "least"), [("knobs", 2000), ("data", 200), ("models", 100), ("rewards", 60)])
def test_wrong_input_ends_in_a_word_that_names_it(kind: str, least: int) -> None:
    parts = [module("tests.engine.fuzz", kind, part, "2") for part in ("0", "1")]
    said = [process.communicate()[0] for process in parts]
    cases = [int(n) for text in said for n in re.findall(rf"^{kind}: (\d+) cases", text, re.MULTILINE)]
    assert len(cases) == 2, "a part did not come to its end"
    assert [p.returncode for p in parts] == [0, 0], "\n".join(said)
    assert sum(cases) >= least


@pytest.mark.slow
@pytest.mark.kills
def test_a_run_killed_at_any_moment_is_resumed_to_the_bit(tmp_path: Path) -> None:
    process = module("tests.engine.kill_clock", str(tmp_path))
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    found = [json.loads(line) for line in said.splitlines()]
    assert len(found) == KILLS
    bad = [kill for kill in found if not (kill["resumed"] == 0 and kill["same"] and kill["rows"])]
    assert not bad
    assert sum(kill["first"] == -9 for kill in found) > KILLS // 2


@pytest.mark.slow
@pytest.mark.kills
def test_two_ranks_killed_while_they_save_resume_to_the_bit(tmp_path: Path) -> None:
    process = module("tests.engine.kill_ranks", str(tmp_path))
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert len(found) == RANK_KILLS
    assert not [kill for kill in found if not (kill["resumed"] == [0, 0] and kill["same"])]
    assert sum(-9 in kill["first"] for kill in found) > RANK_KILLS // 2
