// y = x W^T for few rows: one panel of PANEL output columns at a time, its weights packed [input][column], so that a register holds WIDTH
// columns and the sums of a block of rows stay in registers over all inputs.
#pragma once

#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

constexpr int PANEL = LINEAR_PANEL, SPANS = PANEL / WIDTH;
constexpr int MOST_ROWS = WIDTH == 16 ? 12 : WIDTH == 8 ? 3 : 1;  // rows x SPANS sums, and some room, fill the registers

template <int ROWS>
static void linear_block(const float *x, int64_t inputs, const float *panel, const float *bias, float *y, int64_t y_stride, int64_t columns) {
    Vec sum[ROWS][SPANS] = {};
    for (int64_t i = 0; i < inputs; ++i) {
        Vec weight[SPANS];
        for (int s = 0; s < SPANS; ++s) weight[s] = load(panel + i * PANEL + s * WIDTH);
        for (int r = 0; r < ROWS; ++r) {
            const Vec value = all(x[r * inputs + i]);
            for (int s = 0; s < SPANS; ++s) sum[r][s] += value * weight[s];
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        float out[PANEL];
        for (int s = 0; s < SPANS; ++s) store(out + s * WIDTH, sum[r][s]);
        if (bias)
            for (int64_t c = 0; c < columns; ++c) out[c] += bias[c];
        memcpy(y + r * y_stride, out, (size_t)columns * sizeof(float));
    }
}

template <int ROWS>
static void linear_rows(int rows, const float *x, int64_t inputs, const float *panel, const float *bias, float *y, int64_t y_stride,
                        int64_t columns) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return linear_rows<ROWS - 1>(rows, x, inputs, panel, bias, y, y_stride, columns);
    }
    linear_block<ROWS>(x, inputs, panel, bias, y, y_stride, columns);
}

// All rows against one panel, in blocks of like height.
static void linear_panel(const float *x, int64_t rows, int64_t inputs, const float *panel, const float *bias, float *y, int64_t y_stride,
                         int64_t columns) {
    const int64_t blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = rows * b / blocks, end = rows * (b + 1) / blocks;
        linear_rows<MOST_ROWS>((int)(end - begin), x + begin * inputs, inputs, panel, bias, y + begin * y_stride, y_stride, columns);
    }
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
