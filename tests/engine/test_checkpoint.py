"""Nothing is lost: kill -9 anywhere and go on to the same bits; damaged, foreign and unwritable checkpoints are
named."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ppomax.config import ConfigError, load_config
from ppomax.engine import Engine
from ppomax.models import freeze
from ppomax.models.fingerprints import fingerprint
from ppomax.saving import folder
from ppomax.saving.export_policy import export_policy
from ppomax.saving.folder import CheckpointError, newest, verify
from ppomax.sharding import ranks
from ppomax.stages.ppo import train_ppo
from transformers import AutoModelForCausalLM

from tests.engine.tiny import (
    SMALL,
    prompts,
    small_config,
    tiny_assets,
    tiny_engine,
    tiny_policy,
    tiny_reward,
    tiny_tokenizer,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, list]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "engine"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.kill_driver", str(tmp_path_factory.mktemp("kill"))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


KILLED = [
    "in a rollout",
    "in an update, between two optimiser steps",
    "in critic pre-training",
    "in a save, first file",
    "in a save, before the manifest",
    "in a save, before the rename",
    "in a save, after the rename",
    "while old checkpoints are deleted",
]


@pytest.mark.parametrize("moment", KILLED)
def test_killed_run_resumes_to_the_bit(verdicts, moment: str) -> None:
    first, second, equal, steps, kept = verdicts[moment]
    assert first == -9
    assert second == 0
    assert equal
    assert steps == [1, 2, 3, 4]
    assert kept or moment == "in critic pre-training"


def test_run_killed_by_the_clock_resumes_to_the_bit(verdicts) -> None:
    timed = {name: v for name, v in verdicts.items() if name.startswith("after ")}
    assert len(timed) == 3
    for first, second, equal, _, _ in timed.values():
        assert first in (-9, 0)  # a fast machine may have finished before the last one
        assert second == 0
        assert equal
    assert any(v[0] == -9 for v in timed.values())


@pytest.mark.parametrize("moment", ["by SIGTERM", "by Ctrl-C"])
def test_signal_checkpoints_and_leaves_cleanly(verdicts, moment: str) -> None:
    first, second, equal, _, kept = verdicts[moment]
    assert first == {"by SIGTERM": 143, "by Ctrl-C": 130}[moment]
    assert kept[-1] == "step-000002"
    assert second == 0
    assert equal


def test_save_and_load_alone(tmp_path) -> None:
    engine = tiny_engine(tokenizer=tiny_tokenizer())
    engine.step(prompts(8))
    random.random()
    engine.save(tmp_path / "state", {"note": 1})
    drawn = random.random(), float(torch.rand(()))
    loaded = Engine.load(tmp_path / "state", reference=tiny_policy(), reward=tiny_reward())
    assert (random.random(), float(torch.rand(()))) == drawn
    a, b = engine.step(prompts(8, seed=1)).metrics, loaded.step(prompts(8, seed=1)).metrics
    assert a["loss/policy_avg"] == b["loss/policy_avg"]
    assert all(torch.equal(p, q) for p, q in zip(engine.policy.params, loaded.policy.params, strict=True))
    assert loaded.restore(tmp_path / "state") == {"note": 1}


def test_load_asks_for_what_was_passed_as_an_object(tmp_path) -> None:
    tiny_engine().save(tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"Engine\.load\(\.\.\., reference=\)"):
        Engine.load(tmp_path / "state")


def test_bfloat16_master_copies_survive(tmp_path) -> None:
    config = small_config(model__dtype="bfloat16")
    engine, other = tiny_engine(config), tiny_engine(config)
    engine.step(prompts(8))
    engine.save(tmp_path / "state")
    other.restore(tmp_path / "state")
    assert engine.policy.copies[0].dtype == torch.float32
    assert all(torch.equal(p, q) for p, q in zip(engine.policy.copies, other.policy.copies, strict=True))
    assert engine.step(prompts(8)).metrics["loss/value_avg"] == other.step(prompts(8)).metrics["loss/value_avg"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damaged_checkpoint_is_passed_over_loudly(tmp_path, damage: str) -> None:
    engine = tiny_engine()
    engine.save(tmp_path / "step-000001")
    engine.save(tmp_path / "step-000002")
    file = tmp_path / "step-000002" / ("MANIFEST.json" if damage == "manifest" else "policy.safetensors")
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-100] if damage != "flip" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"step-000002"):
        verify(tmp_path / "step-000002")
    with pytest.warns(UserWarning, match=r"CHECKPOINT PASSED OVER.*step-000002"):
        assert newest(tmp_path) == tmp_path / "step-000001"
    with pytest.raises(CheckpointError, match="step-000002"):
        engine.restore(tmp_path / "step-000002")


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path) -> None:
    assert newest(tmp_path) is None
    tiny_engine().save(tmp_path / "step-000001")
    (tmp_path / "step-000001" / "engine.json").unlink()
    with (
        pytest.warns(UserWarning, match="CHECKPOINT PASSED OVER"),
        pytest.raises(CheckpointError, match="none of the 1 checkpoints"),
    ):
        newest(tmp_path)


@pytest.mark.parametrize(
    ("role", "other"),
    [
        ("policy", lambda c: Engine(tiny_policy(hidden=16), tiny_policy(), tiny_policy(), tiny_reward(), c)),
        ("reference", lambda c: tiny_engine(c, reference=tiny_policy(seed=5))),
        ("reward model", lambda c: tiny_engine(c, reward=tiny_reward(seed=5))),
    ],
)
def test_checkpoint_of_another_model_is_refused(tmp_path, role: str, other) -> None:
    tiny_engine().save(tmp_path / "state")
    with pytest.raises(CheckpointError, match=f"saved with another {role}"):
        other(small_config()).restore(tmp_path / "state")


@pytest.mark.parametrize("role", ["reference", "reward model"])
def test_one_changed_weight_of_a_frozen_model_is_noticed(tmp_path, role: str, caplog) -> None:
    tiny_engine().save(tmp_path / "state")
    reference, reward = tiny_policy(), tiny_reward()
    with torch.no_grad():
        changed = reference.model if role == "reference" else reward.model.model
        changed.layers[1].mlp.up_proj.weight[17, 5] += 1e-6
    parts = {"policy": tiny_policy(), "reference": reference, "reward": reward, "critic": tiny_policy()}
    tiny_engine(critic=tiny_policy()).save(tmp_path / "state")
    with pytest.raises(CheckpointError, match=f"saved with another {role}; .* run.accept_changes=true"):
        tiny_engine(**parts).restore(tmp_path / "state")
    accepting = small_config(run__accept_changes=True)
    with caplog.at_level(logging.WARNING):
        tiny_engine(accepting, **{**parts, "policy": tiny_policy()}).restore(tmp_path / "state")
    assert f"saved with another {role}; going on" in caplog.text


def test_a_fingerprint_takes_all_weights_wherever_they_lie() -> None:
    model = freeze(tiny_policy())
    first = fingerprint(model)
    assert fingerprint(freeze(tiny_policy())) == first
    for p in model.parameters():
        flat = p.data.view(-1)
        for at in (0, len(flat) // 2, len(flat) - 1):
            kept = flat[at].clone()
            flat[at] = torch.nextafter(kept, kept + 1)
            assert fingerprint(model) != first
            flat[at] = kept
    assert fingerprint(model) == first
    assert fingerprint(model.bfloat16()) != first


def test_a_policy_that_is_not_finite_is_neither_saved_nor_exported(tmp_path) -> None:
    engine = tiny_engine()
    engine.save(tmp_path / "step-000001")
    with torch.no_grad():
        engine.policy.params[3].view(-1)[7] = torch.nan
    for write in (lambda: engine.save(tmp_path / "step-000002"), lambda: export_policy(engine, tmp_path / "policy")):
        with pytest.raises(CheckpointError, match="the policy has weights that are not finite"):
            write()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"format": 1}', '{"format": 1, "files": []}', '{"format": 1, "files": {"a": 3}}',
             '{"format": 1, "files": {"a": {"bytes": null}}}', '{"format": 9, "files": {}}'],
)  # fmt: skip
def test_a_manifest_of_another_kind_is_passed_over(tmp_path, text: str) -> None:
    engine = tiny_engine()
    engine.save(tmp_path / "step-000001")
    engine.save(tmp_path / "step-000002")
    (tmp_path / "step-000002" / "MANIFEST.json").write_text(text)
    with pytest.warns(UserWarning, match=r"CHECKPOINT PASSED OVER.*step-000002"):
        assert newest(tmp_path) == tmp_path / "step-000001"


def test_a_resume_with_other_prompts_is_refused(tmp_path, caplog) -> None:
    knobs = {**tiny_assets(tmp_path), **SMALL, "run.steps": 1, "run.out": str(tmp_path / "run")}
    train_ppo(load_config(overrides=knobs))
    again = {**knobs, "run.steps": 2, "run.resume": True}
    rows = Path(knobs["data.prompts"]).read_text().splitlines()
    Path(knobs["data.prompts"]).write_text("\n".join(rows[1:]) + "\n")
    with pytest.raises(CheckpointError, match=r"saved with other prompts; .* run\.accept_changes=true"):
        train_ppo(load_config(overrides=again))
    with caplog.at_level(logging.WARNING):
        train_ppo(load_config(overrides={**again, "run.accept_changes": True}))
    assert "saved with other prompts; going on" in caplog.text


def test_a_resumed_run_says_what_it_took_to_be_back(tmp_path, caplog, monkeypatch) -> None:
    """And hashes its checkpoint once."""
    knobs = {**tiny_assets(tmp_path), **SMALL, "run.steps": 1, "run.out": str(tmp_path / "run")}
    train_ppo(load_config(overrides=knobs))
    hashed = []
    real = folder.sha256
    monkeypatch.setattr(folder, "sha256", lambda path: hashed.append(path.name) or real(path))
    with caplog.at_level(logging.INFO, logger="ppomax"):
        train_ppo(load_config(overrides={**knobs, "run.steps": 3, "run.resume": True}))
    assert len(re.findall(r"first step after resuming", caplog.text)) == 1
    assert re.search(
        r"done, [\d.]+ s after the run's last heartbeat: models and rows [\d.]+ s, "
        r"checkpoint [\de.-]+ GB in [\de.-]+ s \([\de.-]+ GB/s\), step [\d.]+ s",
        caplog.text,
    )
    tensors = [name for name in hashed if name.endswith(("_optim.safetensors", "policy.safetensors"))]
    assert sorted(tensors) == ["critic_optim.safetensors", "policy.safetensors", "policy_optim.safetensors"]


def test_what_a_kill_in_the_last_prune_left_is_cleaned(tmp_path) -> None:
    knobs = {**tiny_assets(tmp_path), **SMALL, "run.steps": 1, "run.out": str(tmp_path / "run")}
    train_ppo(load_config(overrides=knobs))
    left = tmp_path / "run" / "checkpoints" / ".old-step-000000"
    left.mkdir()
    train_ppo(load_config(overrides={**knobs, "run.resume": True}))
    assert not left.exists()


def test_the_seed_is_that_of_every_generator_and_a_resume_restores_them(tmp_path) -> None:
    """A reward function that draws from Python's and numpy's generators gets the same numbers, also after a resume."""
    import numpy

    path = tmp_path / "noise.py"
    path.write_text(
        "import random, numpy\nseen = []\ndef f(p, r):\n    return [random.random() + numpy.random.rand() for _ in r]\n"
    )
    knobs = {**tiny_assets(tmp_path), **SMALL, "reward.function": f"{path}:f", "model.critic": "policy"}
    runs = {}
    for name, stops in (("whole", [3]), ("again", [3]), ("resumed", [2, 3])):
        for i, steps in enumerate(stops):
            random.seed(i), numpy.random.seed(i)
            out = {"run.out": str(tmp_path / name), "run.steps": steps, "run.resume": i > 0}
            train_ppo(load_config(overrides={**knobs, **out, "policy_optim.schedule": "constant",
                                             "policy_optim.warmup": 0, "critic_optim.schedule": "constant",
                                             "critic_optim.warmup": 0}))  # fmt: skip
        runs[name] = (tmp_path / name / "policy" / "model.safetensors").read_bytes()
    assert runs["whole"] == runs["again"] == runs["resumed"]


def test_full_disk_leaves_no_checkpoint_and_names_the_mend(tmp_path) -> None:
    """Files larger than a limit cannot be written: the write itself fails, as on a full disk."""
    engine = tiny_engine()
    engine.save(tmp_path / "step-000001")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written.*earlier checkpoints are untouched"):
            engine.save(tmp_path / "step-000002")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    verify(tmp_path / "step-000001")


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="the disk is full") as caught:
        tiny_engine().save(tmp_path / "state")
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert not (tmp_path / "state").exists()


def test_export_loads_with_auto_classes(tmp_path) -> None:
    engine = tiny_engine(tokenizer=tiny_tokenizer())
    engine.step(prompts(8))
    model = AutoModelForCausalLM.from_pretrained(export_policy(engine, tmp_path / "policy"))
    named = dict(engine.policy.module.named_parameters())
    assert all(torch.equal(p, named[name]) for name, p in model.named_parameters())


def test_no_pickle_in_a_checkpoint(tmp_path) -> None:
    path = tiny_engine().save(tmp_path / "state")
    assert {f.suffix for f in path.rglob("*") if f.is_file()} == {".safetensors", ".json"}


# ---- what rivals lost in a resume -----------------------------------------------------------------------------------


def test_a_resume_loses_nothing_that_others_lost(tmp_path) -> None:
    """The reference stays the start model, the critic and both optimisers are the saved ones, and so are the adaptive
    KL coefficient and the running moments; see test_killed_run_resumes_to_the_bit for the order of the data."""
    config = small_config(kl__controller="adaptive", kl__horizon=8, kl__target=1e-4)
    engine = tiny_engine(config)
    start = {name: p.clone() for name, p in engine.reference.named_parameters()}
    for seed in range(2):
        engine.step(prompts(8, seed=seed))
    engine.save(tmp_path / "state")
    resumed = tiny_engine(config)
    resumed.restore(tmp_path / "state")
    assert resumed.controller.coef == engine.controller.coef != config.kl.coef
    assert resumed.moments == engine.moments
    assert resumed.moments.count > 0
    assert all(torch.equal(p, start[name]) for name, p in resumed.reference.named_parameters())
    assert any(not torch.equal(p, start[name]) for name, p in resumed.policy.module.named_parameters())
    for role in ("policy", "critic"):
        ours, theirs = getattr(engine, role), getattr(resumed, role)
        assert ours.steps == theirs.steps > 0
        assert ours.lr == theirs.lr
        (weights, state), (other_weights, other_state) = ours.tensors(), theirs.tensors()
        assert any(key.startswith("exp_avg/") for key in state)
        for a, b in ((weights, other_weights), (state, other_state)):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_prompts_that_differ_between_ranks_are_noticed(tmp_path, monkeypatch) -> None:
    plain = ranks.gather_objects

    def gathered(x):
        return [x, {**x, "prompts": "others"}] if isinstance(x, dict) and "ptx texts" in x else plain(x)

    monkeypatch.setattr(ranks, "gather_objects", gathered)
    knobs = {**tiny_assets(tmp_path), **SMALL, "run.out": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="the prompts that rank 1 read are not those of rank 0"):
        train_ppo(load_config(overrides=knobs))
