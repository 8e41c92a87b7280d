"""The wheel: one for every Python, without torch inside, that runs where no compiler is."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import pathlib, torch, ppomax_kernels as K
assert pathlib.Path(K.__file__).is_relative_to({folder!r}), K.__file__
advantages, returns = K.gae(torch.ones(3), torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32), gamma=1.0, lam=1.0)
assert returns.tolist() == [3.0, 2.0, 1.0]
"""


@pytest.mark.slow
def test_one_wheel_serves_every_python_and_needs_no_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    folder = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    assert [n for n in names if n.endswith((".so", ".dylib"))] == ["ppomax_kernels/libppomax_kernels.so"]
    assert not [n for n in names if n.startswith(("torch", "tests", "examples", "engine/"))]
    assert {"ppomax/py.typed", "ppomax_kernels/py.typed", "ppomax/assets/default/policy/model.safetensors"} <= set(
        names
    )
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": "/nowhere", "CC": "/nowhere", "CXX": "/nowhere"}
    program = PROGRAM.format(folder=str(folder))
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
