"""The C header is a product too: a small C99 program is compiled against it, linked with the built library, and
run."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ppomax_kernels.backends import abi

from . import oracle
from .contract import hold

HEADER = Path(__file__).parents[2] / "csrc"
PROGRAM = r"""
#include <stdio.h>
#include "ppomax_kernels.h"

int main(void) {
    const float rewards[5] = {0.0f, 0.5f, 1.0f, -0.25f, 2.0f}, values[5] = {0.5f, 0.25f, 0.75f, 1.5f, -1.0f};
    const int32_t cu_seqlens[3] = {0, 3, 5};
    const float logits[2][4] = {{0.0f, 1.0f, 2.0f, 3.0f}, {5.0f, -5.0f, 0.5f, 0.0f}};
    const int64_t labels[2] = {2, 0}, bad_labels[2] = {2, 4};
    float advantages[5], returns[5], logprobs[2], entropy[2], lse[2];
    int i, status;

    if (ppomax_abi_version() != PPOMAX_ABI_VERSION) return 1;
    status = ppomax_gae_cpu(rewards, PPOMAX_FP32, 0, values, PPOMAX_FP32, 0, NULL, 0, cu_seqlens, 2, 5, 0.9, 0.8,
                            NULL, 0, NULL, 0, advantages, returns, 1);
    if (status != PPOMAX_OK) return 2;
    status = ppomax_token_logprobs_cpu(logits, PPOMAX_FP32, 1, 2, 4, 8, 4, labels, 2, 1, 0.7, 0.0, -100,
                                       logprobs, entropy, lse, 1);
    if (status != PPOMAX_OK) return 3;
    for (i = 0; i < 5; ++i) printf("%.9g %.9g\n", advantages[i], returns[i]);
    for (i = 0; i < 2; ++i) printf("%.9g %.9g\n", logprobs[i], entropy[i]);
    status = ppomax_token_logprobs_cpu(logits, PPOMAX_FP32, 1, 2, 4, 8, 4, bad_labels, 2, 1, 0.7, 0.0, -100,
                                       logprobs, entropy, lse, 1);
    printf("%s\n", ppomax_status_string(status));
    return status == PPOMAX_BAD_LABEL ? 0 : 4;
}
"""  # fmt: skip
REWARDS, VALUES = np.array([0.0, 0.5, 1.0, -0.25, 2.0]), np.array([0.5, 0.25, 0.75, 1.5, -1.0])
LOGITS, LABELS = np.array([[0.0, 1.0, 2.0, 3.0], [5.0, -5.0, 0.5, 0.0]]), np.array([2, 0])


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the program prints, compiled with the machine's C compiler under the strictest standard flags."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("C program: no C compiler (cc, or the one that CC names) on this machine")
    library = abi.library_path()
    folder = tmp_path_factory.mktemp("c_api")
    (folder / "main.c").write_text(PROGRAM)
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{HEADER}", f"-Wl,-rpath,{library.parent}"]
    build = [compiler, *flags, "main.c", str(library), "-o", "main"]
    made = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([str(folder / "main")], capture_output=True, text=True)
    assert ran.returncode == 0, f"exit status {ran.returncode}: {ran.stdout}{ran.stderr}"
    return ran.stdout.splitlines()


def columns(lines: list[str]) -> list[torch.Tensor]:
    return list(torch.tensor([[float(number) for number in line.split()] for line in lines]).T)


def test_gae_from_c(printed: list[str]) -> None:
    advantages, returns = columns(printed[:5])
    truth = np.concatenate(
        [oracle.advantages_of(REWARDS[at], VALUES[at], 0.9, 0.8, 0.0) for at in (slice(3), slice(3, 5))]
    )
    hold("advantages", advantages, truth)
    hold("returns", returns, truth + VALUES)


def test_token_logprobs_from_c(printed: list[str]) -> None:
    truth = oracle.token_logprobs_truth(LOGITS, LABELS, 0.7, None, -100)
    for name, got, want in zip(("logprobs", "entropy"), columns(printed[5:7]), truth, strict=True):
        hold(name, got, want)


def test_a_bad_label_is_a_status(printed: list[str]) -> None:
    assert printed[7] == "a label outside [0, vocab) that is not ignore_index"


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="nm output of x86-64 Linux objects"
)
def test_nothing_but_the_documented_functions_is_exported() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("exports: no nm on this machine")
    table = subprocess.run(
        [nm, "-D", "--defined-only", str(abi.library_path())], capture_output=True, text=True, check=True
    )
    # Weak ones are the C++ library's own templates, which it wants shared.
    names = {line.split()[-1] for line in table.stdout.splitlines() if line.split()[-2] != "W"}
    strangers = {name for name in names if not name.startswith("ppomax_")}
    assert not strangers, f"exported beside the C ABI: {sorted(strangers)[:10]}"
