"""The collapse alarm on synthetic series, and the files of a run: rows, cuts at a resume, aliases, progress lines."""

import io
import json
import logging

import pytest
from ppomax.config import MonitorConfig, load_config
from ppomax.recipe.measures import QUANTILES
from ppomax.reporting.alarm import CollapseAlarm, history
from ppomax.reporting.monitor import VERL_NAMES, PlainLine, RichLine, RunMonitor, before, progress_line
from ppomax.saving.jsonl import keep_rows, read_rows
from rich.console import Console

HEALTHY = {
    "rollout/length": 30.0,
    "rollout/truncated": 0.05,
    "policy/entropy_avg": 2.0,
    "rollout/perplexity": 8.0,
    "rollout/ref_perplexity": 8.0,
    "objective/kl_per_token": 0.02,
    "rollout/distinct_2": 0.9,
    "objective/scores": 0.0,
    "objective/scores_p50": 0.0,
    "objective/scores_p99": 2.0,
    "val/explained_var": 0.3,
}
SETTINGS = MonitorConfig(alarm_baseline_steps=10, alarm_window=5, tensorboard=False, samples_every=2)


def series(steps, **change):
    """Healthy metrics whose named entries become change[name](step) from step 21 on."""
    rows = []
    for step in range(1, steps + 1):
        moved = {name.replace("__", "/"): f(step) for name, f in change.items()} if step > 20 else {}
        rows.append({"step": step, **HEALTHY, **moved})
    return rows


def alarms(rows, settings=SETTINGS):
    return history(rows, settings).alarms


# ---- the alarm ------------------------------------------------------------------------------------------------------


def test_a_healthy_run_raises_nothing():
    found = history(series(80), SETTINGS)
    assert (found.alarms, found.first) == ([], [])


@pytest.mark.parametrize(
    "change",
    [
        {"rollout__length": lambda s: 90.0},
        {"rollout__length": lambda s: 9.0},
        {"rollout__ref_perplexity": lambda s: 40.0},
        {"rollout__ref_perplexity": lambda s: 2.0},
        {"rollout__truncated": lambda s: 0.6},
        {"policy__entropy_avg": lambda s: 0.9},
        {"rollout__perplexity": lambda s: 2.0},
        {"objective__kl_per_token": lambda s: 0.5},
        {"rollout__length": lambda s: 90.0, "rollout__truncated": lambda s: 0.9},
    ],
)
def test_one_kind_of_sign_is_named_and_raises_nothing(change):
    found = history(series(60, **change), SETTINGS)
    assert found.alarms == []
    assert {sign.metric for _, sign in found.first} == {name.replace("__", "/") for name in change}


@pytest.mark.parametrize(
    "change",
    [
        {"rollout__length": lambda s: 90.0, "policy__entropy_avg": lambda s: 0.5},
        {"rollout__truncated": lambda s: 0.9, "objective__kl_per_token": lambda s: 0.6},
        {"rollout__perplexity": lambda s: 1.5, "objective__kl_per_token": lambda s: 0.6},
        {"rollout__length": lambda s: 5.0, "rollout__ref_perplexity": lambda s: 90.0},
        {"objective__kl_per_token": lambda s: 1.3},
    ],
)
def test_two_kinds_or_a_large_kl_raise_it_once_and_within_the_window(change):
    (step,) = alarms(series(80, **change))
    assert 21 <= step <= 25


COLLAPSED = {
    "rollout/length": 48.0,
    "objective/kl_per_token": 2.4,
    "policy/entropy_avg": 0.8,
    "rollout/truncated": 1.0,
}
COLLAPSES = {
    "length to 1, the text of another model": lambda s: {
        "rollout/length": max(1.0, 30.0 - 2 * max(0, s - 10)),
        "objective/kl_per_token": 0.01 + 0.02 * max(0, s - 10),
        "rollout/ref_perplexity": 8.0 * (1 + max(0, s - 10)),
    },
    "from the first step on": lambda s: {
        "rollout/length": 30.0 * (1 + s / 4),
        "objective/kl_per_token": 0.05 * s,
        "policy/entropy_avg": 4.5 / (1 + s / 3),
    },
    "at once after two steps": lambda s: {} if s < 3 else COLLAPSED,
    "without any growth of KL": lambda s: {"rollout/length": 30.0 if s < 4 else 3.0, "policy/entropy_avg": 2 / s},
}


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_is_raised_wherever_it_begins(name):
    rows = [{"step": s, **HEALTHY, **COLLAPSES[name](s)} for s in range(1, 51)]
    (step,) = alarms(rows)
    assert step <= 25


def test_a_reward_that_stays_flat_and_a_slow_learner_raise_nothing():
    """KL from 0 to its plateau, length by a third, entropy by a fifth, perplexity by two fifths."""

    def part(s):
        return min(1.0, s / 30)

    rows = [
        {
            "step": s,
            **HEALTHY,
            "objective/kl_per_token": 0.12 * part(s),
            "rollout/length": 30 + 10 * part(s),
            "policy/entropy_avg": 2 - 0.4 * part(s),
            "rollout/ref_perplexity": 8 + 3 * part(s),
        }
        for s in range(1, 200)
    ]
    assert alarms(rows) == []
    assert alarms([{"step": s, **HEALTHY} for s in range(1, 300)]) == []


def test_the_window_keeps_a_single_outlier_quiet():
    rows = series(60)
    rows[40] |= {"rollout/length": 90.0, "policy/entropy_avg": 0.5}
    assert alarms(rows) == []


def test_kl_that_doubles_within_fifty_steps_is_a_sign_before_the_limit():
    rows = series(120, objective__kl_per_token=lambda s: 0.02 + 0.002 * (s - 20), policy__entropy_avg=lambda s: 0.5)
    found = history(rows, SETTINGS)
    kl_step, sign = next((s, x) for s, x in found.first if x.kind == "kl")
    assert "doubled within 50 steps" in sign.text
    assert rows[kl_step - 1]["objective/kl_per_token"] < SETTINGS.alarm_kl
    assert found.alarms == [kl_step]


def test_slow_growth_of_kl_is_no_doubling():
    rows = [{"step": s, **HEALTHY, "objective/kl_per_token": 0.13 + 0.0005 * s} for s in range(1, 200)]
    assert history(rows, SETTINGS).first == []


def test_an_alarm_that_ends_may_be_raised_again():
    bad = {"rollout/length": 90.0, "policy/entropy_avg": 0.5}
    rows = [{**row, **(bad if 20 < row["step"] <= 30 or row["step"] > 50 else {})} for row in series(70)]
    first, second = alarms(rows)
    assert first <= 25 < 50 < second


def test_signs_that_do_not_count_are_named_but_raise_nothing():
    change = {
        "rollout__distinct_2": lambda s: 0.4,
        "rollout__ref_perplexity": lambda s: 20.0,
        "objective__scores_p99": lambda s: 9.0,
        "val__explained_var": lambda s: -1.0,
    }
    found = history(series(60, **change), SETTINGS)
    assert found.alarms == []
    assert {sign.kind for _, sign in found.first} == {"distinct", "drift", "tail", "critic"}
    assert not any(sign.counted for _, sign in found.first)


def test_what_went_wrong_first_comes_first():
    rows = series(80, rollout__length=lambda s: 90.0 if s > 50 else 30.0, policy__entropy_avg=lambda s: 0.5)
    assert [sign.kind for _, sign in history(rows, SETTINGS).first] == ["entropy", "length"]


def test_missing_and_non_finite_metrics_are_left_out():
    alarm = CollapseAlarm(SETTINGS)
    for _ in range(30):
        assert not alarm.update({"rollout/length": float("nan"), "loss/value_avg": 1.0})
    assert alarm.signs == []


# ---- the monitor's files --------------------------------------------------------------------------------------------


def monitor_of(folder, alarm="warn", steps=40):
    config = load_config(
        overrides={"run.steps": steps, "monitor.alarm": alarm, "monitor.tensorboard": False, "monitor.samples_every": 2}
    )
    return RunMonitor(folder, config, Console(file=io.StringIO()))


COLLAPSE = {"rollout__length": lambda s: 90.0, "policy__entropy_avg": lambda s: 0.5}


@pytest.mark.parametrize(("action", "verdict"), [("warn", None), ("stop", "stop"), ("rollback", "rollback")])
def test_the_alarm_warns_stops_or_rolls_back_as_told(tmp_path, caplog, action, verdict):
    watch, verdicts = monitor_of(tmp_path, action), []
    with caplog.at_level(logging.WARNING):
        for row in series(40, **COLLAPSE):
            verdicts.append(watch.log(row["step"], {k: v for k, v in row.items() if k != "step"}))
    watch.close()
    told = [r for r in caplog.records if "COLLAPSE ALARM" in r.message]
    assert len(told) == 1
    assert "mean length" in told[0].message
    (row,) = read_rows(tmp_path / "alarms.jsonl")
    assert verdicts[row["step"] - 1] == verdict
    assert set(verdicts) == {None, verdict}


def test_an_alarm_that_is_off_says_nothing(tmp_path, caplog):
    watch = monitor_of(tmp_path, "off")
    for row in series(40, **COLLAPSE):
        assert watch.log(row["step"], row) is None
    assert not (tmp_path / "alarms.jsonl").exists()


def test_a_resumed_run_appends_without_double_rows_and_its_alarm_remembers(tmp_path):
    rows = series(60, **COLLAPSE)
    (at,) = alarms(rows)
    first = monitor_of(tmp_path, "stop", 60)
    first.log(0, {"pretrain/buffers": 1, "pretrain/explained_var": 0.1})
    for row in rows[: at - 1]:
        first.log(row["step"], row)
        first.scores(row["step"], [1.0, 2.0])
        if row["step"] % 2 == 0:
            first.samples(row["step"], [{"prompt": "p", "response": "r", "score": 0.0, "length": 1, "finished": True}])
    again = monitor_of(tmp_path, "stop", 60)  # killed; the newest checkpoint was written at step 12
    verdicts = {}
    for row in rows[12:]:
        verdicts[row["step"]] = again.log(row["step"], row)
        again.scores(row["step"], [1.0, 2.0])
        if verdicts[row["step"]]:
            break
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == list(range(at + 1))
    assert all(r["step"] <= 12 for r in read_rows(tmp_path / "samples.jsonl"))
    kept = [r["step"] for r in read_rows(tmp_path / "scores.jsonl")]
    assert kept == sorted(set(kept))
    assert verdicts[at] == "stop"  # its start is still steps 1 to 10, not 13 to 22


def test_pretraining_that_is_done_again_is_cut_too(tmp_path):
    first = monitor_of(tmp_path)
    for buffer in (1, 2, 3):
        first.log(0, {"pretrain/buffers": buffer})
    monitor_of(tmp_path).log(0, {"pretrain/buffers": 2})
    assert [r["pretrain/buffers"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_line_cut_short_by_a_kill_is_dropped_and_a_damaged_one_is_an_error(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [r["step"] for r in keep_rows(path, before(9, None, path.name))] == [1, 2]
    assert "cut short" in caplog.text
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        read_rows(path)


def test_scores_are_kept_at_the_steps_with_samples_and_at_both_ends(tmp_path):
    watch = monitor_of(tmp_path, steps=7)
    for step in range(1, 8):
        watch.scores(step, [0.123456789, 2.0])
    rows = read_rows(tmp_path / "scores.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 4, 6, 7]
    assert rows[0]["scores"] == [0.12346, 2.0]


def test_tensorboard_has_both_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(overrides={"run.steps": 3})
    watch = RunMonitor(tmp_path, config, Console(file=io.StringIO()))
    for step in (1, 2):
        watch.log(step, {"loss/policy_avg": step / 2, "rollout/length": 3.0})
    watch.samples(2, [{"prompt": "p", "response": "r", "score": 0.5, "length": 1, "finished": True}])
    watch.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss/policy_avg", "actor/pg_loss"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(1, 0.5), (2, 1.0)]
    assert [e.value for e in events.Scalars("response_length/mean")] == [3.0, 3.0]


def test_aliases_are_one_to_one_and_differ():
    assert len(set(VERL_NAMES.values())) == len(VERL_NAMES)
    assert not set(VERL_NAMES.values()) & set(VERL_NAMES)
    assert set(QUANTILES) >= {"p50", "p99"}  # what the score-tail sign reads


# ---- the progress line ----------------------------------------------------------------------------------------------


def test_pipes_get_plain_lines_and_terminals_a_moving_one(capsys):
    assert isinstance(progress_line(5, 2, Console(file=io.StringIO())), PlainLine)
    out = io.StringIO()
    line = progress_line(5, 2, Console(file=out, force_terminal=True, width=160))
    assert isinstance(line, RichLine)
    line.show(0, {"pretrain/buffers": 1, "pretrain/explained_var": 0.25})
    line.show(3, HEALTHY)
    line.close()
    shown = out.getvalue()
    assert "3/5" in shown
    for word in ("score 0", "kl 0.02", "ppl 8", "len 30", "ent 2"):
        assert word in shown
    plain = PlainLine(5, 2)
    plain.show(3, {**HEALTHY, "time/step": 1.5})
    plain.show(0, {"pretrain/buffers": 1, "pretrain/explained_var": 0.25})
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("step 3/5  score 0  kl 0.02  ppl 8  len 30  ent 2")
    assert said[1].startswith("critic 1/2")


def test_rows_are_json_with_the_step_first(tmp_path):
    watch = monitor_of(tmp_path)
    watch.log(1, {"lr": 0.1})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "lr": 0.1}
