// Blocks of the policy and value losses: sums of each figure, and each token's gradient. Masked inputs become 0 on the
// way in.
#pragma once

#include "../formulas/kl_row.h"
#include "../formulas/ppo_row.h"
#include "../formulas/value_row.h"
#include "convert.h"
#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

constexpr int TILE = 256;  // a dozen buffers of it stay in L1

static inline const float *masked_floats(const TypedArray &array, const uint8_t *mask, int64_t at, int n,
                                         float *buffer) {
    const float *x = as_floats(array, at, n, buffer);
    if (!mask) return x;
    for (int i = 0; i < n; ++i) buffer[i] = mask[i] ? x[i] : 0.0f;
    return buffer;
}

// At most 0 for no tokens at all: ratios are positive, and a masked token counts as 0.
static inline float largest_of(const float *x, const uint8_t *mask, int n, float *buffer) {
    for (int i = 0; i < n; ++i) buffer[i] = !mask || mask[i] ? x[i] : 0.0f;
    Vec largest = {};
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH) largest = larger(load(buffer + i), largest);
    float max = 0.0f;
    for (int k = 0; k < WIDTH; ++k) max = largest[k] > max ? largest[k] : max;
    for (; i < n; ++i) max = buffer[i] > max ? buffer[i] : max;
    return max;
}

static inline double tokens_of(const uint8_t *mask, int n) {
    if (!mask) return n;
    int tokens = 0;
    for (int i = 0; i < n; ++i) tokens += mask[i] != 0;
    return tokens;
}

template <int ESTIMATOR>
static void kl_terms(const float *logprobs, const float *ref, const uint8_t *mask, int n, float coef, float *value,
                     float *slope) {
    for (int i = 0; i < n; ++i) {
        const float u = logprobs[i] - ref[i];
        value[i] = kl_value<ESTIMATOR>(u);
        slope[i] += coef * kl_slope<ESTIMATOR>(u);
    }
    if (mask)
        for (int i = 0; i < n; ++i) slope[i] = mask[i] ? slope[i] : 0.0f;
}

static inline void ppo_tile(const PpoArrays &in, int64_t at, int n, PpoSums *out) {
    float a[TILE], b[TILE], c[TILE], d[TILE];
    float loss[TILE], slope[TILE], ratio[TILE], approx_kl[TILE], clipped[TILE], dual[TILE];
    const uint8_t *mask = in.mask ? in.mask + at : nullptr;
    const float *logprobs = masked_floats(in.logprobs, mask, at, n, a);
    const float *old_logprobs = masked_floats(in.old_logprobs, mask, at, n, b);
    const float *advantages = masked_floats(in.advantages, mask, at, n, c);
    const float low = in.clip_low, high = in.clip_high, dual_clip = in.dual_clip;
    for (int i = 0; i < n; ++i) {
        const PpoTerm term = ppo_term(logprobs[i], old_logprobs[i], advantages[i], low, high, dual_clip);
        loss[i] = term.loss;
        slope[i] = term.slope;
        ratio[i] = term.ratio;
        approx_kl[i] = term.approx_kl;
        clipped[i] = term.clipped;
        dual[i] = term.dual;
    }
    if (in.is_weights.data) {
        const float *weights = masked_floats(in.is_weights, mask, at, n, d);
        for (int i = 0; i < n; ++i) {
            loss[i] *= weights[i];
            slope[i] *= weights[i];
        }
    }
    const double tokens = tokens_of(mask, n);
    out->tokens += tokens;
    out->pg += sum_of(loss, n);
    out->approx_kl += sum_of(approx_kl, n);
    out->clipped += sum_of(clipped, n);
    if (dual_clip > 0.0f) out->dual += sum_of(dual, n);
    out->ratio += sum_of(ratio, n) - (n - tokens);  // a masked token's ratio came out as 1
    const float largest = largest_of(ratio, mask, n, d);
    out->ratio_max = largest > out->ratio_max ? largest : out->ratio_max;
    for (int i = 0; i < n; ++i) ratio[i] = fabsf(ratio[i] - 1.0f);
    const float furthest = largest_of(ratio, mask, n, d);
    out->ratio_gap = furthest > out->ratio_gap ? furthest : out->ratio_gap;
    if (in.ref_logprobs.data) {
        const float *ref = masked_floats(in.ref_logprobs, mask, at, n, d);
        if (in.estimator == PPOMAX_K1) kl_terms<PPOMAX_K1>(logprobs, ref, mask, n, in.kl_coef, loss, slope);
        if (in.estimator == PPOMAX_K2) kl_terms<PPOMAX_K2>(logprobs, ref, mask, n, in.kl_coef, loss, slope);
        if (in.estimator == PPOMAX_K3) kl_terms<PPOMAX_K3>(logprobs, ref, mask, n, in.kl_coef, loss, slope);
        if (in.estimator == PPOMAX_KABS) kl_terms<PPOMAX_KABS>(logprobs, ref, mask, n, in.kl_coef, loss, slope);
        out->kl += sum_of(loss, n);
    }
    if (in.entropy.data) out->entropy += sum_of(masked_floats(in.entropy, mask, at, n, d), n);
    if (in.dlogprobs) memcpy(in.dlogprobs + at, slope, (size_t)n * sizeof(float));
}

static void ppo(const PpoArrays &in, int64_t begin, int64_t count, PpoSums *out) {
    *out = {};
    for (int64_t at = begin; at < begin + count; at += TILE)
        ppo_tile(in, at, begin + count - at < TILE ? (int)(begin + count - at) : TILE, out);
}

static inline void value_tile(const ValueArrays &in, int64_t at, int n, ValueSums *out) {
    float a[TILE], b[TILE], c[TILE], loss[TILE], squared[TILE], clipped[TILE], slope[TILE];
    const uint8_t *mask = in.mask ? in.mask + at : nullptr;
    const float *values = masked_floats(in.values, mask, at, n, a);
    const float *old_values = masked_floats(in.old_values, mask, at, n, b);
    const float *targets = masked_floats(in.returns, mask, at, n, c);
    const float clip = in.clip;
    for (int i = 0; i < n; ++i) {
        const ValueTerm term = value_term(values[i], old_values[i], targets[i], clip);
        loss[i] = term.loss;
        squared[i] = term.squared;
        clipped[i] = term.clipped;
        slope[i] = term.slope;
    }
    out->tokens += tokens_of(mask, n);
    out->loss += sum_of(loss, n);
    out->squared += sum_of(squared, n);
    out->clipped += sum_of(clipped, n);
    out->value += sum_of(values, n);
    out->target += sum_of(targets, n);
    if (in.dvalues) memcpy(in.dvalues + at, slope, (size_t)n * sizeof(float));
}

static void value(const ValueArrays &in, int64_t begin, int64_t count, ValueSums *out) {
    *out = {};
    for (int64_t at = begin; at < begin + count; at += TILE)
        value_tile(in, at, begin + count - at < TILE ? (int)(begin + count - at) : TILE, out);
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
