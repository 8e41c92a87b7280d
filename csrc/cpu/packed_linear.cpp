// Entry points of packed_linear: checks and threads over panels. One panel of the product is in linear_loops.h.
#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

static_assert(LINEAR_PANEL == PPOMAX_PANEL, "one panel width in header and loops");

static bool fits(int dtype, int64_t inputs) { return dtype == PPOMAX_FP32 || inputs % 2 == 0; }

extern "C" int ppomax_packed_linear_cpu(const void *x, int dtype, int64_t rows, int64_t inputs, const void *panels,
                                        const void *bias, int64_t outputs, void *y, int threads) {
    if (dtype != PPOMAX_FP32 && dtype != PPOMAX_BF16) return PPOMAX_BAD_DTYPE;
    if (rows < 0 || inputs < 1 || outputs < 1 || !fits(dtype, inputs)) return PPOMAX_BAD_SIZE;
    if (rows == 0) return PPOMAX_OK;
    if (!x || !panels || !y) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t first = p * PPOMAX_PANEL,
                          columns = outputs - first < PPOMAX_PANEL ? outputs - first : PPOMAX_PANEL;
            const void *panel = element_at(panels, dtype, p * inputs * PPOMAX_PANEL);
            const void *offset = bias ? element_at(bias, dtype, first) : nullptr;
            if (dtype == PPOMAX_FP32)
                ops.linear_panel((const float *)x, rows, inputs, (const float *)panel, (const float *)offset,
                                 (float *)y + first, outputs, columns);
            else
                ops.linear_panel_bf16((const uint16_t *)x, rows, inputs, (const uint16_t *)panel,
                                      (const uint16_t *)offset, (uint16_t *)y + first, outputs, columns);
        }
    };
    // Some 0.7 ns for each row and input.
    parallel_for(threads, (outputs + PPOMAX_PANEL - 1) / PPOMAX_PANEL, chunk_for(rows * inputs * 7 / 10, DENSE), body);
    return PPOMAX_OK;
}

// A cache line of each of the panel's rows of W at a time, so that both sides are read and written whole while they are
// near. TOGETHER inputs lie side by side in a column.
template <class T, int TOGETHER>
static void pack_panel(const T *weight, int64_t columns, int64_t inputs, T *panel) {
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int64_t from = 0; from < inputs; from += LINE) {
        const int64_t to = from + LINE < inputs ? from + LINE : inputs;
        for (int64_t c = 0; c < PPOMAX_PANEL; ++c)
            for (int64_t i = from; i < to; ++i)
                panel[(i / TOGETHER * PPOMAX_PANEL + c) * TOGETHER + i % TOGETHER] =
                    c < columns ? weight[c * inputs + i] : (T)0;
    }
}

extern "C" int ppomax_pack_linear_cpu(const void *weight, int dtype, int64_t outputs, int64_t inputs, void *panels,
                                      int threads) {
    if (dtype != PPOMAX_FP32 && dtype != PPOMAX_BF16) return PPOMAX_BAD_DTYPE;
    if (inputs < 1 || outputs < 1 || !fits(dtype, inputs)) return PPOMAX_BAD_SIZE;
    if (!weight || !panels) return PPOMAX_BAD_POINTER;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t first = p * PPOMAX_PANEL,
                          columns = outputs - first < PPOMAX_PANEL ? outputs - first : PPOMAX_PANEL;
            if (dtype == PPOMAX_FP32)
                pack_panel<uint32_t, 1>((const uint32_t *)weight + first * inputs, columns, inputs,
                                        (uint32_t *)panels + first * inputs);
            else
                pack_panel<uint16_t, 2>((const uint16_t *)weight + first * inputs, columns, inputs,
                                        (uint16_t *)panels + first * inputs);
        }
    };
    parallel_for(threads, (outputs + PPOMAX_PANEL - 1) / PPOMAX_PANEL, chunk_for(inputs * PPOMAX_PANEL), body);
    return PPOMAX_OK;
}
