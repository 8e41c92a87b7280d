// Root-mean-square norm and gated SiLU of rows, in fp32 whatever the arrays hold, rounded once.
#pragma once

#include "convert.h"
#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

// Sum of squares of `n` floats, at most BLOCK, in an order that depends on n alone: in fp32 over 256 elements, in fp64 above.
static inline double squares_of(const float *x, int n) {
    double total = 0.0;
    int i = 0;
    while (i + WIDTH <= n) {
        Vec sum = {};
        const int end = n - i < 256 ? n : i + 256;
        for (; i + WIDTH <= end; i += WIDTH) sum += load(x + i) * load(x + i);
        for (int k = 0; k < WIDTH; ++k) total += (double)sum[k];
    }
    for (; i < n; ++i) total += (double)x[i] * (double)x[i];
    return total;
}

static inline int block_from(int64_t at, int64_t width) { return width - at < BLOCK ? (int)(width - at) : BLOCK; }

// y = x / sqrt(mean(x^2) + eps) * (weight + offset), rows first .. first + rows.
static void rms_norm(TypedArray x, int64_t first, int64_t rows, int64_t width, TypedArray weight, float offset, double eps, void *y) {
    float a[BLOCK], b[BLOCK], out[BLOCK];
    for (int64_t r = first; r < first + rows; ++r) {
        double squares = 0.0;
        for (int64_t at = 0; at < width; at += BLOCK) squares += squares_of(as_floats(x, r * width + at, block_from(at, width), a), block_from(at, width));
        const float scale = (float)(1.0 / __builtin_sqrt(squares / (double)width + eps));
        for (int64_t at = 0; at < width; at += BLOCK) {
            const int n = block_from(at, width);
            const float *values = as_floats(x, r * width + at, n, a), *weights = as_floats(weight, at, n, b);
            for (int i = 0; i < n; ++i) out[i] = values[i] * scale * (weights[i] + offset);
            put_floats(out, n, y, x.dtype, r * width + at);
        }
    }
}

// g / (1 + e^-g); NaN stays NaN.
PPOMAX_INLINE Vec silu_of(Vec g) {
    Vec t = larger(all(-126.0f), g * -1.44269504f);
    t = t > 126.0f ? all(126.0f) : t;
    return g / (1.0f + exp2_of(t));
}

// y[r] = silu(x[r, :width]) * x[r, width:], rows first .. first + rows of x (2 * width wide).
static void silu_mul(TypedArray x, int64_t first, int64_t rows, int64_t width, void *y) {
    float a[BLOCK], b[BLOCK], out[BLOCK];
    for (int64_t r = first; r < first + rows; ++r)
        for (int64_t at = 0; at < width; at += BLOCK) {
            const int n = block_from(at, width);
            const float *gate = as_floats(x, 2 * r * width + at, n, a), *up = as_floats(x, (2 * r + 1) * width + at, n, b);
            int i = 0;
            for (; i + WIDTH <= n; i += WIDTH) store(out + i, silu_of(load(gate + i)) * load(up + i));
            for (; i < n; ++i) out[i] = silu_of(all(gate[i]))[0] * up[i];
            put_floats(out, n, y, x.dtype, r * width + at);
        }
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
