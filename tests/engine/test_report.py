"""The report on runs made up for it: what it says, what it compares, and that it is one file which runs nothing."""

import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import yaml
from ppomax.cli import main
from ppomax.config import ConfigError, load_config, to_dict
from ppomax.reporting import plots
from ppomax.reporting.about import note_start
from ppomax.reporting.alarm import history, thresholds
from ppomax.reporting.page import write_report
from ppomax.reporting.runs import read_run, short_names
from ppomax.reporting.sections import curve
from ppomax.reporting.seeds import groups, mean_curve


def made_up_run(folder, preset="ppo-max", collapse_at=None, steps=40, prompt="a film that", samples=True):
    """The files of a run whose length and entropy leave their range from step `collapse_at` on."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(load_config(preset=preset))))
    rows = [{"step": 0, "pretrain/buffers": 1, "pretrain/explained_var": 0.2, "time/step": 3.0}]
    for step in range(1, steps + 1):
        bad = collapse_at is not None and step >= collapse_at
        rows.append(
            {
                "step": step,
                "objective/scores": step / 20,
                "objective/scores_std": 0.5,
                "objective/scores_p5": step / 20 - 1,
                "objective/scores_p50": step / 20,
                "objective/scores_p95": step / 20 + 1,
                "objective/scores_p99": step / 20 + 2,
                "objective/kl_per_token": 0.01,
                "rollout/ref_perplexity": 20.0,
                "rollout/perplexity": 20.0,
                "rollout/truncated": 0.0,
                "rollout/distinct_2": 0.8,
                "rollout/length": 90.0 if bad else 30.0,
                "policy/entropy_avg": 0.3 if bad else 2.0,
                "val/explained_var": -5.0 if step == 1 else 0.5,
                "loss/value_avg": 1 / step,
                "loss/ptx_avg": 0.0,
                "time/rollout": 1.0,
                "time/experience": 0.25,
                "time/update": 0.75,
                "time/step": 2.0,
                "perf/tokens_per_second": 1000.0,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if samples:
        texts = [
            {
                "step": s,
                "prompt": prompt,
                "response": f"text of step {s}",
                "score": s / 10,
                "length": 4,
                "finished": s < 20,
            }
            for s in (0, 20, 40)
        ]
        (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in texts))
        kept = [{"step": s, "scores": [s + i / 10 for i in range(16)]} for s in (1, 40)]
        (folder / "scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    return folder


class Page(HTMLParser):
    """Text and addresses of a page; a page that is not well nested in our few tags raises."""

    def __init__(self, source):
        super().__init__()
        self.words, self.addresses, self.tags, self.hidden = [], [], [], False
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.hidden = tag == "style"
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)


def page_of(*folders):
    return Page(write_report(folders).read_text())


def test_one_run_has_every_section_and_the_figures_of_its_files(tmp_path):
    page = page_of(made_up_run(tmp_path / "a"))
    for title in (
        "Start → end",
        "What went wrong",
        "Stability",
        "Scores of one buffer",
        "Learning",
        "Phase times",
        "Samples",
        "Configuration",
    ):
        assert title in page.text
    assert "0.05 → 1.9" in page.text  # score: step 1, then the mean of steps 36 to 40
    assert "+3.70" in page.text  # (1.9 - 0.05) / 0.5
    assert "no collapse alarm" in page.text
    assert "text of step 0" in page.text
    assert "text of step 40 [cut]" in page.text
    assert "gamma: 1.0" in page.text  # the resolved configuration
    assert re.search(r"a 3\.0 80\.0 2\.00 2\.00 1000", page.text)  # seconds by phase


def test_nothing_lies_outside_the_file_and_nothing_runs(tmp_path):
    page = page_of(made_up_run(tmp_path / "a"), made_up_run(tmp_path / "b", "vanilla", 20))
    assert page.addresses
    assert all(a.startswith("data:image/svg+xml;base64,") for a in page.addresses)
    assert "script" not in page.tags
    assert "link" not in page.tags


def test_two_runs_show_what_went_wrong_first_and_where_they_differ(tmp_path):
    page = page_of(made_up_run(tmp_path / "good"), made_up_run(tmp_path / "bad", "vanilla", 20))
    assert re.search(r"good no collapse alarm no metric left its healthy range", page.text)
    (alarm,) = re.findall(r"bad collapse alarm at step (\d+)", page.text)
    assert 20 <= int(alarm) <= 24
    assert "mean length 66.0 tokens, 30.0 at the start rollout/length" in page.text
    assert "kl.coef 0.05 0.0" in page.text
    assert "advantage.gamma" not in page.text.split("resolved configuration of good")[0]
    assert page.text.index("good after step 40") < page.text.index("bad after step 40")


def test_a_run_that_ended_within_its_baseline_is_not_called_healthy(tmp_path):
    text = page_of(made_up_run(tmp_path / "a", steps=10)).text
    assert "too short to judge: the start is its first 10 steps" in text
    assert "no collapse alarm" not in text


def test_the_alarm_is_replayed_for_a_run_that_had_it_off(tmp_path):
    folder = made_up_run(tmp_path / "a", collapse_at=20)
    config = load_config(overrides={"monitor.alarm": "off"})
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    run = read_run(folder, "a", "#000")
    assert run.history == history(run.rows, config.monitor)
    assert run.history.alarms


def test_text_that_a_model_wrote_is_not_taken_for_html(tmp_path):
    page = page_of(made_up_run(tmp_path / "a", prompt="<script>alert(1)</script> & <img src=http://x>"))
    assert "<script>alert(1)</script> & <img src=http://x>" in page.text
    assert "script" not in page.tags
    assert not any("http://x" in a for a in page.addresses)


def test_a_run_without_samples_or_scores_says_so(tmp_path):
    page = page_of(made_up_run(tmp_path / "a", samples=False))
    assert "kept no samples" in page.text
    assert "kept no scores" in page.text


def test_a_run_of_another_stage_shows_whatever_it_measured(tmp_path):
    (tmp_path / "sft").mkdir()
    rows = [{"step": s, "loss": 1 / s, "eval_nll": 2.0} for s in (10, 20)]
    (tmp_path / "sft" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page = page_of(tmp_path / "sft")
    assert "loss" in page.text
    assert "eval_nll" in page.text
    assert len(page.addresses) == 2
    (tmp_path / "sft" / "held_out.png").write_bytes(b"picture")  # what a reward model leaves beside its metrics
    page = page_of(tmp_path / "sft")
    assert "Held-out pairs" in page.text
    assert page.addresses[-1] == "data:image/png;base64,cGljdHVyZQ=="


def test_a_metric_that_is_off_in_every_run_gets_no_panel(tmp_path):
    assert "ptx loss" not in page_of(made_up_run(tmp_path / "a")).text


def test_a_folder_that_is_no_run_and_a_run_given_twice_are_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"holds no metrics\.jsonl with a step"):
        write_report([tmp_path])
    folder = made_up_run(tmp_path / "a")
    with pytest.raises(ConfigError, match="same folder is given twice"):
        write_report([folder, folder])
    assert main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("ppomax: error: report: ")


def test_out_names_the_file(tmp_path):
    folder = made_up_run(tmp_path / "a")
    assert main(["report", str(folder), "--out", str(tmp_path / "x" / "r.html")]) == 0
    assert (tmp_path / "x" / "r.html").is_file()
    assert not (folder / "report.html").exists()


def test_names_are_as_long_as_it_takes(tmp_path):
    assert short_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert short_names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]


def test_moving_mean_skips_what_is_not_finite():
    assert plots.moving_mean([1.0, float("nan"), 3.0, 5.0], 2) == [1.0, 1.0, 3.0, 4.0]


# ---- seeds, thresholds, what a run was made with --------------------------------------------------------------------


def reseeded(folder, seed, **values):
    """A made-up run as another seed would have it, with other values of some metrics."""
    made_up_run(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["run"] |= {"seed": seed, "out": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.update({name: x for name, x in values.items() if row["step"]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_seeds_of_one_configuration_are_one_mean_in_its_interval(tmp_path):
    lengths = (30.0, 33.0, 39.0)
    folders = [reseeded(tmp_path / str(i), i, **{"rollout/length": x}) for i, x in enumerate(lengths)]
    runs = [read_run(f, f.name, plots.COLOURS[i]) for i, f in enumerate(folders)]
    other = read_run(made_up_run(tmp_path / "v", preset="vanilla"), "v", plots.COLOURS[3])
    found = groups([*runs, other])
    assert [[r.name for r in g] for g in found] == [["0", "1", "2"], ["v"]]
    mean = mean_curve([curve(run, "rollout/length", band=False) for run in runs])
    assert mean.values[0] == pytest.approx(34.0)
    # by hand: std of 30, 33, 39 is sqrt(21), t of two degrees of freedom 4.303
    assert mean.high[0] - 34.0 == pytest.approx(4.303 * math.sqrt(21 / 3), rel=1e-3)
    assert mean.low[0] + mean.high[0] == pytest.approx(68.0)
    two = mean_curve([curve(run, "rollout/length", band=False) for run in runs[1:]])
    assert (two.low[0], two.values[0], two.high[0]) == (33.0, 36.0, 39.0)
    assert "0</span> and 2 more seeds" in write_report([*folders, tmp_path / "v"], tmp_path / "r.html").read_text()


def test_a_seed_that_is_there_twice_is_no_second_seed(tmp_path):
    folders = [reseeded(tmp_path / name, 7) for name in ("a", "b")]
    assert [len(g) for g in groups([read_run(f, f.name, "#000000") for f in folders])] == [1, 1]


def test_thresholds_are_those_of_the_alarm():
    settings = load_config().monitor
    for metric in ("rollout/length", "rollout/truncated", "policy/entropy_avg", "rollout/ref_perplexity"):
        start = {"rollout/length": 20.0, "rollout/truncated": 0.1, "policy/entropy_avg": 2.0,
                 "rollout/ref_perplexity": 9.0, "objective/kl_per_token": 0.0}  # fmt: skip
        for threshold in thresholds(metric, start, settings):
            outside = 1.01 if threshold > start[metric] else 0.99
            for factor, expected in ((outside, True), (2 - outside, False)):
                rows = [start] * 10 + [{**start, metric: factor * threshold}] * 10
                seen = history([{"step": i + 1, **row} for i, row in enumerate(rows)], settings).first
                assert any(sign.metric == metric and sign.counted for _, sign in seen) is expected, (metric, threshold)
    assert thresholds("objective/kl_per_token", {}, settings) == [settings.alarm_kl, 4 * settings.alarm_kl]
    assert thresholds("loss/value_avg", {"loss/value_avg": 1.0}, settings) == []


def test_a_panel_is_no_lower_than_a_share_of_the_start(monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "_picture", lambda draw, size: seen.append(drawn_limits(draw)) or "")
    steps, values = list(range(10)), [100.0 + i / 10 for i in range(10)]
    plots.curve_panel([plots.Curve(steps, values, "#000000")], start=100.0)
    plots.curve_panel([plots.Curve(steps, values, "#000000")])
    (low, high), (tight_low, tight_high) = seen
    assert high - low == pytest.approx(30.0)
    assert low < tight_low < tight_high < high


def drawn_limits(draw):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw(axes)
    return axes.get_ylim()


def test_a_run_notes_what_it_was_made_with(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/ppomax", "train", "--data.prompts", "my prompts.jsonl"])
    folder = made_up_run(tmp_path / "run")
    note_start(folder, 4)
    words = write_report([folder]).read_text()
    assert "command: ppomax train --data.prompts &#x27;my prompts.jsonl&#x27;" in words
    assert "machine: 4 x " in words
    assert "torch 2." in words
    assert "Critic pre-training" in words
