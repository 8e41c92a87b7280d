"""One thing to measure: the same work by several implementations, and how to tell whether one did it right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Sequence[Tensor]]


SHAPES = {
    "llama-2-7b": (4096, 32000),
    "llama-2-13b": (5120, 32000),
    "llama-3-8b": (4096, 128256),
    "qwen2.5-7b": (3584, 152064),
    "qwen3-8b": (4096, 151936),
}
"""Width and vocabulary of models that people train."""


def sized(size: str, table: dict[str, Any]) -> Any:
    """Of `table` what belongs to a size: quick, tiny, or full, which stands for a named shape too."""
    return table["full" if size in SHAPES else size]


@dataclass
class Problem:
    """`runs` maps an implementation's name to a call without arguments that gives its results as tensors."""

    op: str
    mode: str  # forward; forward+backward; call: the cost of a call on the smallest shape
    dtype: torch.dtype
    shape: str
    runs: dict[str, Run]
    truth: Callable[[], Sequence[Tensor]]  # what the results must be (of the first tensors, first rows)
    tolerance: float  # of |result - truth| / |truth|
    bytes: int = 0  # the least that must be moved
    flops: int = 0  # of the GEMMs that the work takes
    memory: bool = False  # whether its peak memory is worth a row
    missing: dict[str, str] = field(default_factory=dict)  # rivals that cannot run here, and why
    unchecked: frozenset[str] = frozenset()  # runs that give no comparable result (bare GEMMs, bare native calls)
    needs_compile: frozenset[str] = frozenset()
    check: Callable[[Sequence[Tensor]], float] | None = None  # another error measure, for draws


def error_of(problem: Problem, results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest relative error over the results; infinite where a result is not finite or of another shape."""
    if problem.check is not None:
        return problem.check(results)
    worst = 0.0
    for got, true in zip(results, truth, strict=False):
        got, true = got.detach(), true.detach()
        got = got[: true.shape[0]] if true.ndim else got
        if got.shape != true.shape or not bool(torch.isfinite(got).all()):
            return float("inf")
        distance = (got.to(true.device, torch.float64) - true.double()).norm()
        worst = max(worst, float(distance / true.double().norm().clamp(min=1e-30)))
    return worst


def ours(device: torch.device, table: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The back-ends of an op that run on this device, and the others with the reason."""
    if device.type == "cpu":
        return ["cpu"], {}
    from ppomax_kernels.backends import native_cuda

    names, missing = ["triton"], {}
    if "cuda" in table:
        try:
            reason = native_cuda.why_not()
        except RuntimeError as error:
            reason = str(error)
        if reason is None:
            names.append("cuda")
        else:
            missing["ppomax cuda"] = reason
    return names, missing


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)
