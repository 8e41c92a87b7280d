"""`ppomax doctor`: each thing that ends a run is named with its mend; a sound machine is told so."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections import namedtuple
from pathlib import Path

import pytest
from ppomax.cli import main
from ppomax.stages import doctor
from ppomax.stages.doctor import Finding

Usage = namedtuple("Usage", "total used free")


def test_this_machine_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--out", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert "ok       torch" in said
    assert "compiled library" in said
    assert said.rstrip().endswith("a run can start here")
    assert list((tmp_path / "runs").iterdir()) == []


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("transformers", "deepspeed"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.9.1+cu128" if name == "torch" else "99.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {f.name: f for f in doctor.packages()}
    assert found["torch"] == Finding("torch", "bad", "2.9.1+cu128, 2.11 is wanted")
    assert (found["transformers"].state, found["deepspeed"].state) == ("bad", "strange")
    assert "pip install 'ppomax[train]'" in found["transformers"].words
    assert found["datasets"].state == "ok"


def test_locks_of_killed_compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("old", 3600), ("new", 1)):
        (tmp_path / name).mkdir()
        lock = tmp_path / name / "lock"
        lock.touch()
        os.utime(lock, (time.time() - age, time.time() - age))
    bad = [f for f in doctor.compilers() if f.state == "bad"]
    assert [f.words for f in bad] == [
        f"{tmp_path / 'old' / 'lock'} was left by a compilation that was killed; delete it"
    ]
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "no c++ nor ninja" in doctor.compilers()[0].words


def test_a_folder_that_cannot_be_written_and_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    [found] = doctor.folder(tmp_path / "file" / "runs")
    assert found.state == "bad"
    assert "cannot be written and locked" in found.words
    monkeypatch.setattr(doctor, "SLOW", float("inf"))
    [found] = doctor.folder(tmp_path)
    assert found.state == "strange"
    assert "checkpoint of 187 GB takes" in found.words


def test_little_shared_memory_beside_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    assert [f.state for f in doctor.memory()] == ["ok"]
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 2)
    assert "--shm-size" in doctor.memory()[-1].words


def test_the_report_names_other_ranks_and_ends_with_a_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine, bad = Finding("torch", "ok", "2.13"), Finding("folder", "bad", "no room")
    words, well = doctor.report([[fine], [fine, bad]])
    assert not well
    assert words.splitlines() == [
        "ok       torch          2.13",
        "bad      folder         rank 1: no room",
        "1 of these would end a run",
    ]
    monkeypatch.setattr(doctor, "examine", lambda out: [bad])
    with pytest.raises(SystemExit) as raised:
        main(["doctor", "--out", str(tmp_path)])
    assert raised.value.code == 3
    assert "no room" in capsys.readouterr().out
