"""The kernels under the address and undefined-behaviour sanitizers.

    python -m tests.kernels.sanitized [PYTEST ARGUMENTS]     all tests of the kernels, then the sweep of the raw ops
Builds the library with -DPPOMAX_SANITIZE=ON into a temporary folder, and runs with it; torch itself is not
instrumented. The first report of a sanitizer ends the run."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ("test_errors.py", "test_gae.py", "test_kl_penalty.py", "test_token_rewards.py", "test_whiten.py",
         "test_ppo_loss.py", "test_value_loss.py", "test_token_logprobs.py", "test_sample.py", "test_linear_ops.py",
         "test_native.py", "test_packed_attention.py", "test_packed_linear.py", "test_paged_attention.py",
         "test_rms_norm.py", "test_rotate.py", "test_silu_mul.py", "test_transforms.py")  # fmt: skip
"""Those that run the library on a CPU in this process."""


def build(folder: Path) -> Path:
    """The instrumented library's folder."""
    options = ["-DPPOMAX_SANITIZE=ON", "-DPPOMAX_CUDA=OFF", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(folder), "-j", "2"], check=True, stdout=subprocess.DEVNULL)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """With the sanitizers' run time loaded first, as a Python that knows nothing of them needs it."""
    compiler = os.environ.get("CXX", "c++")
    ask = [[compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libubsan.so")]
    found = [subprocess.check_output(words, text=True).strip() for words in ask]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PPOMAX_TEST_LIBRARY": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def use_built() -> None:
    """In a process that `main` started: the instrumented library in place of the installed one."""
    import ppomax_kernels

    if "PPOMAX_TEST_LIBRARY" in os.environ:
        ppomax_kernels.__path__.insert(0, os.environ["PPOMAX_TEST_LIBRARY"])


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        env = environment(build(Path(folder)))
        tests = [str(ROOT / "tests" / "kernels" / name) for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *tests, *arguments]
        for words in (command, [sys.executable, "-m", "tests.kernels.raw_sweep"]):
            status = subprocess.run(words, cwd=ROOT, env=env).returncode
            if status:
                return status
    print("clean")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
