# mypy: allow-untyped-defs
"""Small formulas that several Triton kernels share. They are written out, and not taken from libdevice, so that the
same code runs on NVIDIA, on AMD and in the interpreter, and so that no digit is lost where a difference of near-equal
numbers would cancel."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LOG_RATIO_LIMIT = tl.constexpr(20.0)


@triton.jit
def exp(x):
    """e^x, x finite. Whole powers of 2 are taken off first: at x = 20 the rounding of x*log2(e) alone would be 1e-6."""
    whole = tl.floor(x * LOG2E + 0.5)
    rest = (x - whole * 0.693145751953125) - whole * 1.4286068203094172e-6  # ln 2 in two parts, the first exact
    return tl.exp2(rest * LOG2E) * tl.exp2(whole)


@triton.jit
def tanh(x):
    """Near 0 an odd polynomial (Chebyshev fit on |x| < 0.64, to 2e-8), where 1 - 2 / (e^2x + 1) would cancel."""
    size = tl.abs(x)
    s = x * x
    near = (((-5.999644594e-3 * s + 2.092987663e-2) * s - 5.383667625e-2) * s + 1.333267667e-1) * s - 3.333332804e-1
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, x + x * s * near, tl.where(x < 0.0, -far, far))


@triton.jit
def expm1(x):
    """e^x - 1; near 0 by its series, to 2e-8 relative on |x| < 0.5."""
    series = 1.0 + x / 9.0
    series = 1.0 + x * series / 8.0
    series = 1.0 + x * series / 7.0
    series = 1.0 + x * series / 6.0
    series = 1.0 + x * series / 5.0
    series = 1.0 + x * series / 4.0
    series = 1.0 + x * series / 3.0
    series = 1.0 + x * series / 2.0
    return tl.where(tl.abs(x) < 0.5, x * series, exp(x) - 1.0)


@triton.jit
def exp_minus_1_minus_x(x):
    """e^x - 1 - x, never negative: k3 with x = -u, approx_kl with x = log ratio; near 0 by its series."""
    series = 1.0 + x / 10.0
    series = 1.0 + x * series / 9.0
    series = 1.0 + x * series / 8.0
    series = 1.0 + x * series / 7.0
    series = 1.0 + x * series / 6.0
    series = 1.0 + x * series / 5.0
    series = 1.0 + x * series / 4.0
    series = 1.0 + x * series / 3.0
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, exp(x) - 1.0 - x)


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN: tl.minimum and tl.maximum would drop it."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to the dtype of a result, to nearest even. A GPU's cast does that; the interpreter's cuts bf16 off, so
    there the bits are rounded first."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
