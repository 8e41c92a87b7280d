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

extern "C" int ppomax_rms_norm_backward_cpu(const float *x, int64_t rows, int64_t width, const float *weight,
                                            double offset, double eps, const float *dy, float *dx, float *dweights,
                                            int threads) {
    if (rows < 0 || width < 1) return PPOMAX_BAD_SIZE;
    if (!(eps >= 0.0) || !finite(eps) || !finite(offset)) return PPOMAX_BAD_SCALAR;
    if (rows == 0) return PPOMAX_OK;
    if (!x || !weight || !dy || !dx || !dweights) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    const int64_t blocks = (rows + PPOMAX_GRADIENT_ROWS - 1) / PPOMAX_GRADIENT_ROWS;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t first = b * PPOMAX_GRADIENT_ROWS, left = rows - first;
            const int64_t count = left < PPOMAX_GRADIENT_ROWS ? left : PPOMAX_GRADIENT_ROWS;
            float *sums = dweights + b * width;
            for (int64_t i = 0; i < width; ++i) sums[i] = 0.0f;
            ops.rms_norm_gradient(x, first, count, width, weight, (float)offset, eps, dy, dx, sums);
        }
    };
    parallel_for(threads, blocks, chunk_for(PPOMAX_GRADIENT_ROWS * width, DENSE), body);
    return PPOMAX_OK;
}
