"""All C++ and CUDA is formatted as .clang-format says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    p for top in ("csrc", "tests") for p in (ROOT / top).rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")
)


def test_cpp_is_formatted() -> None:
    beside = Path(sys.executable).with_name("clang-format")
    tool = str(beside) if beside.exists() else shutil.which("clang-format")
    if tool is None:
        pytest.skip("clang-format is not installed: pip install 'clang-format>=20'")
    done = subprocess.run([tool, "--dry-run", "--Werror", *map(str, SOURCES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + "\nrun: clang-format -i on the files above"
