// Gated SiLU of rows, in fp32 whatever the arrays hold, rounded once.
#pragma once

#include "convert.h"
#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

// 1 + e^-g; NaN stays NaN.
PPOMAX_INLINE Vec divisor_of(Vec g) {
    Vec t = larger(all(-126.0f), g * -1.44269504f);
    t = t > 126.0f ? all(126.0f) : t;
    return 1.0f + exp2_of(t);
}
PPOMAX_INLINE Vec silu_of(Vec g) { return g / divisor_of(g); }
PPOMAX_INLINE Vec sigmoid_of(Vec g) { return 1.0f / divisor_of(g); }

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

// Gradients of silu_mul for rows first .. first + rows, in fp32: with p = 1 / (1 + e^-g), dgate = dy * u * (p + g * p *
// (1 - p)) and dup = dy * g * p, side by side as gate and up are in x.
static void silu_mul_gradient(const float *x, int64_t first, int64_t rows, int64_t width, const float *dy, float *dx) {
    for (int64_t r = first; r < first + rows; ++r) {
        const float *gate = x + 2 * r * width, *up = gate + width, *upstream = dy + r * width;
        float *dgate = dx + 2 * r * width, *dup = dgate + width;
        int64_t i = 0;
        for (; i < width; i += WIDTH) {
            const int n = width - i < WIDTH ? (int)(width - i) : WIDTH;
            float lanes[3][WIDTH] = {};
            Vec g, u, d;
            if (n == WIDTH) {
                g = load(gate + i), u = load(up + i), d = load(upstream + i);
            } else {
                for (int k = 0; k < n; ++k)
                    lanes[0][k] = gate[i + k], lanes[1][k] = up[i + k], lanes[2][k] = upstream[i + k];
                g = load(lanes[0]), u = load(lanes[1]), d = load(lanes[2]);
            }
            const Vec p = sigmoid_of(g), through = g * p;
            const Vec to_gate = d * u * (p + through * (1.0f - p)), to_up = d * through;
            if (n == WIDTH) {
                store(dgate + i, to_gate), store(dup + i, to_up);
            } else {
                store(lanes[0], to_gate), store(lanes[1], to_up);
                for (int k = 0; k < n; ++k) dgate[i + k] = lanes[0][k], dup[i + k] = lanes[1][k];
            }
        }
    }
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
