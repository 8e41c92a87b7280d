// One block of the policy and value losses: sums of each figure, and each token's gradient. Masked inputs become 0 on the way in.
#pragma once

#include "../kl_row.h"
#include "../ppo_row.h"
#include "../value_row.h"
#include "convert.h"

namespace ppomax {
namespace PPOMAX_NS {

static inline const float *masked_floats(const TypedArray &array, const uint8_t *mask, int64_t at, int n, float *buffer) {
    const float *x = as_floats(array, at, n, buffer);
    if (!mask) return x;
    for (int i = 0; i < n; ++i) buffer[i] = mask[at + i] ? x[i] : 0.0f;
    return buffer;
}

// In fp64, lane by lane in a fixed order: the same for any thread count.
static inline double sum_of(const float *x, int n) {
    double sums[8] = {};
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; ++k) sums[k] += (double)x[i + k];
    for (; i < n; ++i) sums[0] += (double)x[i];
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

static inline double tokens_of(const uint8_t *mask, int64_t at, int n) {
    if (!mask) return n;
    int tokens = 0;
    for (int i = 0; i < n; ++i) tokens += mask[at + i] != 0;
    return tokens;
}

template <int ESTIMATOR>
static void kl_terms(const float *logprobs, const float *ref, const uint8_t *mask, int n, float coef, float *value, float *slope) {
    for (int i = 0; i < n; ++i) {
        const float u = logprobs[i] - ref[i];
        value[i] = kl_value<ESTIMATOR>(u);
        slope[i] += coef * kl_slope<ESTIMATOR>(u);
    }
    if (mask)
        for (int i = 0; i < n; ++i) slope[i] = mask[i] ? slope[i] : 0.0f;
}

// At most BLOCK tokens.
static void ppo(const PpoArrays &in, int64_t at, int64_t count, PpoSums *out) {
    float a[BLOCK], b[BLOCK], c[BLOCK], d[BLOCK];
    float loss[BLOCK], slope[BLOCK], ratio[BLOCK], approx_kl[BLOCK], clipped[BLOCK], dual[BLOCK];
    const int n = (int)count;
    const float *logprobs = masked_floats(in.logprobs, in.mask, at, n, a);
    const float *old_logprobs = masked_floats(in.old_logprobs, in.mask, at, n, b);
    const float *advantages = masked_floats(in.advantages, in.mask, at, n, c);
    for (int i = 0; i < n; ++i) {
        const PpoTerm term = ppo_term(logprobs[i], old_logprobs[i], advantages[i], in.clip_low, in.clip_high, in.dual_clip);
        loss[i] = term.loss;
        slope[i] = term.slope;
        ratio[i] = term.ratio;
        approx_kl[i] = term.approx_kl;
        clipped[i] = term.clipped;
        dual[i] = term.dual;
    }
    if (in.is_weights.data) {
        const float *weights = masked_floats(in.is_weights, in.mask, at, n, d);
        for (int i = 0; i < n; ++i) {
            loss[i] *= weights[i];
            slope[i] *= weights[i];
        }
    }
    out->tokens = tokens_of(in.mask, at, n);
    out->pg = sum_of(loss, n);
    out->approx_kl = sum_of(approx_kl, n);
    out->clipped = sum_of(clipped, n);
    out->dual = sum_of(dual, n);
    out->ratio = sum_of(ratio, n) - (double)(n - out->tokens);  // a masked token's ratio came out as 1
    float largest = 0.0f;
    for (int i = 0; i < n; ++i) {
        const float kept = !in.mask || in.mask[at + i] ? ratio[i] : 0.0f;
        largest = kept > largest ? kept : largest;
    }
    out->ratio_max = largest;
    out->kl = out->entropy = 0.0;
    if (in.ref_logprobs.data) {
        const float *ref = masked_floats(in.ref_logprobs, in.mask, at, n, d);
        const uint8_t *mask = in.mask ? in.mask + at : nullptr;
        if (in.estimator == PPOMAX_K1) kl_terms<PPOMAX_K1>(logprobs, ref, mask, n, in.kl_coef, loss, slope);
        if (in.estimator == PPOMAX_K2) kl_terms<PPOMAX_K2>(logprobs, ref, mask, n, in.kl_coef, loss, slope);
        if (in.estimator == PPOMAX_K3) kl_terms<PPOMAX_K3>(logprobs, ref, mask, n, in.kl_coef, loss, slope);
        if (in.estimator == PPOMAX_KABS) kl_terms<PPOMAX_KABS>(logprobs, ref, mask, n, in.kl_coef, loss, slope);
        out->kl = sum_of(loss, n);
    }
    if (in.entropy.data) out->entropy = sum_of(masked_floats(in.entropy, in.mask, at, n, d), n);
    if (in.dlogprobs) memcpy(in.dlogprobs + at, slope, (size_t)n * sizeof(float));
}

// At most BLOCK tokens.
static void value(const ValueArrays &in, int64_t at, int64_t count, ValueSums *out) {
    float a[BLOCK], b[BLOCK], c[BLOCK], loss[BLOCK], squared[BLOCK], clipped[BLOCK], slope[BLOCK];
    const int n = (int)count;
    const float *values = masked_floats(in.values, in.mask, at, n, a);
    const float *old_values = masked_floats(in.old_values, in.mask, at, n, b);
    const float *targets = masked_floats(in.returns, in.mask, at, n, c);
    for (int i = 0; i < n; ++i) {
        const ValueTerm term = value_term(values[i], old_values[i], targets[i], in.clip);
        loss[i] = term.loss;
        squared[i] = term.squared;
        clipped[i] = term.clipped;
        slope[i] = term.slope;
    }
    out->tokens = tokens_of(in.mask, at, n);
    out->loss = sum_of(loss, n);
    out->squared = sum_of(squared, n);
    out->clipped = sum_of(clipped, n);
    out->value = sum_of(values, n);
    out->target = sum_of(targets, n);
    if (in.dvalues) memcpy(in.dvalues + at, slope, (size_t)n * sizeof(float));
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
