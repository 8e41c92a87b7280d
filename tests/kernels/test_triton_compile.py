"""Every Triton kernel compiles ahead of time, without a GPU and without spills, and only files named *_triton.py import
triton. The compiler runs in a process of its own: this one has been told to interpret kernels."""

import os
import re
import subprocess
import sys
from pathlib import Path

import ppomax_kernels
import pytest

pytest.importorskip("triton")

PACKAGE = Path(ppomax_kernels.__file__).parent
KERNELS = sorted(
    name for file in PACKAGE.rglob("*_triton.py") for name in re.findall(r"def (_\w+_kernel)\(", file.read_text())
)


def python(*args: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, timeout=1500)


def check(arch: str, *options: str) -> None:
    done = python("-m", "ppomax_kernels", "compile", "--arch", arch, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in KERNELS:
        row = re.search(rf"^ +{name} +\d+ +(\d+) +(\d+) +\d+ ", done.stdout, re.MULTILINE)
        assert row, f"{name} was not compiled:\n{done.stdout}"
        assert int(row[1]) > 0
        assert int(row[2]) == 0


def test_each_kernel_compiles_for_hopper_without_spills() -> None:
    assert len(KERNELS) >= 14
    check("sm_90", "--quick")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_variant_compiles_without_spills(arch: str) -> None:
    check(arch)


@pytest.mark.parametrize(
    ("usage", "status", "word"),
    [("Usage(32, 0, 0)", 0, "none failed"), ("Usage(32, 8, 0)", 1, "spills 8 B"), ("Usage(0, 0, 0, 'no')", 1, "] no")],
)
def test_exit_status_tells_of_spills_and_failures(usage: str, status: int, word: str) -> None:
    code = (
        "import sys; from ppomax_kernels.backends import compile_triton as c\n"
        "from ppomax_kernels.backends.compile_triton import Usage\n"
        f"c.compile_launch = lambda launch, arch: {usage}\n"
        "sys.exit(c.main(['sm_90'], quick=True))"
    )
    done = python("-c", code)
    assert done.returncode == status, done.stderr
    assert word in done.stdout


def test_compiling_asks_for_a_known_chip_and_a_real_compiler() -> None:
    done = python("-m", "ppomax_kernels", "compile", "--arch", "h100")
    assert done.returncode == 2
    assert "arch must be one of sm_80, sm_90" in done.stderr
    done = python("-m", "ppomax_kernels", "compile", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


KEYS = """
import torch
from ppomax_kernels.backends import compile_triton
from ppomax_kernels.backends.launch_triton import floats, integers, recorded
from ppomax_kernels.gae_triton import gae_triton
from ppomax_kernels.kl_penalty_triton import kl_penalty_backward_triton, kl_penalty_triton
from ppomax_kernels.linear_token_logprobs_triton import linear_token_logprobs_triton
from ppomax_kernels.ppo_loss_triton import ppo_loss_triton
from ppomax_kernels.sample_triton import sample_triton
from ppomax_kernels.terms import PolicyTokens, PpoTerms
from ppomax_kernels.token_logprobs_triton import token_logprobs_backward_triton, token_logprobs_triton
from ppomax_kernels.token_rewards_triton import token_rewards_triton
from ppomax_kernels.value_loss_triton import value_loss_triton
from ppomax_kernels.whiten_triton import moments_triton, whiten_triton

def keys(n, t, number):
    x, z, m, y, per = floats(n, 50257), floats(n), integers(n, dtype=torch.bool), integers(n), floats(3)
    cu, square, norm = integers(4, dtype=torch.int32), floats(3, n), floats()
    hidden, weight, found = floats(n, 64), floats(50257, 64), set()
    with recorded(lambda *launch: found.add(compile_triton.as_compiled(*launch, "").key), "cuda"):
        token_logprobs_triton(x, y, t, 0.0, True, -number)
        token_logprobs_backward_triton(z, z, x, y, z, z, t, 0.0, -number)
        kl_penalty_triton(z, z, "k3")
        kl_penalty_backward_triton(z, z, z, "k3")
        token_rewards_triton(per, z, z, cu, t, "k1")
        gae_triton(z, z, cu, m, t, t, per, per)
        gae_triton(square, square, None, None, t, t, None, None)
        ppo_loss_triton(z, PolicyTokens(z, z, m, z, z), z, PpoTerms(norm, t, t, t, t, t, "k3", t), True)
        value_loss_triton(z, z, z, m, norm, t, t, True)
        whiten_triton(z, m, moments_triton(z, m), True, t)
        sample_triton(x, y, y, t, number, t)
        linear_token_logprobs_triton(hidden, weight, y, None, t, 0.0, True, -number)
    return found

first = keys(1, 0.5, 1)
assert len(first) == 14, sorted(first)
for n, t, number in ((2, 0.7, 16), (16, 0.9, 100), (17, 0.3, 7), (1000, 0.25, 64), (8192, 0.6, 1)):
    assert keys(n, t, number) == first, (n, keys(n, t, number) ^ first)
assert len(keys(8193, 0.5, 1) | keys(10**6, 0.5, 16)) == 17
"""


def test_no_recompilation_for_a_length_a_count_or_a_number() -> None:
    done = python("-c", KEYS)
    assert done.returncode == 0, done.stderr


def test_only_triton_files_import_triton() -> None:
    others = [file for file in PACKAGE.rglob("*.py") if not file.name.endswith("_triton.py")]
    assert others
    for file in others:  # dispatch.py may ask, inside a function, whether Triton interprets
        assert not re.search(r"^(?:from|import) triton\b", file.read_text(), re.MULTILINE), file.name


LOOPS = r"""
import re, triton
from triton.compiler import ASTSource
from ppomax_kernels.backends import compile_triton as c

for launch in c.launches("cuda"):
    name = launch.kernel.fn.__name__
    if name not in WANTED or "V=151936" not in launch.case or "temperature=0" in launch.case:
        continue
    names = launch.kernel.arg_names
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, constexprs=launch.constants, attrs=attributes)
    lines = triton.compile(source, target=c.target("sm_90"), options=dict(launch.options)).asm["ptx"].splitlines()
    labels, loops = {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\$L__BB\S+):", line):
            labels[label[1]] = i
        if (back := re.search(r"bra\S*\s+(\$L__BB\S+);", line)) and back[1] in labels:
            loops.append(lines[labels[back[1]] : i])
    loops = [body for body in loops if any("ld.global" in line for line in body)]
    inner = [body for body in loops if not any(len(other) < len(body) and other[0] in body for other in loops)]
    assert inner, launch.case
    assert not any("bar.sync" in line for body in inner for line in body), launch.case
    print(name, len(inner))
"""


def test_no_loop_over_logits_has_a_barrier() -> None:
    """Of the passes over a row: threads meet after them, not in each turn."""
    done = python("-c", f"WANTED = {{'_sample_kernel', '_token_logprobs_kernel'}}\n{LOOPS}")
    assert done.returncode == 0, done.stderr
    assert "_sample_kernel 2" in done.stdout
    assert "_token_logprobs_kernel 1" in done.stdout
