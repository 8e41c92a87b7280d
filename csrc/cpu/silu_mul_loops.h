// Gated SiLU of rows, in fp32 whatever the arrays hold, rounded once.
#pragma once

#include "convert.h"
#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

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
            const float *gate = as_floats(x, 2 * r * width + at, n, a),
                        *up = as_floats(x, (2 * r + 1) * width + at, n, b);
            int i = 0;
            for (; i + WIDTH <= n; i += WIDTH) store(out + i, silu_of(load(gate + i)) * load(up + i));
            for (; i < n; ++i) out[i] = silu_of(all(gate[i]))[0] * up[i];
            put_floats(out, n, y, x.dtype, r * width + at);
        }
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
