// Root-mean-square norm of rows.
#pragma once

#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

// Sum of squares of `n` floats, in an order that depends on n alone: in fp32 over 256 elements, in fp64 above.
static inline double squares_of(const float *x, int64_t n) {
    double total = 0.0;
    int64_t i = 0;
    while (i + WIDTH <= n) {
        Vec sum = {};
        const int64_t end = n - i < 256 ? n : i + 256;
        for (; i + WIDTH <= end; i += WIDTH) sum += load(x + i) * load(x + i);
        for (int k = 0; k < WIDTH; ++k) total += (double)sum[k];
    }
    for (; i < n; ++i) total += (double)x[i] * (double)x[i];
    return total;
}

static void rms_norm(const float *x, int64_t rows, int64_t width, const float *weight, float offset, double eps, float *y) {
    for (int64_t r = 0; r < rows; ++r, x += width, y += width) {
        const float scale = (float)(1.0 / __builtin_sqrt(squares_of(x, width) / (double)width + eps));
        int64_t i = 0;
        for (; i + WIDTH <= width; i += WIDTH) store(y + i, load(x + i) * scale * (load(weight + i) + offset));
        for (; i < width; ++i) y[i] = x[i] * scale * (weight[i] + offset);
    }
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
