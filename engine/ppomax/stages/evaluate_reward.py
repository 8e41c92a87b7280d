"""A reward model on preference pairs from several sources: does it generalise, and does its confidence mean what it
says? Pairs of files as `ppomax reward-model` takes them, or the rows of an evaluation.json, whose judge then says which
side is better: so a reward model can be held against another one, a function or an endpoint on the texts of policies
of other sizes, temperatures or stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppomax.assets import named_model
from ppomax.data import Pair, load_pairs
from ppomax.data.rows import DataError
from ppomax.models import freeze, load_reward_model, load_tokenizer, pick_device
from ppomax.stages.reward_model import evaluate_pairs, plot_held_out
from ppomax.stages.wilson import wilson


@dataclass(frozen=True)
class RewardEvaluation:
    """What came of each source, as evaluate_pairs gives it, with its accuracy's 95 % interval as `accuracy_95`."""

    figures: dict[str, dict[str, Any]]
    path: Path

    def table(self) -> str:
        """A line a source: pairs, accuracy, rank loss, calibration error, mean score gap."""
        wide = max(len("source"), *map(len, self.figures))
        lines = [f"{'source':{wide}}  pairs  accuracy (95 %)            rank loss    ECE  score gap"]
        for name, f in self.figures.items():
            low, high = f["accuracy_95"]
            accuracy = f"{f['accuracy']:.1%} ({low:.1%} to {high:.1%})"
            lines.append(
                f"{name:{wide}}  {f['pairs']:5}  {accuracy:25}  {f['rank_loss']:9.3f}  {f['ece']:.3f}  "
                f"{f['score_gap']:+9.3f}"
            )
        return "\n".join(lines)


def evaluate_reward(
    reward_model: str,
    sources: Sequence[str],
    out: Path,
    *,
    max_tokens: int = 2048,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> RewardEvaluation:
    """Score every source's pairs; writes reward_evaluation.json, and a plot of scores and calibration for each source,
    to the folder `out`.

    reward_model: HF directory, hub name, run of `reward-model`, or `default`. DataError: pairs that cannot be read."""
    path = named_model(reward_model, "reward_model")
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    pairs = {name: _pairs(name, tokenizer, max_tokens) for name in sources}
    model = load_reward_model(path, trust_remote_code=trust_remote_code)
    freeze(model.to(pick_device(device)))
    out.mkdir(parents=True, exist_ok=True)
    figures = {}
    for number, (name, given) in enumerate(pairs.items()):
        found = evaluate_pairs(model, given)
        figures[name] = found | {"accuracy_95": list(wilson(found["accuracy"], len(given)))}
        plot_held_out(found, out / f"pairs-{number + 1}.png")
    result = RewardEvaluation(figures, out / "reward_evaluation.json")
    words = json.dumps({"reward_model": reward_model, "sources": figures}, indent=1)
    result.path.write_text(words, encoding="utf-8")
    return result


def _pairs(source: str, tokenizer: Any, max_tokens: int) -> list[Pair]:
    given: Any = judged_pairs(Path(source)) if Path(source).name == "evaluation.json" else source
    return load_pairs(given, tokenizer, max_tokens)[0]


def judged_pairs(path: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation that its judge decided, as preference pairs. DataError if it decided none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        better = {"win": ("policy", "baseline"), "lose": ("baseline", "policy")}
        decided = [(row, *better[row["verdict"]]) for row in rows if row["verdict"] in better]
        found = [{"prompt": row["prompt"], "chosen": row[a], "rejected": row[b]} for row, a, b in decided]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"evaluate-reward: {path} is no evaluation.json of ppomax evaluate ({error})") from error
    if not found:
        raise DataError(f"evaluate-reward: {path} has no row with a win or a loss; its judge found ties alone")
    return found
