"""Trackers of others get what metrics.jsonl gets, and no failure of theirs ends a run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ppomax.cli import main
from ppomax.config import ConfigError, load_config
from ppomax.reporting.lines import clock, plain_line, short
from ppomax.reporting.monitor import RunMonitor


class Calls:
    """What was asked of a stand-in, in order; `fails` names what raises."""

    def __init__(self, fails: str = ""):
        self.made: list[tuple[str, Any]] = []
        self.fails = fails

    def of(self, name: str, result: Any = None) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            self.made.append((name, args or named))
            if name == self.fails:
                raise ConnectionError("no\nroute")
            return result

        return call


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, fails: str = "") -> Calls:
    """A module of that name that notes its calls."""
    calls, module = Calls(fails), ModuleType(name)
    if name == "wandb":
        run = SimpleNamespace(**{f: calls.of(f) for f in ("log", "finish", "define_metric")})
        module.init = calls.of("init", run)  # type: ignore[attr-defined]
    else:
        run = SimpleNamespace(info=SimpleNamespace(run_id="id-1"))
        for function in ("set_experiment", "log_dict", "log_metrics", "end_run"):
            setattr(module, function, calls.of(function))
        module.start_run = calls.of("start_run", run)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def monitor(out: Path, *names: str) -> RunMonitor:
    knobs = {"monitor.trackers": list(names), "monitor.tensorboard": False, "run.steps": 4}
    return RunMonitor(out, load_config(overrides=knobs))


def test_wandb_gets_every_step_under_its_own_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "wandb")
    watched = monitor(tmp_path / "run", "wandb")
    watched.log(0, {"pretrain/buffers": 1.0})
    watched.log(1, {"objective/scores": 0.5})
    watched.close()
    begun = dict(calls.made[0][1])
    assert begun["name"] == "run"
    assert begun["resume"] == "allow"
    assert begun["config"]["run"]["steps"] == 4
    assert calls.made[1:] == [
        ("define_metric", ("*",)),
        ("log", ({"step": 0, "pretrain/buffers": 1.0},)),
        ("log", ({"step": 1, "objective/scores": 0.5},)),
        ("finish", {}),
    ]
    monitor(tmp_path / "run", "wandb")
    assert calls.made[-2][1]["id"] == begun["id"], "a resumed run is the same one"
    monitor(tmp_path / "other", "wandb")
    assert calls.made[-2][1]["id"] != begun["id"]


def test_mlflow_goes_on_in_the_run_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "mlflow")
    watched = monitor(tmp_path / "run", "mlflow")
    watched.log(3, {"objective/scores": 0.5})
    watched.close()
    names = [name for name, _ in calls.made]
    assert names == ["set_experiment", "start_run", "log_dict", "log_metrics", "end_run"]
    assert calls.made[1][1] == {"run_id": None, "run_name": "run"}
    calls.made.clear()
    monitor(tmp_path / "run", "mlflow")
    assert calls.made == [("set_experiment", ("ppomax",)), ("start_run", {"run_id": "id-1", "run_name": None})]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_one_that_fails_is_dropped_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    calls = stand_in(monkeypatch, "wandb", fails)
    with caplog.at_level(logging.WARNING):
        watched = monitor(tmp_path, "wandb")
        for step in (1, 2, 3):
            watched.log(step, {"objective/scores": 0.5})
        watched.close()
    assert [r.getMessage() for r in caplog.records] == [
        "trackers: wandb cannot be used (ConnectionError: no route); the run goes on without it"
    ]
    assert sum(name == fails for name, _ in calls.made) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_one_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with caplog.at_level(logging.WARNING):
        monitor(tmp_path, "mlflow").log(1, {})
    assert "pip install mlflow" in caplog.text
    with pytest.raises(ConfigError, match=r"monitor\.trackers"):
        monitor(tmp_path, "clearml")


def test_plain_lines_fit_a_terminal_and_tell_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = monitor(tmp_path)
    figures = {"objective/scores": -0.01234, "objective/kl_per_token": 0.00123, "rollout/ref_perplexity": 1234.5,
               "rollout/length": 1023.9, "policy/entropy_avg": 4.567, "time/step": 3.26}  # fmt: skip
    watched.log(1, figures)
    watched.log(2, {**figures, "time/step": 9.26})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("left ")[1] == "0:10"
    assert lines[1].split("left ")[1] == "0:13"
    assert max(map(len, lines)) <= 80
    assert (clock(59.6), clock(3599), clock(7261)) == ("1:00", "59:59", "2h01")
    assert (short(0.8994), short(-0.0123), short(12345.6), short(0.0)) == ("0.899", "-0.012", "12346", "0")
    assert plain_line(["a" * 40, "b" * 39]) == "a" * 40 + " " + "b" * 39


@pytest.mark.parametrize("words", [["--monitor.trackers", '["wandbs"]'], ['--monitor.trackers=["wandbs"]']])
def test_one_that_is_unknown_is_refused_on_the_command_line(words: list[str], capsys: Any) -> None:
    assert main(["train", *words]) == 2
    assert "monitor.trackers must be one of wandb, mlflow, got 'wandbs'" in capsys.readouterr().err
