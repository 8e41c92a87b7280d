// Entry points of whiten: moments of fixed blocks, combined in order (Chan, Golub, LeVeque 1979), and the map.
#include <new>

#include "arguments.h"
#include "blocks.h"
#include "parallel.h"

using namespace ppomax;

extern "C" int ppomax_moments_cpu(const void *x, int dtype, const uint8_t *mask, int64_t n, double *moments,
                                  int threads) {
    if (n < 0) return PPOMAX_BAD_SIZE;
    if (!known_dtype(dtype)) return PPOMAX_BAD_DTYPE;
    if (!moments || (n > 0 && !x)) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    Moments all = {0.0, 0.0, 0.0};
    const bool done = over_blocks<Moments>(
        threads, n, [&](int64_t at, int64_t count, Moments *part) { ops.moments({x, dtype}, mask, at, count, part); },
        [&](const Moments &part) {
            if (part.count == 0.0) return;
            const double count = all.count + part.count, apart = part.mean - all.mean;
            all.m2 += part.m2 + apart * apart * (all.count * part.count / count);
            all.mean += apart * (part.count / count);
            all.count = count;
        });
    if (!done) return PPOMAX_NO_MEMORY;
    moments[0] = all.count;
    moments[1] = all.mean;
    moments[2] = all.m2;
    return PPOMAX_OK;
}

extern "C" int ppomax_whiten_cpu(const void *x, int dtype, const uint8_t *mask, int64_t n, const double *moments,
                                 int shift_mean, double eps, float *y, int threads) {
    if (n < 0) return PPOMAX_BAD_SIZE;
    if (!known_dtype(dtype)) return PPOMAX_BAD_DTYPE;
    if (!(eps > 0.0) || !finite(eps)) return PPOMAX_BAD_SCALAR;
    if (!moments || (n > 0 && (!x || !y))) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    const double count = moments[0] > 1.0 ? moments[0] : 1.0, mean = moments[1];
    const double scale = 1.0 / __builtin_sqrt(moments[2] / count + eps);
    auto body = [&](int64_t begin, int64_t end) {
        ops.whiten({x, dtype}, mask, begin, end - begin, mean, scale, shift_mean ? 0.0 : mean, y);
    };
    parallel_for(threads, n, chunk_for(1), body);
    return PPOMAX_OK;
}
