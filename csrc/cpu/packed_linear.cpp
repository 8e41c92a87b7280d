// Entry points of packed_linear: checks and threads over panels. One panel of the product is in linear_loops.h.
#include <string.h>

#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

static_assert(LINEAR_PANEL == PPOMAX_PANEL, "one panel width in header and loops");

static bool fits(int dtype, int64_t inputs) { return dtype == PPOMAX_FP32 || inputs % 2 == 0; }

// Into how many parts the rows of each panel are cut, so that each thread has some of few panels; none below FEW rows.
static int64_t row_parts(int64_t rows, int64_t panels, int threads) {
    constexpr int64_t FEW = 96;
    const int64_t wanted = (4 * (int64_t)threads + panels - 1) / panels, most = rows / FEW;
    return threads < 2 || most < 2 ? 1 : wanted < most ? wanted : most;
}

// Numbers of a page of memory, and those that lie in a cache that cores share.
constexpr int64_t PAGE = 1024, SHARED = 1 << 22;

// x whose rows lie side by side, as that of a weight's gradient does: some rows and inputs at a time are brought
// together, since a row's inputs may each lie in a page of their own, and pass all panels.
static void product_of_columns(const LeftSide &x, int64_t rows, int64_t inputs, const float *panels, const float *bias,
                               int64_t outputs, int add, float *y, int threads) {
    constexpr int64_t MOST = 48, LEAST = 12;
    const int64_t even = rows / (4 * (threads > 1 ? threads : 1)) / LEAST * LEAST, stripe = even < LEAST  ? LEAST
                                                                                            : even > MOST ? MOST
                                                                                                          : even;
    const VectorOps &ops = vector_ops();
    auto body = [&](int64_t begin, int64_t end) {
        alignas(64) static thread_local float near[MOST * LINEAR_NEAR];
        for (int64_t s = begin; s < end; ++s) {
            const int64_t row = s * stripe, some = rows - row < stripe ? rows - row : stripe;
            for (int64_t at = 0; at < inputs; at += LINEAR_NEAR) {
                const int64_t few = inputs - at < LINEAR_NEAR ? inputs - at : LINEAR_NEAR;
                for (int64_t i = 0; i < few; ++i)
                    memcpy(near + i * some, x.data + (at + i) * x.input + row, (size_t)some * sizeof(float));
                for (int64_t first = 0; first < outputs; first += PPOMAX_PANEL) {
                    const int64_t columns = outputs - first < PPOMAX_PANEL ? outputs - first : PPOMAX_PANEL;
                    const float *offset = bias && at + few == inputs ? bias + first : nullptr;
                    ops.linear_panel({near, 1, some}, some, few, panels + first * inputs + at * PPOMAX_PANEL, offset,
                                     add || at > 0, y + row * outputs + first, outputs, columns);
                }
            }
        }
    };
    parallel_for(threads, (rows + stripe - 1) / stripe, chunk_for(stripe * inputs * outputs / 45, DENSE), body);
}

extern "C" int ppomax_packed_linear_cpu(const void *x, int dtype, int64_t rows, int64_t inputs, int64_t x_row_stride,
                                        int64_t x_input_stride, const void *panels, const void *bias, int64_t outputs,
                                        int add, void *y, int threads) {
    if (dtype != PPOMAX_FP32 && dtype != PPOMAX_BF16) return PPOMAX_BAD_DTYPE;
    if (rows < 0 || inputs < 1 || outputs < 1 || !fits(dtype, inputs)) return PPOMAX_BAD_SIZE;
    const bool along = x_input_stride == 1;
    if (!along && (x_row_stride != 1 || dtype != PPOMAX_FP32)) return PPOMAX_BAD_SIZE;
    if (add && dtype != PPOMAX_FP32) return PPOMAX_BAD_DTYPE;
    if (rows == 0) return PPOMAX_OK;
    if (!x || !panels || !y) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    if (!along && (x_input_stride >= PAGE || inputs * x_input_stride > SHARED)) {
        product_of_columns({(const float *)x, x_row_stride, x_input_stride}, rows, inputs, (const float *)panels,
                           (const float *)bias, outputs, add, (float *)y, threads);
        return PPOMAX_OK;
    }
    const int64_t count = (outputs + PPOMAX_PANEL - 1) / PPOMAX_PANEL, parts = row_parts(rows, count, threads);
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t p = item / parts, part = item % parts, first = p * PPOMAX_PANEL,
                          columns = outputs - first < PPOMAX_PANEL ? outputs - first : PPOMAX_PANEL,
                          row = rows * part / parts, some = rows * (part + 1) / parts - row;
            const void *panel = element_at(panels, dtype, p * inputs * PPOMAX_PANEL);
            const void *offset = bias ? element_at(bias, dtype, first) : nullptr;
            if (dtype == PPOMAX_FP32)
                ops.linear_panel({(const float *)x + row * x_row_stride, x_row_stride, x_input_stride}, some, inputs,
                                 (const float *)panel, (const float *)offset, add, (float *)y + row * outputs + first,
                                 outputs, columns);
            else
                ops.linear_panel_bf16((const uint16_t *)x + row * x_row_stride, x_row_stride, some, inputs,
                                      (const uint16_t *)panel, (const uint16_t *)offset,
                                      (uint16_t *)y + row * outputs + first, outputs, columns);
        }
    };
    // Some 0.7 ns for each row and input.
    parallel_for(threads, count * parts, chunk_for(rows / parts * inputs * 7 / 10, DENSE), body);
    return PPOMAX_OK;
}

// A cache line of each of the panel's rows of W at a time, so that both sides are read and written whole while they are
// near. TOGETHER inputs lie side by side in a column.
template <class T, int TOGETHER>
static void pack_panel(const T *weight, int64_t stride, int64_t columns, int64_t inputs, T *panel) {
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int64_t from = 0; from < inputs; from += LINE) {
        const int64_t to = from + LINE < inputs ? from + LINE : inputs;
        for (int64_t c = 0; c < PPOMAX_PANEL; ++c)
            for (int64_t i = from; i < to; ++i)
                panel[(i / TOGETHER * PPOMAX_PANEL + c) * TOGETHER + i % TOGETHER] =
                    c < columns ? weight[c * stride + i] : (T)0;
    }
}

// The same of a weight whose columns lie side by side.
static void pack_columns(const uint32_t *weight, int64_t stride, int64_t columns, int64_t inputs, uint32_t *panel) {
    for (int64_t i = 0; i < inputs; ++i) {
        memcpy(panel + i * PPOMAX_PANEL, weight + i * stride, (size_t)columns * sizeof(uint32_t));
        memset(panel + i * PPOMAX_PANEL + columns, 0, (size_t)(PPOMAX_PANEL - columns) * sizeof(uint32_t));
    }
}

extern "C" int ppomax_pack_linear_cpu(const void *weight, int dtype, int64_t outputs, int64_t inputs,
                                      int64_t output_stride, int64_t input_stride, void *panels, int threads) {
    if (dtype != PPOMAX_FP32 && dtype != PPOMAX_BF16) return PPOMAX_BAD_DTYPE;
    if (inputs < 1 || outputs < 1 || !fits(dtype, inputs)) return PPOMAX_BAD_SIZE;
    const bool along = input_stride == 1;
    if (!along && (output_stride != 1 || dtype != PPOMAX_FP32)) return PPOMAX_BAD_SIZE;
    if (!weight || !panels) return PPOMAX_BAD_POINTER;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t first = p * PPOMAX_PANEL,
                          columns = outputs - first < PPOMAX_PANEL ? outputs - first : PPOMAX_PANEL;
            if (dtype == PPOMAX_BF16)
                pack_panel<uint16_t, 2>((const uint16_t *)weight + first * output_stride, output_stride, columns,
                                        inputs, (uint16_t *)panels + first * inputs);
            else if (along)
                pack_panel<uint32_t, 1>((const uint32_t *)weight + first * output_stride, output_stride, columns,
                                        inputs, (uint32_t *)panels + first * inputs);
            else
                pack_columns((const uint32_t *)weight + first, input_stride, columns, inputs,
                             (uint32_t *)panels + first * inputs);
        }
    };
    parallel_for(threads, (outputs + PPOMAX_PANEL - 1) / PPOMAX_PANEL, chunk_for(inputs * PPOMAX_PANEL), body);
    return PPOMAX_OK;
}
