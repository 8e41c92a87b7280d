// Entry point of ppo_loss: checks, blocks, and the figures made from their sums. One block is in loss_loops.h.
#include "arguments.h"
#include "blocks.h"

using namespace ppomax;

extern "C" int ppomax_ppo_loss_cpu(const void *logprobs, int logprobs_dtype, const void *old_logprobs, int old_dtype,
                                   const void *advantages, int advantages_dtype, const uint8_t *mask,
                                   const void *is_weights, int is_weights_dtype, const void *ref_logprobs,
                                   int ref_dtype, const void *entropy, int entropy_dtype, int64_t n,
                                   const float *normalizer, double norm_value, double clip_low, double clip_high,
                                   double dual_clip, double kl_coef, int estimator, double ent_coef, float *loss,
                                   float *metrics, float *dlogprobs, float *scale, int threads) {
    if (n < 0) return PPOMAX_BAD_SIZE;
    if (!known_dtype(logprobs_dtype) || !known_dtype(old_dtype) || !known_dtype(advantages_dtype))
        return PPOMAX_BAD_DTYPE;
    if ((is_weights && !known_dtype(is_weights_dtype)) || (ref_logprobs && !known_dtype(ref_dtype)) ||
        (entropy && !known_dtype(entropy_dtype)))
        return PPOMAX_BAD_DTYPE;
    if (!known_estimator(estimator) || !finite(norm_value) || !(clip_low >= 0.0 && clip_low <= 1.0) ||
        !(clip_high >= 0.0) || !(dual_clip >= 0.0) || !finite(kl_coef) || !finite(ent_coef))
        return PPOMAX_BAD_SCALAR;
    if (!loss || !metrics || !scale || (n > 0 && (!logprobs || !old_logprobs || !advantages)))
        return PPOMAX_BAD_POINTER;
    const PpoArrays arrays = {{logprobs, logprobs_dtype},
                              {old_logprobs, old_dtype},
                              {advantages, advantages_dtype},
                              {is_weights, is_weights_dtype},
                              {ref_logprobs, ref_dtype},
                              {entropy, entropy_dtype},
                              mask,
                              (float)clip_low,
                              (float)clip_high,
                              (float)dual_clip,
                              (float)kl_coef,
                              estimator,
                              dlogprobs};
    const VectorOps &ops = vector_ops();
    PpoSums all = {};
    const bool done = over_blocks<PpoSums>(
        threads, n, [&](int64_t at, int64_t count, PpoSums *part) { ops.ppo(arrays, at, count, part); },
        [&](const PpoSums &part) {
            all.pg += part.pg;
            all.approx_kl += part.approx_kl;
            all.clipped += part.clipped;
            all.dual += part.dual;
            all.ratio += part.ratio;
            all.kl += part.kl;
            all.entropy += part.entropy;
            all.tokens += part.tokens;
            all.ratio_max = part.ratio_max > all.ratio_max ? part.ratio_max : all.ratio_max;
            all.ratio_gap = part.ratio_gap > all.ratio_gap ? part.ratio_gap : all.ratio_gap;
        });
    if (!done) return PPOMAX_NO_MEMORY;
    const float inverse = scale_of(normalizer, norm_value, all.tokens);
    const double unit = inverse;
    *scale = inverse;
    *loss = (float)((all.pg + kl_coef * all.kl - ent_coef * all.entropy) * unit);
    metrics[0] = (float)(all.pg * unit);
    metrics[1] = (float)(all.approx_kl * unit);
    metrics[2] = (float)(all.clipped * unit);
    metrics[3] = (float)(all.dual * unit);
    metrics[4] = (float)(all.ratio * unit);
    metrics[5] = all.ratio == all.ratio ? all.ratio_max : (float)all.ratio;  // a NaN ratio shows in the maxima too
    metrics[6] = (float)(all.kl * unit);
    metrics[7] = (float)(all.entropy * unit);
    metrics[8] = (float)all.tokens;
    metrics[9] = all.ratio == all.ratio ? all.ratio_gap : (float)all.ratio;
    return PPOMAX_OK;
}
