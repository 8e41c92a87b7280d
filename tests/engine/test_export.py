"""`ppomax export`: the folder that the run itself would write, from any mode's checkpoint, or a sentence that names
what is missing; and a run's folder wherever a model is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ppomax.cli import main
from ppomax.config import ConfigError, load_config
from ppomax.saving.engine_state import CheckpointError
from ppomax.saving.folder import seal
from ppomax.saving.model_folder import save_model
from ppomax.saving.saved_policy import open_policy
from ppomax.stages import export as stage
from ppomax.stages.export import export
from ppomax.stages.ppo import train_ppo
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine.tiny import SMALL, tiny_assets, tiny_policy, tiny_tokenizer

MODES = {
    "full": {},
    "lora": {"model.train": "lora"},
    "hydra": {"model.train": "hydra", "model.trained_layers": 1, "model.critic": "policy"},
    "bfloat16": {"model.dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of two steps in each mode."""
    folder = tmp_path_factory.mktemp("runs")
    names = tiny_assets(folder)
    made = {}
    for mode, knobs in MODES.items():
        out = folder / mode
        knobs = {**SMALL, **names, **knobs, "run.steps": 2, "run.out": str(out), "critic.pretrain_steps": 0}
        made[mode] = train_ppo(load_config(overrides=knobs))
    return made


@pytest.mark.parametrize("mode", MODES)
def test_the_export_of_a_checkpoint_is_the_runs_own(mode: str, runs: dict[str, Path], tmp_path: Path) -> None:
    out = export(runs[mode], tmp_path / "out")
    own = load_file(runs[mode] / "policy" / "model.safetensors")
    written = load_file(out / "model.safetensors")
    assert own.keys() == written.keys()
    assert all(torch.equal(own[name], written[name]) for name in own)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((out / name).read_text()) == json.loads((runs[mode] / "policy" / name).read_text()), name
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    first = export(runs[mode] / "checkpoints" / "step-000001", tmp_path / "first")
    earlier = load_file(first / "model.safetensors")
    assert not all(torch.equal(own[name], earlier[name]) for name in own)


def test_the_card_tells_start_data_figures_and_command(runs: dict[str, Path], tmp_path: Path) -> None:
    words = (export(runs["lora"], tmp_path / "out") / "README.md").read_text()
    last = json.loads((runs["lora"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| mean raw score of a buffer | {last['objective/scores']:.4g} |" in words
    for piece in (
        "# lora\n",
        "2 steps of",
        "prompts.jsonl",
        "reward",
        "ppomax train --preset ppo-max",
        "--model.train lora",
    ):
        assert piece in words, piece
    [line] = [line for line in words.splitlines() if line.startswith("ppomax train")]
    assert "run.out" not in line


def test_the_model_of_the_start_may_have_moved(runs: dict[str, Path], tmp_path: Path) -> None:
    run, start = tmp_path / "run", runs["hydra"].parent / "policy"
    shutil.copytree(runs["hydra"] / "checkpoints" / "step-000002", run / "checkpoints" / "step-000002")
    hidden = start.rename(start.with_name("moved"))
    try:
        with pytest.raises(CheckpointError, match=r"was trained from .*policy, which has moved \(--base\)"):
            export(run, tmp_path / "gone")
        out = export(run, tmp_path / "out", base=str(hidden))
    finally:
        hidden.rename(start)
    own, written = load_file(runs["hydra"] / "policy" / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(own[name], written[name]) for name in own)
    save_model(tiny_policy(seed=9), tiny_tokenizer(), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"trained from another model than .*other; name that one \(--base\)"):
        export(run, tmp_path / "wrong", base=str(tmp_path / "other"))


def test_what_is_no_run_and_what_is_in_the_way_are_named(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a checkpoint \(no engine.json\) nor the folder of a run"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has written no checkpoint yet"):
        export(tmp_path / "begun", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="holds no exported model; name a new folder"):
        export(runs["full"], tmp_path / "mine")
    export(export(runs["full"], tmp_path / "again").parent / ".." / runs["full"], tmp_path / "again")


def test_the_hub_gets_the_folder(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[tuple[Path, str]] = []
    monkeypatch.setattr(stage, "upload", lambda folder, name: sent.append((folder, name)))
    out = tmp_path / "out"
    assert main(["export", str(runs["full"]), str(out), "--push-to-hub", "me/mine"]) == 0
    assert sent == [(out, "me/mine")]
    assert f"written: {out}" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "gone"), str(tmp_path / "x")]) == 2
    assert "neither a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["full", "lora", "hydra"])
def test_a_run_is_taken_wherever_a_model_is(
    mode: str,
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its folder, and by a checkpoint of it."""
    run, checkpoint = runs[mode], runs[mode] / "checkpoints" / "step-000002"
    whole = open_policy(str(run))[0].state_dict()
    for name in (str(run), str(checkpoint)):
        assert main(["generate", "--model", name, "--prompt", "a", "--max_new_tokens", "3"]) == 0
        assert "1 responses" in capsys.readouterr().out
    merged = open_policy(str(checkpoint))[0]
    if mode != "lora":  # there the checkpoint's adapters lie beside the weights
        assert all(torch.equal(whole[name], x) for name, x in merged.state_dict().items())
    knobs = {
        **SMALL,
        **tiny_assets(tmp_path),
        "model.policy": str(run),
        "run.steps": 1,
        "run.out": str(tmp_path / "next"),
    }
    assert (train_ppo(load_config(overrides=knobs)) / "policy" / "config.json").is_file()


def test_a_checkpoint_of_a_stage_before_ppo_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "sft" / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text("{}")
    seal(folder, {})
    with pytest.raises(CheckpointError, match="of a stage before PPO, which writes its model as a Hugging Face folder"):
        export(tmp_path / "sft", tmp_path / "out")
