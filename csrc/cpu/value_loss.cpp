// Entry point of value_loss: checks, blocks, and the figures made from their sums. One block is in loss_loops.h.
#include "arguments.h"
#include "blocks.h"

using namespace ppomax;

extern "C" int ppomax_value_loss_cpu(const void *values, int values_dtype, const void *old_values, int old_dtype,
                                     const void *returns, int returns_dtype, const uint8_t *mask, int64_t n,
                                     const float *normalizer, double norm_value, double clip, float *loss,
                                     float *metrics, float *dvalues, float *scale, int threads) {
    if (n < 0) return PPOMAX_BAD_SIZE;
    if (!known_dtype(values_dtype) || !known_dtype(old_dtype) || !known_dtype(returns_dtype)) return PPOMAX_BAD_DTYPE;
    if (!finite(norm_value) || clip != clip) return PPOMAX_BAD_SCALAR;
    if (!loss || !metrics || !scale || (n > 0 && (!values || !old_values || !returns))) return PPOMAX_BAD_POINTER;
    const ValueArrays arrays = {
        {values, values_dtype}, {old_values, old_dtype}, {returns, returns_dtype}, mask, (float)clip, dvalues};
    const VectorOps &ops = vector_ops();
    ValueSums all = {};
    const bool done = over_blocks<ValueSums>(
        threads, n, [&](int64_t at, int64_t count, ValueSums *part) { ops.value(arrays, at, count, part); },
        [&](const ValueSums &part) {
            all.loss += part.loss;
            all.clipped += part.clipped;
            all.value += part.value;
            all.target += part.target;
            all.squared += part.squared;
            all.tokens += part.tokens;
        });
    if (!done) return PPOMAX_NO_MEMORY;
    const float inverse = scale_of(normalizer, norm_value, all.tokens);
    const double unit = inverse;
    *scale = inverse;
    *loss = metrics[0] = (float)(0.5 * all.loss * unit);
    metrics[1] = (float)(all.clipped * unit);
    metrics[2] = (float)(all.value * unit);
    metrics[3] = (float)(all.target * unit);
    metrics[4] = (float)(all.squared * unit);
    metrics[5] = (float)all.tokens;
    return PPOMAX_OK;
}
