"""The numerical contract, in one place (no test states a tolerance of its own).

error <= 2 * max(error of plain torch in that dtype, a small ulp floor), element by element, errors scaled by max(1,
|truth|).

"Plain torch in that dtype" is plain.py on the same rounded inputs with float32 arithmetic, its gradients rounded to
the dtype of the input, as a careful user would write it (bfloat16 arithmetic would excuse far more). Its error is the
largest scaled one in the tensor: element by element it may be 0 by luck. Where the truth is not finite (or lies
beyond the dtype), the result must be the same infinity or NaN; where it is finite, so must the result be."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FACTOR = 2.0
# A float32 result takes many roundings to make (one in an exponent of -10 is worth ten, a scan takes one a step): with
# FACTOR the floor is 3.8e-6, about the 4e-6 below. One in half precision is made in float32 and rounded once.
FLOOR_ULPS = {torch.float32: 16.0, torch.bfloat16: 0.5, torch.float16: 0.5, torch.float64: 64.0}
# Log-probability and entropy of float32 logits at V = 32000, against float64, whatever plain torch makes of them.
LOGPROBS_LIMIT = 4e-6
# Moments are float64 sums of float32 inputs: relative, for thousands of entries around a mean of 100.
MOMENTS_LIMIT = 1e-9


def f64(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float64).numpy()


def scaled_error(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.abs(got - truth) / np.maximum(1.0, np.abs(truth))


def bound(truth: np.ndarray, plain: Sequence[Tensor], dtype: torch.dtype) -> float:
    errors = [FLOOR_ULPS[dtype] * torch.finfo(dtype).eps]
    for yardstick in map(f64, plain):
        assert yardstick.shape == truth.shape, f"the yardstick has shape {yardstick.shape}, the truth {truth.shape}"
        finite = np.isfinite(truth) & np.isfinite(yardstick)
        errors.append(float(scaled_error(yardstick[finite], truth[finite]).max(initial=0.0)))
    return FACTOR * max(errors)


def hold(what: str, got: Tensor, truth: np.ndarray, *plain: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """AssertionError unless `got` is of `dtype` and of the truth's shape, and within the contract. `plain` is the
    yardstick, or several ways to write it."""
    truth = np.asarray(truth, dtype=np.float64)
    assert isinstance(got, Tensor), f"{what}: no tensor but {got!r}"
    assert got.dtype == dtype, f"{what}: dtype {got.dtype}, wanted {dtype}"
    assert tuple(got.shape) == truth.shape, f"{what}: shape {tuple(got.shape)}, wanted {truth.shape}"
    truth = np.where(np.abs(truth) > torch.finfo(dtype).max, np.copysign(np.inf, truth), truth)  # float16 ends at 65504
    result, finite = f64(got), np.isfinite(truth)
    same = np.where(np.isnan(truth), np.isnan(result), result == truth)
    assert same[~finite].all(), (
        f"{what}: where the truth is not finite: got {result[~finite & ~same][:4]}, wanted {truth[~finite & ~same][:4]}"
    )
    assert np.isfinite(result[finite]).all(), (
        f"{what}: {np.sum(~np.isfinite(result[finite]))} elements are not finite, the truth is"
    )
    if finite.any():
        error, limit = (
            np.where(finite, scaled_error(np.where(finite, result, 0), np.where(finite, truth, 0)), 0.0),
            bound(truth, plain, dtype),
        )
        worst = np.unravel_index(error.argmax(), error.shape)
        assert error.max() <= limit, (
            f"{what}: error {error.max():.3g} > {limit:.3g} at {tuple(map(int, worst))}: got {result[worst]:.9g}, "
            f"truth {truth[worst]:.9g}; "
            f"{int((error > limit).sum())} of {error.size} elements are out"
        )


def within(what: str, got: Tensor, truth: np.ndarray, limit: float) -> None:
    """The absolute limits that an issue names."""
    error = np.abs(f64(got) - truth).max()
    assert error <= limit, f"{what}: error {error:.3g} > {limit:.3g}"


def hold_moments(what: str, got: Tensor, truth: Tensor) -> None:
    assert got.dtype == torch.float64, f"{what}: dtype {got.dtype}"
    error = ((got - truth) / truth).abs().max().item()
    assert error <= MOMENTS_LIMIT, f"{what}: relative error {error:.3g} > {MOMENTS_LIMIT:.3g}"


def same_bits(what: str, a: Tensor, b: Tensor) -> None:
    """Equal to the bit (NaN equals NaN)."""
    assert a.dtype == b.dtype, f"{what}: {a.dtype} and {b.dtype}"
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} and {tuple(b.shape)}"
    size = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.element_size()]
    x, y = (t.detach().contiguous().reshape(-1).view(size) if t.is_floating_point() else t.reshape(-1) for t in (a, b))
    differ = x != y
    assert not bool(differ.any()), (
        f"{what}: {int(differ.sum())} of {x.numel()} elements differ, first at {int(differ.nonzero()[0])}: "
        f"{a.reshape(-1)[differ][0].item():.9g} and {b.reshape(-1)[differ][0].item():.9g}"
    )


def all_zero(what: str, x: Tensor) -> None:
    assert bool((x == 0).all()), f"{what}: {int((x != 0).sum())} elements are not 0"
