// Entry point of rotate: checks and threads over tokens. A head is in rotate_loops.h.
#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

extern "C" int ppomax_rotate_cpu(const float *x, int64_t batch_stride, int64_t token_stride, int64_t head_stride,
                                 int64_t batch, int64_t tokens, int64_t heads, int64_t dim, const float *cosine,
                                 const float *sine, int64_t angle_stride, int back, float *y, int threads) {
    if (batch < 0 || tokens < 0 || heads < 0 || dim < 2 || dim % 2) return PPOMAX_BAD_SIZE;
    if (batch == 0 || tokens == 0 || heads == 0) return PPOMAX_OK;
    if (!x || !cosine || !sine || !y) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t b = row / tokens, t = row % tokens, angle = b * angle_stride + t * dim;
            for (int64_t h = 0; h < heads; ++h)
                ops.rotate_head({x, PPOMAX_FP32}, b * batch_stride + t * token_stride + h * head_stride,
                                {cosine, PPOMAX_FP32}, {sine, PPOMAX_FP32}, angle, dim, back, y,
                                (row * heads + h) * dim);
        }
    };
    parallel_for(threads, batch * tokens, chunk_for(heads * dim / 4, DENSE), body);
    return PPOMAX_OK;
}
