// Root-mean-square norm of rows, in fp32 whatever the arrays hold, rounded once.
#pragma once

#include "convert.h"
#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

// Sum of squares of `n` floats, at most BLOCK, in an order that depends on n alone: in fp32 over 256 elements, in fp64
// above.
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

// y = x / sqrt(mean(x^2) + eps) * (weight + offset), rows first .. first + rows.
static void rms_norm(TypedArray x, int64_t first, int64_t rows, int64_t width, TypedArray weight, float offset,
                     double eps, void *y) {
    float a[BLOCK], b[BLOCK], out[BLOCK];
    for (int64_t r = first; r < first + rows; ++r) {
        double squares = 0.0;
        for (int64_t at = 0; at < width; at += BLOCK)
            squares += squares_of(as_floats(x, r * width + at, block_from(at, width), a), block_from(at, width));
        const float scale = (float)(1.0 / __builtin_sqrt(squares / (double)width + eps));
        for (int64_t at = 0; at < width; at += BLOCK) {
            const int n = block_from(at, width);
            const float *values = as_floats(x, r * width + at, n, a), *weights = as_floats(weight, at, n, b);
            for (int i = 0; i < n; ++i) out[i] = values[i] * scale * (weights[i] + offset);
            put_floats(out, n, y, x.dtype, r * width + at);
        }
    }
}

// Gradients of rms_norm for rows first .. first + rows, in fp32: with s = 1 / sqrt(mean(x^2) + eps), w = weight +
// offset and dot = sum(dy * w * x) of a row, dx = s * (dy * w - x * s^2 * dot / width), and dweight += dy * x * s.
static void rms_norm_gradient(const float *x, int64_t first, int64_t rows, int64_t width, const float *weight,
                              float offset, double eps, const float *dy, float *dx, float *dweight) {
    float products[BLOCK];
    for (int64_t r = first; r < first + rows; ++r) {
        const float *values = x + r * width, *up = dy + r * width;
        double squares = 0.0, dot = 0.0;
        for (int64_t at = 0; at < width; at += BLOCK) {
            const int n = block_from(at, width);
            squares += squares_of(values + at, n);
            for (int i = 0; i < n; ++i) products[i] = up[at + i] * (weight[at + i] + offset) * values[at + i];
            dot += sum_of(products, n);
        }
        const double inverse = 1.0 / __builtin_sqrt(squares / (double)width + eps);
        const float scale = (float)inverse, pull = (float)(inverse * inverse * inverse * dot / (double)width);
        float *out = dx + r * width;
        for (int64_t i = 0; i < width; ++i) {
            out[i] = scale * up[i] * (weight[i] + offset) - pull * values[i];
            dweight[i] += up[i] * values[i] * scale;
        }
    }
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
