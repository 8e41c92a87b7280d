"""The laboratory: a grid that names what it lacks, verdicts that a t interval gives, no run counted twice or lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from bench.lab import reward_models
from bench.lab import runs as lab
from bench.lab.alarms import outcomes, summary
from bench.lab.gold import Verdicts
from bench.lab.grid import Figure, GridError, claim, read_grid
from bench.lab.judging import judge_all, with_gold
from bench.lab.page import write
from bench.lab.verdicts import (
    AGREES,
    BEGIN,
    DISAGREES,
    END,
    MISSING,
    UNKNOWN,
    interval,
    into,
    table,
    value,
    verdict,
    verdicts,
)

SMALL = {
    "base": {"run.steps": 1, "monitor.samples_every": 1, "monitor.sample_prompts": 4, "run.checkpoint_every": 0,
             "batch.rollout_size": 4, "batch.minibatch_size": 4, "rollout.max_new_tokens": 4,
             "monitor.tensorboard": False, "ptx.pool": 2, "critic.pretrain_steps": 0},
    "arms": {"vanilla": {"preset": "vanilla"}, "kl": {"preset": "vanilla", "kl.coef": 0.1}},
    "figures": {"4": {"title": "t", "arms": ["vanilla", "kl"], "measures": ["proxy", "kl"],
                      "claims": [{"says": "s", "test": "kl:kl@end < vanilla:kl@end"}]}},
}  # fmt: skip


def grid_file(folder: Path, **changes: object) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}), encoding="utf-8")
    return path


def row(arm: str, seed: int, values: list[float], **more: object) -> dict[str, object]:
    return {"arm": arm, "seed": seed, "proxy": values, "kl": values, "eval_steps": list(range(len(values))),
            "steps": 100, "machine": "m", "commit": "c", "date": "2026-11-27", "seconds": 1.0, **more}  # fmt: skip


def test_the_shipped_grid_reads_and_its_arms_differ() -> None:
    grid = read_grid()
    settings = [grid.settings(arm) for arm in grid.arms]
    assert len(set(settings)) == len(settings)
    assert all(figure.claims for figure in grid.figures.values())
    assert len(grid.figures) >= 11


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"vanilla": {"preset": "vanila"}, "kl": {}}}, r"arm 'vanilla'.*unknown preset 'vanila'"),
        ({"arms": {"vanilla": {}, "kl": {"kl.coeff": 0.1}}}, r"arm 'kl'.*coeff"),
        ({"arms": {"vanilla": {}}}, "names the arm 'kl', which is not there"),
        ({"figures": {"4": {**SMALL["figures"]["4"], "arms": ["kl"]}}}, "claims something of 'vanilla'"),
    ],
)
def test_what_the_grid_has_not_is_named(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(GridError, match=words):
        read_grid(grid_file(tmp_path, **changes))


@pytest.mark.parametrize("test", ["a:b@c", "a:b@c > ", "a:b@c = d:e@f", "a:b@c < d:e@f within 1", "a.b > 2"])
def test_a_claim_that_is_none_is_refused(test: str) -> None:
    with pytest.raises(GridError, match="is not `arm:measure@at"):
        claim("", test)


def test_an_unknown_figure_is_named(tmp_path: Path) -> None:
    with pytest.raises(GridError, match=r"no figure '5' in the grid; it has 4"):
        read_grid(grid_file(tmp_path)).chosen(["5"])


def test_interval_is_students() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    half = 3.182446305284263 * (5 / 3 / 4) ** 0.5  # t of 3 degrees of freedom, from tables
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half))


@pytest.mark.parametrize(
    ("test", "spread", "word"),
    [
        ("a:proxy@last > b:proxy@last", 0.1, AGREES),
        ("a:proxy@last < b:proxy@last", 0.1, DISAGREES),
        ("a:proxy@last > b:proxy@last", 9.0, UNKNOWN),
        ("a:proxy@last = b:proxy@last within 2", 0.1, AGREES),
        ("a:proxy@last = b:proxy@last within 0.2", 0.1, DISAGREES),
        ("a:proxy@last = b:proxy@last within 1", 0.1, UNKNOWN),
        ("a:proxy@last > 2", 0.1, AGREES),
        ("a:proxy@last < 2", 0.1, DISAGREES),
    ],
)
def test_a_verdict_is_where_the_interval_lies(test: str, spread: float, word: str) -> None:
    runs = {}
    for seed, shift in enumerate((-1.0, -0.3, 0.3, 1.0)):
        runs["a", seed] = row("a", seed, [0.0, 3.0 + spread * shift])
        runs["b", seed] = row("b", seed, [0.0, 2.0])
    figure = Figure("1", "t", ("a", "b"), ("proxy",), (claim("s", test),))
    [found] = verdicts([figure], runs)
    assert found.word == word
    assert found.seeds == 4
    assert word in table([found])
    del runs["a", 3]
    assert verdict(figure, figure.claims[0], runs).word == MISSING


def test_places_of_a_series() -> None:
    run = row("a", 0, [float(i) for i in range(24)])
    found = {at: value(run, claim("", f"a:proxy@{at} > 0").left) for at in ("start", "early", "end", "last", "max")}
    assert found == {"start": 0.5, "early": 3.5, "end": 19.5, "last": 22.5, "max": 23.0}
    with pytest.raises(GridError, match="no place 'middle'"):
        value(run, claim("", "a:proxy@middle > 0").left)
    with pytest.raises(GridError, match="no measure 'gold'"):
        value(run, claim("", "a:gold@last > 0").left)


def test_the_verdicts_go_between_the_marks_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    into(path, "| new |")
    into(path, "| new |")
    assert path.read_text() == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"
    path.write_text("nothing")
    with pytest.raises(GridError, match="has no lines '<!-- table"):
        into(path, "x")


def test_the_readmes_verdicts_are_those_of_the_committed_runs() -> None:
    grid = read_grid()
    runs = with_gold(lab.checked(grid, lab.rows()))
    words = table([v for v in verdicts(grid.chosen([]), runs) if v.word != MISSING])
    assert words in (Path(lab.__file__).parents[2] / "README.md").read_text(encoding="utf-8")


class Longer:
    """A judge that likes length."""

    name = "longer"

    def __call__(self, texts: list[str]) -> Verdicts:
        lengths = torch.tensor([float(len(t)) for t in texts])
        return Verdicts(lengths, lengths, lengths)


def sampled(folder: Path, prompt: str = " it") -> None:
    """Samples of two steps: the start's, and longer ones for all but one prompt."""
    folder.mkdir(parents=True)
    given = [(0, " aa", 0.0), (0, " aa", 1.0), (4, " aaaa", 2.0), (4, " aa", 2.0)]
    rows = [{"step": s, "prompt": prompt, "response": r, "score": x} for s, r, x in given]
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_the_judge_reads_each_run_once_and_its_word_joins_the_row(tmp_path: Path) -> None:
    runs, work, results = {("a", 0): row("a", 0, [1.0])}, tmp_path / "work", tmp_path / "results"
    results.mkdir()
    [line] = judge_all(Longer(), runs, work, results)
    assert "its samples are not in" in line
    sampled(work / "a" / "0")
    [line] = judge_all(Longer(), runs, work, results)
    assert "win rate 0.75" in line
    assert not list(judge_all(Longer(), runs, work, results))
    joined = with_gold(runs, results)["a", 0]
    assert joined["gold"] == [5.0, 6.0]
    assert joined["win"] == [0.5, 0.75]
    assert joined["proxy"] == [1.0]
    assert joined["proxy_std"] == pytest.approx(0.7071, abs=1e-4)


def test_the_judge_refuses_prompts_that_it_was_not_made_for(tmp_path: Path) -> None:
    sampled(tmp_path / "a" / "0", " solve 2 + 2")
    with pytest.raises(GridError, match="is made for continuations of the shipped openings, not of 'solve 2"):
        list(judge_all(Longer(), {("a", 0): row("a", 0, [1.0])}, tmp_path, tmp_path))


def test_each_run_is_made_once_and_a_killed_one_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, work, results = read_grid(grid_file(tmp_path)), tmp_path / "work", tmp_path / "results"
    real, calls = lab.run_one, []

    def run_one(grid, arm, seed, folder):
        calls.append((arm, seed))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(grid, arm, seed, folder)

    monkeypatch.setattr(lab, "run_one", run_one)
    with pytest.raises(KeyboardInterrupt):
        list(lab.run_all(grid, ["4"], [0], work, results))
    lines = list(lab.run_all(grid, ["4"], [0], work, results))
    assert [line.split(":")[0] for line in lines] == ["kl seed 0"]
    assert calls == [("vanilla", 0), ("kl", 0), ("kl", 0)]
    assert not list(lab.run_all(grid, ["4"], [0], work, results))
    done = lab.rows(results)
    assert set(done) == {("vanilla", 0), ("kl", 0)}
    one = done["kl", 0]
    assert len(one["kl"]) == one["steps"] == 1
    assert one["eval_steps"] == [0, 1]
    assert len(one["proxy"]) == 2
    page = write(grid, done, tmp_path / "page" / "lab.html", [])
    assert "not run" in page.read_text()
    assert (tmp_path / "page" / "figure-4.png").is_file()

    (results / "runs.jsonl").write_text(json.dumps({**one, "settings": "other"}) + "\n")
    with pytest.raises(GridError, match="kl with seed 0 was made with other knobs"):
        list(lab.run_all(grid, ["4"], [0], work, results))
    (results / "runs.jsonl").write_text(2 * (json.dumps(one) + "\n"))
    with pytest.raises(GridError, match="has kl with seed 0 twice"):
        lab.rows(results)


def test_no_claim_of_the_grid_holds_by_its_form() -> None:
    """The largest of a series is never below its other places, whatever the runs say."""
    for figure in read_grid().figures.values():
        for one in figure.claims:
            extremes = {t.at for t in (one.left, one.right) if not isinstance(t, float)} & {"max", "min"}
            same = not isinstance(one.right, float) and one.left[:2] == one.right[:2]
            assert not (extremes and same), one.test


# ---- the alarm held against the judge -------------------------------------------------------------------------------


def judged(seed: int, win: list[float], gold: list[float], kl: float, length: float) -> dict[str, object]:
    steps = 30
    series = {"kl": kl, "entropy": 2.0, "perplexity": 9.0, "train_length": length, "score": 1.0}
    first = {"kl": 0.0, "entropy": 2.0, "perplexity": 9.0, "train_length": 20.0, "score": 0.0}
    grown = {name: [first[name]] * 12 + [last] * (steps - 12) for name, last in series.items()}
    return {"seed": seed, "eval_steps": [0, 10, 20, 30], "win": win, "gold": gold, "finished": [1.0] * 4, **grown}


def test_alarm_is_held_against_the_judge() -> None:
    runs = {
        ("a", 0): judged(0, [0.5, 0.4, 0.3, 0.2], [0, -1, -1, -2], 0.5, 50.0),
        ("b", 0): judged(0, [0.5, 0.5, 0.3, 0.2], [0, -1, -1, -2], 0.1, 20.0),
        ("a", 2): judged(2, [0.5, 0.6, 0.6, 0.7], [0, 1, 1, 2], 0.1, 20.0),
        ("b", 2): judged(2, [0.5, 0.6, 0.6, 0.7], [0, 1, 1, 2], 0.5, 50.0),
        ("c", 2): judged(2, [0.5, 0.6, 0.6, 0.7], [0, 1, 1, -2], 0.5, 50.0),
    }
    found = outcomes(runs)
    assert [o.kind for o in found] == ["collapsed", "collapsed", "healthy", "healthy", "between"]
    assert [o.raised for o in found] == [16, None, None, 16, 16]
    assert [o.seen for o in found] == [20, 20, None, None, None]
    here, others = summary(found).splitlines()[2:]
    assert here.endswith("| 1 of 2 | 1 of 2 | 0 of 0 |")
    assert others.endswith("| 0 of 0 | 0 of 0 | 1 of 2 |")


def test_alarm_misses_no_collapse_of_the_laboratory_and_few_healthy_runs_raise_it() -> None:
    found = outcomes(with_gold(lab.checked(read_grid(), lab.rows()), lab.RESULTS))
    raised = {kind: [o.raised is not None for o in found if o.kind == kind] for kind in ("collapsed", "healthy")}
    assert min(map(len, raised.values())) >= 20
    assert all(raised["collapsed"])
    assert sum(raised["healthy"]) <= len(raised["healthy"]) / 20


# ---- reward models of its own ---------------------------------------------------------------------------------------


def test_agreement_counts_pairs_of_one_prompt_and_one_policy() -> None:
    texts = [
        {"policy": name, "prompt": "p", "response": f"{name} {i}", "score": score}
        for name in reward_models.POLICIES
        for prompt in ("a", "b")
        for i, score in enumerate([0.0, 1.0, 2.0, 3.0])
    ]
    gold = torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 0.0] * len(reward_models.POLICIES))
    found = reward_models.agreement(texts, gold)
    assert found["rm_cool"] == found["rm_end"] == [0.5]  # right on the first prompt's six pairs, wrong on the second's
    best = reward_models.agreement(texts, torch.tensor([t["score"] for t in texts]))
    assert {v[0] for k, v in best.items() if not k.endswith("ece")} == {1.0}
    gaps = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 1.0]).sigmoid()
    assert best["rm_cool_ece"][0] == pytest.approx(float((1 - gaps).mean()), abs=1e-4)


def test_a_reward_model_of_the_laboratory_needs_the_labelled_reviews(tmp_path) -> None:
    with pytest.raises(GridError, match="lab:200 is trained on the labelled reviews, which are not beside"):
        reward_models.trained("lab:200", 0, None, tmp_path)
