// Entry point of silu_mul: checks and threads over rows. A row is in silu_mul_loops.h.
#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

extern "C" int ppomax_silu_mul_cpu(const void *x, int dtype, int64_t rows, int64_t width, void *y, int threads) {
    if (rows < 0 || width < 1) return PPOMAX_BAD_SIZE;
    if (!known_dtype(dtype)) return PPOMAX_BAD_DTYPE;
    if (rows == 0) return PPOMAX_OK;
    if (!x || !y) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    auto body = [&](int64_t begin, int64_t end) { ops.silu_mul({x, dtype}, begin, end - begin, width, y); };
    parallel_for(threads, rows, chunk_for(width / 2, DENSE), body);
    return PPOMAX_OK;
}

extern "C" int ppomax_silu_mul_backward_cpu(const float *x, int64_t rows, int64_t width, const float *dy, float *dx,
                                            int threads) {
    if (rows < 0 || width < 1) return PPOMAX_BAD_SIZE;
    if (rows == 0) return PPOMAX_OK;
    if (!x || !dy || !dx) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    auto body = [&](int64_t begin, int64_t end) { ops.silu_mul_gradient(x, begin, end - begin, width, dy, dx); };
    parallel_for(threads, rows, chunk_for(width, DENSE), body);
    return PPOMAX_OK;
}
