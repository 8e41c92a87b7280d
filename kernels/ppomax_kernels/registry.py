"""The list of public ops. What needs to know them all derives from it: the package's face, `python -m ppomax_kernels`,
ahead-of-time compilation, the benchmarks and the tests.

An op lives in its own files: `<op>.py` holds its public function of that name and its table FORWARD of
implementations, `<op>_triton.py`, where it has kernels of its own, also `cases()`, launches of real use for
ahead-of-time compilation."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

OPS = (
    "token_logprobs",
    "linear_token_logprobs",
    "linear_ppo_loss",
    "linear_nll",
    "kl_penalty",
    "token_rewards",
    "gae",
    "whiten",
    "ppo_loss",
    "value_loss",
    "sample",
)
BACKENDS = ("ref", "cpu", "triton", "cuda")


def table_of(op: str) -> Mapping[str, Any]:
    """The op's implementations by back-end. The linear ops run the row kernels of token_logprobs on chunks."""
    return import_module(f"{__package__}.{op}").FORWARD  # type: ignore[no-any-return]


def with_triton_kernels() -> list[str]:
    """Names of the modules of ops, public and internal, that have Triton kernels of their own, without `_triton`."""
    here = Path(__file__).parent
    internal = sorted(f"internal.{file.stem.removesuffix('_triton')}" for file in here.glob("internal/*_triton.py"))
    return [op for op in OPS if (here / f"{op}_triton.py").is_file()] + internal
