// Entry point of rms_norm: checks and threads over rows. A row is in rms_norm_loops.h.
#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

extern "C" int ppomax_rms_norm_cpu(const void *x, int dtype, int64_t rows, int64_t width, const void *weight,
                                   int weight_dtype, double offset, double eps, void *y, int threads) {
    if (rows < 0 || width < 1) return PPOMAX_BAD_SIZE;
    if (!known_dtype(dtype) || !known_dtype(weight_dtype)) return PPOMAX_BAD_DTYPE;
    if (!(eps >= 0.0) || !finite(eps) || !finite(offset)) return PPOMAX_BAD_SCALAR;
    if (rows == 0) return PPOMAX_OK;
    if (!x || !weight || !y) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    auto body = [&](int64_t begin, int64_t end) {
        ops.rms_norm({x, dtype}, begin, end - begin, width, {weight, weight_dtype}, (float)offset, eps, y);
    };
    parallel_for(threads, rows, chunk_for(width / 4, DENSE), body);
    return PPOMAX_OK;
}
