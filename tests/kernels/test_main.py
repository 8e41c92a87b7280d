"""`python -m ppomax_kernels` names every op and back-end, and why one is missing."""

import ppomax_kernels
import pytest
import torch
from ppomax_kernels import __main__ as command
from ppomax_kernels.backends import abi

WORDS = {"yes", "no", "-"}


def test_table_has_every_public_op_and_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["op", *command.BACKENDS]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1 : lines.index("")]}
    public = {name for name in ppomax_kernels.__all__ if name[0].islower()}
    assert set(rows) == public
    for op, cells in rows.items():
        assert set(cells) <= WORDS, op
        assert cells[0] == "yes", "plain torch runs everywhere"
    reasons = command.missing()
    for column, name in enumerate(command.BACKENDS):
        if any(cells[column] == "no" for cells in rows.values()):
            assert any(line.startswith(f"{name}: ") and reasons[name] in line for line in lines)
    if not torch.cuda.is_available():
        assert "GPU" in reasons["cuda"] or "CUDA" in reasons["cuda"] or "library" in reasons["cuda"]


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.missing()["triton"] == "triton is not installed: pip install triton"
    assert command.main(["compile"]) == 2
    assert "triton is not installed" in capsys.readouterr().err


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:

    def absent() -> None:
        raise RuntimeError("impl='cpu' needs the compiled library")

    monkeypatch.setattr(abi, "library", absent)
    assert "compiled library" in command.missing()["cpu"]
    assert "see cpu" in command.missing()["cuda"]


def test_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(["compil"])
    assert end.value.code == 2
    assert "compil" in capsys.readouterr().err
