// y = x W^T for few rows: one panel of PANEL output columns at a time, its weights packed [input][column], so that a
// register holds WIDTH columns and the sums of a block of rows stay in registers over all inputs. In bf16 two inputs
// lie side by side in each column, and sums are fp32; processors that multiply such pairs do so, by tiles (amx.h) or
// one register at a time.
#pragma once

#include "amx.h"
#include "convert.h"
#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

constexpr int PANEL = LINEAR_PANEL, SPANS = PANEL / WIDTH;
constexpr int MOST_ROWS = WIDTH == 16  ? 12
                          : WIDTH == 8 ? 3
                                       : 1;  // rows x SPANS sums, and some room, fill the registers

// Where a block's results go: `columns` of each row of y, from `bias` and, with `add`, what is there.
struct Target {
    float *y;
    int64_t stride, columns;
    const float *bias;
    int add;
};

// ALONG: the inputs of a row lie side by side; else the rows of an input do.
template <int ROWS, bool ALONG>
static void linear_block(const float *x, int64_t stride, int64_t inputs, const float *panel, const Target &to) {
    Vec sum[ROWS][SPANS] = {};
    const bool whole = to.columns == PANEL;
    float out[PANEL] = {};
    if (to.add)
        for (int r = 0; r < ROWS; ++r) {
            const float *from = to.y + r * to.stride;
            if (!whole) from = (const float *)memcpy(out, from, (size_t)to.columns * sizeof(float));
            for (int s = 0; s < SPANS; ++s) sum[r][s] = load(from + s * WIDTH);
        }
    for (int64_t i = 0; i < inputs; ++i) {
        Vec weight[SPANS];
        for (int s = 0; s < SPANS; ++s) weight[s] = load(panel + i * PANEL + s * WIDTH);
        for (int r = 0; r < ROWS; ++r) {
            const Vec value = all(ALONG ? x[r * stride + i] : x[i * stride + r]);
            for (int s = 0; s < SPANS; ++s) sum[r][s] += value * weight[s];
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        float *y = whole ? to.y + r * to.stride : out;
        for (int s = 0; s < SPANS; ++s) store(y + s * WIDTH, sum[r][s]);
        if (to.bias)
            for (int64_t c = 0; c < to.columns; ++c) y[c] += to.bias[c];
        if (!whole) memcpy(to.y + r * to.stride, out, (size_t)to.columns * sizeof(float));
    }
}

template <int ROWS, bool ALONG>
static void linear_rows(int rows, const float *x, int64_t stride, int64_t inputs, const float *panel,
                        const Target &to) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return linear_rows<ROWS - 1, ALONG>(rows, x, stride, inputs, panel, to);
    }
    linear_block<ROWS, ALONG>(x, stride, inputs, panel, to);
}

// fn(first row, rows) for all rows in blocks of like height, at most MOST_ROWS.
template <class Fn>
PPOMAX_INLINE void for_row_blocks(int64_t rows, Fn fn) {
    const int64_t blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = rows * b / blocks, end = rows * (b + 1) / blocks;
        fn(begin, (int)(end - begin));
    }
}

// All rows against one panel, some inputs at a time, so that what is read of the panel stays near.
static void linear_panel(const LeftSide &x, int64_t rows, int64_t inputs, const float *panel, const float *bias,
                         int add, float *y, int64_t y_stride, int64_t columns) {
    const bool along = x.input == 1;
    for (int64_t at = 0; at < inputs; at += LINEAR_NEAR) {
        const int64_t some = inputs - at < LINEAR_NEAR ? inputs - at : LINEAR_NEAR;
        const float *weights = panel + at * PANEL, *offset = at + some == inputs ? bias : nullptr;
        for_row_blocks(rows, [&](int64_t first, int count) {
            const float *from = x.data + first * x.row + at * x.input;
            const Target to = {y + first * y_stride, y_stride, columns, offset, add || at > 0};
            if (along)
                linear_rows<MOST_ROWS, true>(count, from, x.row, some, weights, to);
            else
                linear_rows<MOST_ROWS, false>(count, from, x.input, some, weights, to);
        });
    }
}

// ---- bf16: x rows x inputs (even), panel [inputs / 2][PANEL][2]
// ---------------------------------------------------------------------------

// A register holds WIDTH columns of a pair of inputs; the pair's two values of a row are one 32-bit number.
struct WidenedPairs {
    static PPOMAX_INLINE Vec add(Vec sum, IntVec weight, int32_t pair) {
        sum += (Vec)(weight << 16) * from_bits((uint32_t)pair << 16);
        return sum + (Vec)(weight & (int32_t)0xffff0000) * from_bits((uint32_t)pair & 0xffff0000u);
    }
};

template <class Pairs, int ROWS>
PPOMAX_INLINE void bf16_block(const uint16_t *x, int64_t x_stride, int64_t inputs, const uint16_t *panel,
                              const uint16_t *bias, uint16_t *y, int64_t y_stride, int64_t columns) {
    Vec sum[ROWS][SPANS] = {};
    for (int64_t i = 0; i < inputs; i += 2) {
        IntVec weight[SPANS];
        for (int s = 0; s < SPANS; ++s) memcpy(&weight[s], panel + i * PANEL + 2 * s * WIDTH, sizeof(IntVec));
        for (int r = 0; r < ROWS; ++r) {
            int32_t pair;
            memcpy(&pair, x + r * x_stride + i, 4);
            for (int s = 0; s < SPANS; ++s) sum[r][s] = Pairs::add(sum[r][s], weight[s], pair);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        float out[PANEL];
        for (int s = 0; s < SPANS; ++s) store(out + s * WIDTH, sum[r][s]);
        for (int64_t c = 0; c < columns; ++c)
            y[r * y_stride + c] = to_bf16(bias ? out[c] + from_bf16(bias[c]) : out[c]);
    }
}

#if defined(__AVX512F__)
// The instruction by name, since this file is compiled for processors that lack it too; it is looked for at run time.
struct MultipliedPairs {
    static PPOMAX_INLINE Vec add(Vec sum, IntVec weight, int32_t pair) {
        const IntVec both = pair - IntVec{};
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(both));
        return sum;
    }
};
#endif

template <class Pairs, int ROWS>
static void bf16_rows(int rows, const uint16_t *x, int64_t x_stride, int64_t inputs, const uint16_t *panel,
                      const uint16_t *bias, uint16_t *y, int64_t y_stride, int64_t columns) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS)
            return bf16_rows<Pairs, ROWS - 1>(rows, x, x_stride, inputs, panel, bias, y, y_stride, columns);
    }
    bf16_block<Pairs, ROWS>(x, x_stride, inputs, panel, bias, y, y_stride, columns);
}

static void linear_panel_bf16(const uint16_t *x, int64_t x_stride, int64_t rows, int64_t inputs, const uint16_t *panel,
                              const uint16_t *bias, uint16_t *y, int64_t y_stride, int64_t columns) {
#if defined(PPOMAX_AMX)
    if (has_tiles()) return linear_panel_tiles(x, x_stride, rows, inputs, panel, bias, y, y_stride, columns);
#endif
    auto run = bf16_rows<WidenedPairs, MOST_ROWS>;
#if defined(__AVX512F__)
    if (__builtin_cpu_supports("avx512bf16")) run = bf16_rows<MultipliedPairs, MOST_ROWS>;
#endif
    for_row_blocks(rows, [&](int64_t first, int count) {
        run(count, x + first * x_stride, x_stride, inputs, panel, bias, y + first * y_stride, y_stride, columns);
    });
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
