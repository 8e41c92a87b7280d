"""People as judges: a blind page of an evaluation's pairs, and what their answers say.

The page (sheet.html, one file, no network) shows each prompt with both responses, rows and sides in a random order that
evaluation.json alone knows. Answers are kept in the browser as they are given, and saved as JSON."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ppomax.stages.judges import JudgeError, Verdict
from ppomax.stages.wilson import wilson

CHOICES = ("left", "equal", "right")
PAGE = Path(__file__).parent / "sheet.html"
"""The page but for its data, which goes in at DATA_HERE."""


def write_sheet(evaluation: dict[str, Any], out: Path, seed: int) -> Path:
    """`out`/sheet.html of the rows of evaluation.json; notes in them which side is which (`left`), and the sheet's name
    beside them."""
    rows, dice = evaluation["rows"], random.Random(seed)
    for row in rows:
        row["left"] = dice.choice(("policy", "baseline"))
    evaluation["sheet"] = name_of(rows)
    order = list(range(len(rows)))
    dice.shuffle(order)
    shown = [
        {"id": i, "prompt": rows[i]["prompt"], "left": _side(rows[i], "left"), "right": _side(rows[i], "right")}
        for i in order
    ]
    data = json.dumps({"sheet": evaluation["sheet"], "rows": shown}).replace("<", "\\u003c")
    path = out / "sheet.html"
    path.write_text(PAGE.read_text(encoding="utf-8").replace("DATA_HERE", data), encoding="utf-8")
    return path


def name_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A digest of the texts and their sides, so that answers to another sheet are told."""
    texts = [[row["prompt"], row["policy"], row["baseline"], row["left"]] for row in rows]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _side(row: Mapping[str, Any], side: str) -> str:
    other = {"policy": "baseline", "baseline": "policy"}
    return str(row[row["left"] if side == "left" else other[row["left"]]])


@dataclass(frozen=True)
class Judged:
    """Verdicts of one person, or of the evaluation's judge, by row."""

    name: str
    verdicts: dict[int, Verdict]

    def win_rate(self) -> tuple[float, float, float]:
        """(wins + ties / 2) / judged, and its 95 % Wilson interval."""
        counts = Counter(self.verdicts.values())
        rate = (counts["win"] + counts["tie"] / 2) / len(self.verdicts)
        return rate, *wilson(rate, len(self.verdicts))


def read_answers(evaluation: Mapping[str, Any], path: Path) -> Judged:
    """What a person said, seen from the policy. JudgeError: no answers to this evaluation's sheet."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        answers = {int(i): str(choice) for i, choice in given["answers"].items()}
        sheet, person = given["sheet"], str(given.get("person") or path.stem)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise JudgeError(f"agreement: {path} holds no answers as the sheet saves them ({error})") from error
    if "sheet" not in evaluation:
        raise JudgeError("agreement: this evaluation has no sheet; run ppomax evaluate with --sheet")
    if sheet != evaluation["sheet"]:
        raise JudgeError(f"agreement: {path} answers sheet {sheet}, this evaluation's is {evaluation['sheet']}")
    rows = evaluation["rows"]
    wrong = [(i, x) for i, x in answers.items() if not 0 <= i < len(rows) or x not in CHOICES]
    if wrong or not answers:
        what = f"answer {wrong[0][1]!r} to row {wrong[0][0]}" if wrong else "no answer"
        raise JudgeError(f"agreement: {path} holds {what}; rows are 0..{len(rows) - 1}, answers {', '.join(CHOICES)}")
    return Judged(person, {i: _verdict(choice, rows[i]["left"]) for i, choice in answers.items()})


def _verdict(choice: str, left: str) -> Verdict:
    if choice == "equal":
        return "tie"
    return "win" if (choice == "left") == (left == "policy") else "lose"


def cohens_kappa(first: Judged, second: Judged) -> tuple[float, int]:
    """(observed - chance) / (1 - chance) agreement over win, tie and lose on the rows that both judged, and how many
    these are. 1: always the same; 0: as often as by chance; nan: no such rows, or chance alone agrees always. Source:
    Cohen 1960."""
    both = sorted(first.verdicts.keys() & second.verdicts.keys())
    if not both:
        return float("nan"), 0
    sides = [[judged.verdicts[i] for i in both] for judged in (first, second)]
    observed = sum(a == b for a, b in zip(*sides, strict=True)) / len(both)
    counts = [Counter(side) for side in sides]
    chance = sum(counts[0][v] * counts[1][v] for v in counts[0]) / len(both) ** 2
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan"), len(both)


def agreement(evaluation: Path, answers: Sequence[Path]) -> str:
    """Win rate of the policy by each person and by the judge, and Cohen's kappa of every two of them. `evaluation`:
    the folder, or its evaluation.json."""
    path = evaluation / "evaluation.json" if evaluation.is_dir() else evaluation
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        judge = Judged("the judge", {i: r["verdict"] for i, r in enumerate(held["rows"]) if r["verdict"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JudgeError(f"agreement: {path} is no evaluation.json of ppomax evaluate ({error})") from error
    everyone = [*(read_answers(held, p) for p in answers), judge]
    lines = ["win rate of the policy"]
    for judged in everyone:
        rate, low, high = judged.win_rate()
        lines.append(f"  {judged.name:20} {rate:.1%} (95 %: {low:.1%} to {high:.1%}) of {len(judged.verdicts)} rows")
    lines.append("agreement (Cohen's kappa: 1 always, 0 as by chance)")
    for first, second in combinations(everyone, 2):
        kappa, rows = cohens_kappa(first, second)
        lines.append(f"  {first.name + ' - ' + second.name:42} {kappa:+.2f} on {rows} rows")
    return "\n".join(lines)
