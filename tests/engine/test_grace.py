"""What a scheduler needs of a run: an end inside its time of grace, a file that asks for one, a heartbeat."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from ppomax.config import ConfigError, TrainConfig
from ppomax.stages.ppo import train_ppo
from ppomax.stages.signals import Stopped
from safetensors.torch import load_file

from tests.engine.tiny import small_config, tiny_assets

ASKS = """
import random
from pathlib import Path

CALLS = Path(__file__).with_name("calls")
STOP = Path({stop!r})

def reward(prompts, responses):
    calls = int(CALLS.read_text()) + 1 if CALLS.is_file() else 1
    CALLS.write_text(str(calls))
    if calls == {at}:
        STOP.write_text("")
    return [len(r) + random.random() for r in responses]
"""
AT = 3
"""The buffer in which the run is asked to stop: one of critic pre-training, then the second step."""


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> dict[str, Any]:
    return tiny_assets(tmp_path_factory.mktemp("assets"))


def config_of(assets: dict[str, Any], folder: Path, out: Path, at: int, **knobs: object) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    (folder / "asks.py").write_text(ASKS.format(stop=str(out / "stop"), at=at), encoding="utf-8")
    given = {k: v for k, v in assets.items() if k != "model.reward_model"}
    named = {k.replace(".", "__"): v for k, v in given.items()} | {"reward__function": f"{folder / 'asks.py'}:reward"}
    named |= {"model__critic": "policy", "run__out": str(out), "run__device": "cpu", "run__checkpoint_every": 0}
    return small_config(**{**named, **knobs})


def final(out: Path) -> dict[str, Any]:
    return load_file(out / "policy" / "model.safetensors")


@pytest.mark.parametrize("grace", [None, 1e-6, 1e6], ids=["no grace", "too little", "enough"])
def test_a_run_that_is_asked_to_stop_goes_on_as_if_it_had_not_been(assets, tmp_path, caplog, grace) -> None:
    """Python's own generator is drawn from by the reward, and its draws are part of the run."""
    whole = train_ppo(config_of(assets, tmp_path / "a", tmp_path / "whole", 0, run__grace=grace))
    out = tmp_path / "run"
    with caplog.at_level(logging.WARNING), pytest.raises(Stopped, match=r"stopped after step \d; checkpoint written"):
        train_ppo(config_of(assets, tmp_path / "b", out, AT, run__grace=grace))
    done = json.loads((out / "heartbeat.json").read_text())["step"]
    given_up = "step 2 was given up: its update would not end within run.grace"
    assert (given_up in caplog.text) == (grace == 1e-6)
    assert done == (1 if grace == 1e-6 else 2)
    train_ppo(config_of(assets, tmp_path / "b", out, 0, run__grace=grace, run__resume=True))
    assert not (out / "stop").exists()
    assert all((final(whole)[name] == x).all() for name, x in final(out).items())


def test_the_heartbeat_tells_where_a_run_is(assets, tmp_path) -> None:
    began = time.time()
    out = train_ppo(config_of(assets, tmp_path / "a", tmp_path / "run", 0))
    beat = json.loads((out / "heartbeat.json").read_text())
    assert (beat["step"], beat["steps"]) == (4, 4)
    assert began <= beat["time"] + 0.1 <= time.time() + 0.2
    assert beat["step_seconds"] > 0


def test_the_log_says_what_a_checkpoint_took(assets, tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        train_ppo(config_of(assets, tmp_path / "a", tmp_path / "run", 0, run__checkpoint_every=2))
    saved = [m for m in caplog.messages if m.startswith("checkpoint step-")]
    assert len(saved) == 2
    assert all("GB in" in m and "GB/s)" in m for m in saved)


def test_a_grace_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run.grace must be above 0 seconds, or null"):
        small_config(run__grace=0.0)
