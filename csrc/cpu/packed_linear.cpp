// Entry points of packed_linear: checks and threads over panels. One panel of the product is in linear_loops.h.
#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

static_assert(LINEAR_PANEL == PPOMAX_PANEL, "one panel width in header and loops");

extern "C" int ppomax_packed_linear_cpu(const float *x, int64_t rows, int64_t inputs, const float *panels, const float *bias, int64_t outputs,
                                        float *y, int threads) {
    if (rows < 0 || inputs < 1 || outputs < 1) return PPOMAX_BAD_SIZE;
    if (rows == 0) return PPOMAX_OK;
    if (!x || !panels || !y) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t first = p * PPOMAX_PANEL, columns = outputs - first < PPOMAX_PANEL ? outputs - first : PPOMAX_PANEL;
            ops.linear_panel(x, rows, inputs, panels + p * inputs * PPOMAX_PANEL, bias ? bias + first : nullptr, y + first, outputs, columns);
        }
    };
    // Some 0.7 ns for each row and input.
    parallel_for(threads, (outputs + PPOMAX_PANEL - 1) / PPOMAX_PANEL, chunk_for(rows * inputs * 7 / 10, DENSE), body);
    return PPOMAX_OK;
}

// A cache line of each of the panel's rows of W at a time, so that both sides are read and written whole while they are near.
static void pack_panel(const float *weight, int64_t columns, int64_t inputs, float *panel) {
    constexpr int64_t LINE = 16;
    for (int64_t from = 0; from < inputs; from += LINE) {
        const int64_t to = from + LINE < inputs ? from + LINE : inputs;
        for (int64_t i = from; i < to; ++i)
            for (int64_t c = columns; c < PPOMAX_PANEL; ++c) panel[i * PPOMAX_PANEL + c] = 0.0f;
        for (int64_t c = 0; c < columns; ++c)
            for (int64_t i = from; i < to; ++i) panel[i * PPOMAX_PANEL + c] = weight[c * inputs + i];
    }
}

extern "C" int ppomax_pack_linear_cpu(const float *weight, int64_t outputs, int64_t inputs, float *panels, int threads) {
    if (inputs < 1 || outputs < 1) return PPOMAX_BAD_SIZE;
    if (!weight || !panels) return PPOMAX_BAD_POINTER;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            const int64_t first = p * PPOMAX_PANEL, columns = outputs - first < PPOMAX_PANEL ? outputs - first : PPOMAX_PANEL;
            pack_panel(weight + first * inputs, columns, inputs, panels + p * inputs * PPOMAX_PANEL);
        }
    };
    parallel_for(threads, (outputs + PPOMAX_PANEL - 1) / PPOMAX_PANEL, chunk_for(inputs * PPOMAX_PANEL), body);
    return PPOMAX_OK;
}
