"""Configurations: presets, layers, types from YAML, and errors that name the knob."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from ppomax.config import ConfigError, TrainConfig, build, knobs, load_config, preset_names, save_config, to_dict


def test_five_presets_load_and_survive_a_round_trip(tmp_path) -> None:
    assert preset_names() == ["modern", "paper", "paper-chinese", "ppo-max", "released", "vanilla"]
    for name in preset_names():
        config = load_config(preset=name)
        assert config.preset == name
        save_config(config, tmp_path / "c.yaml")
        assert load_config(tmp_path / "c.yaml") == config


def test_default_preset_is_the_defaults() -> None:
    assert load_config() == TrainConfig()


def test_vanilla_has_none_of_ppo_max() -> None:
    c = load_config(preset="vanilla")
    assert (c.kl.coef, c.reward.standardize, c.reward.clip, c.loss.value_clip) == (0.0, "none", None, None)
    assert (c.critic.pretrain_steps, c.ptx.coef) == (0, 0.0)


def test_vanilla_differs_in_the_recipe_alone() -> None:
    plain, vanilla = load_config(), load_config(preset="vanilla")
    for part in ("policy_optim", "critic_optim", "model", "rollout", "batch", "advantage"):
        assert getattr(vanilla, part) == getattr(plain, part), part
    assert vanilla.loss.clip_low == plain.loss.clip_low


def test_presets_do_not_touch_learning_rates_models_or_data() -> None:
    for name in preset_names():
        c = load_config(preset=name)
        assert (c.policy_optim.lr, c.critic_optim.lr) == (TrainConfig().policy_optim.lr, TrainConfig().critic_optim.lr)
        assert (c.data, c.model.policy) == (TrainConfig().data, None)


def test_layers_go_preset_file_overrides(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("preset: paper\nadvantage: {lam: 0.5}\nkl: {coef: 0.2}\n", encoding="utf-8")
    c = load_config(tmp_path / "run.yaml", overrides={"kl.coef": 0.3})
    assert (c.preset, c.reward.clip, c.advantage.lam, c.kl.coef) == ("paper", 0.8, 0.5, 0.3)
    assert load_config(tmp_path / "run.yaml", preset="modern").preset == "modern"


@pytest.mark.parametrize(
    ("text", "path", "want"),
    [
        ("policy_optim: {lr: 5e-7}", "policy_optim.lr", 5e-7),
        ("policy_optim: {betas: [0.9, 0.99]}", "policy_optim.betas", (0.9, 0.99)),
        ("reward: {clip: null}", "reward.clip", None),
        ("run: {resume: true}", "run.resume", True),
        ("batch: {rollout_size: 64}", "batch.rollout_size", 64),
    ],
)
def test_yaml_values_get_their_types(tmp_path, text: str, path: str, want: object) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    value: typing.Any = load_config(tmp_path / "c.yaml")
    for part in path.split("."):
        value = getattr(value, part)
    assert value == want
    assert type(value) is type(want)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"reward.clp": 1}, r"unknown key reward\.clp; did you mean reward\.clip\?"),
        ({"rewards.clip": 1}, r"unknown key rewards; did you mean reward\?"),
        ({"reward.clip": 0}, r"reward\.clip must be above 0"),
        ({"reward.clip": float("nan")}, r"reward\.clip must be a number"),
        ({"batch.epochs": 1.5}, r"batch\.epochs must be a whole number, got 1\.5"),
        ({"batch.epochs": True}, r"batch\.epochs must be a whole number"),
        ({"run.resume": "perhaps"}, r"run\.resume must be true or false"),
        ({"kl.estimator": "k4"}, r"kl\.estimator must be one of k1, k2, k3, abs"),
        ({"kl.coef": None}, r"kl\.coef must be a number"),
        ({"rollout.temperature": 0}, r"rollout\.temperature must be above 0"),
        ({"batch.minibatch_size": 999}, r"batch\.minibatch_size must be in \[1, rollout_size=128\]"),
        ({"loss.dual_clip": 1.0}, r"loss\.dual_clip must be above 1"),
        ({"impl": "fast"}, r"impl must be one of auto"),
        ({"rollout.samples_per_prompt": 3}, r"multiple of rollout\.samples_per_prompt=3"),
    ],
)
def test_bad_knobs_are_named(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=knobs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file .* and no shipped configuration"),
        ("- 1\n- 2\n", "must be a YAML mapping"),
        ("kl: {coef: [", "is not valid YAML"),
    ],
)
def test_bad_files_are_named(tmp_path, content: str | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "run.yaml" in str(caught.value)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'papr'; did you mean paper"):
        load_config(preset="papr")


def test_every_knob_has_a_doc_line() -> None:
    """The text under a field is what --help shows."""
    source = Path(knobs.__file__).read_text(encoding="utf-8").splitlines()
    for owner in vars(knobs).values():
        if not (dataclasses.is_dataclass(owner) and isinstance(owner, type)) or owner is TrainConfig:
            continue
        for field in dataclasses.fields(owner):
            at = [i for i, line in enumerate(source) if line.startswith(f"    {field.name}: ")]
            assert any(source[i + 1].lstrip().startswith('"""') for i in at), f"{owner.__name__}.{field.name}"


def test_configurations_are_frozen_and_rebuilt_from_plain_data() -> None:
    config = TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.impl = "ref"  # type: ignore[misc]
    assert build(TrainConfig, to_dict(config)) == config


def test_import_stays_light() -> None:
    """`import ppomax` and reading a configuration load neither torch nor transformers."""
    code = (
        "import sys, ppomax; from ppomax.config import load_config; load_config(); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]"
