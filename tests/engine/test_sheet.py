"""People as judges: the page tells no side, its answers come back as verdicts, and agreement is Cohen's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ppomax.cli import main
from ppomax.stages.judges import JudgeError
from ppomax.stages.sheet import Judged, agreement, cohens_kappa, read_answers, write_sheet

from tests.engine.tiny import tiny_assets

NASTY = "</script><script>alert(1)</script> & <b>bold</b>"


def evaluation(rows: int = 40) -> dict[str, Any]:
    verdicts = ["win", "lose", "tie", None]
    return {
        "rows": [
            {"prompt": f"prompt {i} {NASTY}", "policy": f"P {i}", "baseline": f"B {i}", "verdict": verdicts[i % 4]}
            for i in range(rows)
        ]
    }


def on_the_page(path: Path) -> dict[str, Any]:
    """The page's data, found as a browser would: the script element ends at the first end tag."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def answered(held: dict[str, Any], folder: Path, name: str, choose: Any, **changes: Any) -> Path:
    answers = {str(i): choose(i, row) for i, row in enumerate(held["rows"])}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"sheet": held["sheet"], "person": name, "answers": answers} | changes))
    return path


def test_the_page_shows_every_pair_once_and_tells_no_side(tmp_path: Path) -> None:
    held = evaluation()
    data = on_the_page(write_sheet(held, tmp_path, seed=1))
    assert sorted(row["id"] for row in data["rows"]) == list(range(40))
    assert [row["id"] for row in data["rows"]] != list(range(40))
    for row in data["rows"]:
        i = row["id"]
        assert {row["left"], row["right"]} == {f"P {i}", f"B {i}"}
        assert row["prompt"] == held["rows"][i]["prompt"]
        assert (row["left"] == f"P {i}") == (held["rows"][i]["left"] == "policy")
        assert set(row) == {"id", "prompt", "left", "right"}
    lefts = [row["left"] == "policy" for row in held["rows"]]
    assert 10 < sum(lefts) < 30
    words = (tmp_path / "sheet.html").read_text()
    assert "DATA_HERE" not in words
    assert "http" not in words.replace("http-equiv", "")


def test_answers_are_seen_from_the_policy(tmp_path: Path) -> None:
    held = evaluation()
    write_sheet(held, tmp_path, seed=1)

    def for_the_policy(i: int, row: dict[str, Any]) -> str:
        return "equal" if i == 0 else "left" if row["left"] == "policy" else "right"

    found = read_answers(held, answered(held, tmp_path, "Ann", for_the_policy))
    assert found.name == "Ann"
    assert found.verdicts == {0: "tie"} | dict.fromkeys(range(1, 40), "win")
    assert found.win_rate()[0] == pytest.approx(39.5 / 40)


def test_kappa_is_cohens() -> None:
    # Cohen 1960's form on 50 rows: 20 and 15 alike of two kinds, 5 and 10 not: observed 0.7, chance 0.5, kappa 0.4.
    first = Judged("a", dict(enumerate(["win"] * 25 + ["lose"] * 25)))
    second = Judged("b", dict(enumerate(["win"] * 20 + ["lose"] * 5 + ["win"] * 10 + ["lose"] * 15)))
    assert cohens_kappa(first, second) == (pytest.approx(0.4), 50)
    assert cohens_kappa(first, first) == (pytest.approx(1.0), 50)
    assert cohens_kappa(first, Judged("c", {99: "win"}))[1] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sheet": "another"}, "answers sheet another"),
        ({"answers": {"40": "left"}}, r"row 40; rows are 0\.\.39"),
        ({"answers": {"1": "up"}}, "answer 'up' to row 1"),
        ({"answers": {}}, "no answer"),
        ({"answers": {"x": "left"}}, "holds no answers"),
        ({"answers": ["left"]}, "holds no answers"),
    ],
)
def test_other_answers_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    held = evaluation()
    write_sheet(held, tmp_path, seed=1)
    with pytest.raises(JudgeError, match=message):
        read_answers(held, answered(held, tmp_path, "Ann", lambda i, row: "left", **changes))


def test_an_evaluation_without_a_sheet_is_told(tmp_path: Path) -> None:
    held = evaluation()
    write_sheet(held, tmp_path, seed=1)
    path = answered(held, tmp_path, "Ann", lambda i, row: "left")
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    with pytest.raises(JudgeError, match="--sheet"):
        agreement(tmp_path, [path])
    with pytest.raises(JudgeError, match=r"is no evaluation\.json"):
        agreement(path, [path])


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_assets(tmp_path)
    flags = ["--policy", "policy", "--baseline", "policy", "--prompts", "prompts.jsonl", "--reward_model", "reward"]
    assert main(["evaluate", *flags, "--max_new_tokens", "8", "--out", "out", "--sheet"]) == 0
    assert "ppomax agreement out ANSWERS" in capsys.readouterr().out
    held = json.loads(Path("out/evaluation.json").read_text())
    ann = answered(held, tmp_path, "Ann", lambda i, row: "equal")
    bob = answered(held, tmp_path, "Bob", lambda i, row: "left" if row["left"] == "policy" else "equal")
    assert main(["agreement", "out", str(ann), str(bob)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"Ann +50\.0%", said)
    assert "Bob - the judge" in said
    assert main(["agreement", "out", "nothing.json"]) == 2
