// One block of KL penalties, moments and whitening. Blocks are at most BLOCK elements, so 16-bit inputs are converted
// in L1.
#pragma once

#include "../formulas/kl_row.h"
#include "convert.h"
#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

template <int ESTIMATOR>
static void kl_block(const float *logprobs, const float *ref, int n, float scale, float *out) {
    for (int i = 0; i < n; ++i) out[i] = scale * kl_value<ESTIMATOR>(logprobs[i] - ref[i]);
}

template <int ESTIMATOR>
static void kl_gradient_block(const float *dkl, const float *logprobs, const float *ref, int n, float *out) {
    for (int i = 0; i < n; ++i) out[i] = dkl[i] * kl_slope<ESTIMATOR>(logprobs[i] - ref[i]);
}

static void kl(TypedArray logprobs, TypedArray ref, int64_t begin, int64_t count, int estimator, float scale,
               float *out) {
    float a[BLOCK], b[BLOCK];
    for (int64_t at = begin; at < begin + count; at += BLOCK) {
        const int n = begin + count - at < BLOCK ? (int)(begin + count - at) : BLOCK;
        const float *x = as_floats(logprobs, at, n, a), *y = as_floats(ref, at, n, b);
        if (estimator == PPOMAX_K1) kl_block<PPOMAX_K1>(x, y, n, scale, out + at);
        if (estimator == PPOMAX_K2) kl_block<PPOMAX_K2>(x, y, n, scale, out + at);
        if (estimator == PPOMAX_K3) kl_block<PPOMAX_K3>(x, y, n, scale, out + at);
        if (estimator == PPOMAX_KABS) kl_block<PPOMAX_KABS>(x, y, n, scale, out + at);
    }
}

static void kl_gradient(const float *dkl, TypedArray logprobs, TypedArray ref, int64_t begin, int64_t count,
                        int estimator, float *out) {
    float a[BLOCK], b[BLOCK];
    for (int64_t at = begin; at < begin + count; at += BLOCK) {
        const int n = begin + count - at < BLOCK ? (int)(begin + count - at) : BLOCK;
        const float *x = as_floats(logprobs, at, n, a), *y = as_floats(ref, at, n, b), *d = dkl + at;
        if (estimator == PPOMAX_K1) kl_gradient_block<PPOMAX_K1>(d, x, y, n, out + at);
        if (estimator == PPOMAX_K2) kl_gradient_block<PPOMAX_K2>(d, x, y, n, out + at);
        if (estimator == PPOMAX_K3) kl_gradient_block<PPOMAX_K3>(d, x, y, n, out + at);
        if (estimator == PPOMAX_KABS) kl_gradient_block<PPOMAX_KABS>(d, x, y, n, out + at);
    }
}

// Sum of (x - centre)^POWER in fp64, eight lanes in a fixed order.
template <int POWER>
static double deviations(const float *x, int n, double centre) {
    double sums[8] = {};
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; ++k) {
            const double apart = (double)x[i + k] - centre;
            sums[k] += POWER == 1 ? apart : apart * apart;
        }
    for (; i < n; ++i) {
        const double apart = (double)x[i] - centre;
        sums[0] += POWER == 1 ? apart : apart * apart;
    }
    double total = 0.0;
    for (int k = 0; k < 8; ++k) total += sums[k];
    return total;
}

// At most BLOCK elements: mean first, then squared deviations from it.
static void moments(TypedArray array, const uint8_t *mask, int64_t at, int64_t count, Moments *out) {
    float a[BLOCK], kept[BLOCK];
    const int n = (int)count;
    const float *x = as_floats(array, at, n, a);
    int m = n;
    if (mask) {
        m = 0;
        for (int i = 0; i < n; ++i) {
            kept[m] = x[i];
            m += mask[at + i] != 0;
        }
        x = kept;
    }
    const double mean = m ? deviations<1>(x, m, 0.0) / m : 0.0;
    const double m2 = deviations<2>(x, m, mean);
    out->count = m;
    out->mean = mean;
    out->m2 = m2;
}

static void whiten(TypedArray array, const uint8_t *mask, int64_t begin, int64_t count, double mean, double scale,
                   double shift, float *out) {
    float a[BLOCK];
    for (int64_t at = begin; at < begin + count; at += BLOCK) {
        const int n = begin + count - at < BLOCK ? (int)(begin + count - at) : BLOCK;
        const float *x = as_floats(array, at, n, a);
        float *y = out + at;
        for (int i = 0; i < n; ++i) y[i] = (float)(((double)x[i] - mean) * scale + shift);
        if (mask)
            for (int i = 0; i < n; ++i) y[i] = mask[at + i] ? y[i] : 0.0f;
    }
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
