// Entry point of packed_linear: checks and threads over panels. One panel is in linear_loops.h.
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
