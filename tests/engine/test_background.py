"""A checkpoint that is written while training goes on is the one of the moment when it was asked for."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from ppomax.config import load_config
from ppomax.saving import background, dealt
from ppomax.saving.folder import CheckpointError, newest
from ppomax.stages.ppo import train_ppo

from tests.engine.tiny import SMALL, prompts, small_config, tiny_assets, tiny_engine

CPU = torch.device("cpu")


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir() if p.suffix == ".safetensors"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_holds_the_state_at_its_start(tmp_path: Path, dtype: str) -> None:
    engine = tiny_engine(small_config(model__dtype=dtype))
    engine.step(prompts(8))
    engine.save(tmp_path / "at once", {"a": 1})
    pending = engine.start_save(tmp_path / "beside", {"a": 1})
    after = engine.step(prompts(8))
    assert not (tmp_path / "beside").exists()
    assert pending.finish() == tmp_path / "beside"
    assert files(tmp_path / "beside") == files(tmp_path / "at once")
    states = [json.loads((tmp_path / name / "engine.json").read_text()) for name in ("beside", "at once")]
    assert states[0] == states[1]
    assert engine.restore(tmp_path / "beside") == {"a": 1}
    again = engine.step(prompts(8))
    assert torch.equal(again.scores, after.scores)


def test_the_room_of_a_copy_is_used_again(tmp_path: Path) -> None:
    engine = tiny_engine()
    rooms = []
    for name in ("one", "two"):
        engine.step(prompts(8))
        engine.start_save(tmp_path / name).finish()
        rooms.append({key: x.data_ptr() for key, x in engine._writer._buffers.items()})
    assert rooms[0] == rooms[1]
    engine.save(tmp_path / "at once")
    assert files(tmp_path / "two") == files(tmp_path / "at once")


def test_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is held back until two steps are done; the checkpoint takes its place at the end of the third."""
    free, plain = threading.Event(), dealt.write_file

    def held_back(path: Path, tensors: object) -> dealt.Entry:
        assert free.wait(60)
        return plain(path, tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(dealt, "write_file", held_back)
    seen = []
    ready = background.PendingSave.ready

    def counted(self: background.PendingSave, device: torch.device) -> bool:
        seen.append(self.path.name)
        if len(seen) == 3:
            free.set()
            self._written.result()
        return ready(self, device)

    monkeypatch.setattr(background.PendingSave, "ready", counted)
    knobs = {**SMALL, **tiny_assets(tmp_path), "run.steps": 4, "run.checkpoint_every": 1, "run.keep_checkpoints": 9}
    knobs |= {"run.background_saves": True, "monitor.tensorboard": False, "run.out": str(tmp_path / "run")}
    knobs["run.checkpoint_every"] = 4
    monkeypatch.setattr("ppomax.stages.ppo.PpoLoop.pretrain", _saves_first)
    train_ppo(load_config(overrides=knobs))
    assert seen[:3] == ["step-000000-critic-000"] * 3
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-000000-critic-000", "step-000004"]  # fmt: skip


def _saves_first(loop, monitor, stop) -> None:  # type: ignore[no-untyped-def]
    loop.save()


def test_a_run_saved_so_resumes_as_any_other(tmp_path: Path) -> None:
    knobs = {**SMALL, **tiny_assets(tmp_path), "run.steps": 4, "run.checkpoint_every": 1, "monitor.tensorboard": False}
    for name, behind in (("at once", False), ("beside", True)):
        more = {"run.background_saves": behind, "run.out": str(tmp_path / name), "run.keep_checkpoints": 3}
        train_ppo(load_config(overrides={**knobs, **more, "run.steps": 2}))
        train_ppo(load_config(overrides={**knobs, **more, "run.resume": True}))
    one, two = (newest(tmp_path / name / "checkpoints") for name in ("at once", "beside"))
    assert one is not None
    assert two is not None
    assert files(one) == files(two)
    assert len(list((tmp_path / "beside" / "checkpoints").iterdir())) == 3


def test_a_disk_that_does_not_take_it_is_named_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dealt, "write_file", full)
    pending = engine.start_save(tmp_path / "step")
    with pytest.raises(CheckpointError, match="the disk is full"):
        pending.finish()
    assert list(tmp_path.iterdir()) == []
