"""A reward model on pairs of several sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ppomax.assets import named_model, shipped
from ppomax.cli import main
from ppomax.data.rows import DataError
from ppomax.models import load_reward_model, load_tokenizer
from ppomax.stages.evaluate_reward import evaluate_reward, judged_pairs
from ppomax.stages.reward_model import score_pairs

from tests.engine.tiny import tiny_assets


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pairs that the reward model agrees with, the same ones turned round, and an evaluation."""
    monkeypatch.chdir(tmp_path)
    tiny_assets(tmp_path)
    words = [f"w{5 + i} w{9 + 2 * i}" for i in range(12)]
    rows = [{"prompt": "w4 w5", "chosen": a, "rejected": b} for a, b in zip(words[:6], words[6:], strict=True)]
    from ppomax.data import load_pairs

    tokenizer, model = load_tokenizer("reward"), load_reward_model("reward")
    pairs, _ = load_pairs(rows, tokenizer, 99)
    better, worse = score_pairs(model, pairs)
    sides = ("chosen", "rejected")
    right = [
        row if a > b else {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
        for row, a, b in zip(rows, better, worse, strict=True)
    ]
    wrong = [{"prompt": r["prompt"], sides[0]: r[sides[1]], sides[1]: r[sides[0]]} for r in right]
    for name, given in (("right.jsonl", right), ("wrong.jsonl", wrong)):
        Path(name).write_text("".join(json.dumps(r) + "\n" for r in given))
    judged = [
        {"prompt": r["prompt"], "policy": r["chosen"], "baseline": r["rejected"], "verdict": "win"} for r in right
    ]
    judged[0] = judged[0] | {"policy": right[0]["rejected"], "baseline": right[0]["chosen"], "verdict": "lose"}
    judged[1]["verdict"] = "tie"
    Path("evaluation.json").write_text(json.dumps({"rows": judged}))
    return ["right.jsonl", "wrong.jsonl", "evaluation.json"]


def test_each_source_gets_its_own_figures(sources: list[str], capsys: Any) -> None:
    assert main(["evaluate-reward", "reward", *sources, "--out", "out"]) == 0
    said = capsys.readouterr().out
    held = json.loads(Path("out/reward_evaluation.json").read_text())["sources"]
    assert [held[s]["accuracy"] for s in sources] == [1.0, 0.0, 1.0]
    assert [held[s]["pairs"] for s in sources] == [6, 6, 5]
    assert held["right.jsonl"]["score_gap"] == pytest.approx(-held["wrong.jsonl"]["score_gap"])
    assert held["right.jsonl"]["accuracy_95"][0] == pytest.approx(0.6097, abs=1e-4)
    assert "100.0% (61.0% to 100.0%)" in said
    assert all(Path(f"out/pairs-{i}.png").stat().st_size > 1000 for i in (1, 2, 3))


def test_bad_sources_are_named(sources: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        evaluate_reward("reward", [sources[0], "nothing.jsonl"], tmp_path / "out")
    Path("evaluation.json").write_text(json.dumps({"rows": [{"verdict": "tie"}]}))
    with pytest.raises(DataError, match="ties alone"):
        judged_pairs(Path("evaluation.json"))
    Path("evaluation.json").write_text("[1]")
    with pytest.raises(DataError, match=r"is no evaluation\.json"):
        judged_pairs(Path("evaluation.json"))


def test_default_is_the_reward_model_that_ships() -> None:
    assert named_model("default", "reward_model") == str(shipped("reward_model"))
    assert named_model("default") == str(shipped("policy"))
