// Rows of logits: one pass for maximum, sum and weighted sum; one pass for the gradient.
// A block of the row is brought into L1 (converted if it is 16-bit, through the softcap if there is one); its maximum
// is taken lane by lane, then each logit costs one exponential. A lane keeps its own running maximum, so nothing is
// reduced across lanes before the row's end.
#pragma once

#include "../formulas/logprob_row.h"
#include "convert.h"
#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

constexpr float NO_LESS =
    -126.0f;  // below 2^-126 a term is lost beside the maximum's 1; exp2_of would make garbage of it

// cap * tanh(x / cap), and its derivative as 4e / (1 + e)^2 with e = exp(-2 |x| / cap): 1 - tanh^2 would cancel where
// tanh is near 1.
static inline void soften(float *x, int n, float cap, float *slope) {
    const float inverse = 1.0f / cap;
    for (int i = 0; i < n; ++i) {
        const float u = x[i] * inverse;
        float e, e_minus_1;
        exp_pair(clamp(-2.0f * (u < 0.0f ? -u : u), -87.0f, 0.0f), &e, &e_minus_1);
        const float share = 1.0f / (e_minus_1 + 2.0f);
        const float y = -e_minus_1 * share;
        x[i] = cap * (u < 0.0f ? -y : y);
        if (slope) slope[i] = 4.0f * e * share * share;
    }
}

// `n` logits from `at` on, after the softcap, padded with -inf to whole registers. May point into the row itself.
static inline const float *logit_block(const LogitRow &row, int64_t at, int n, float *buffer, float *slope) {
    const int padded = (n + WIDTH - 1) / WIDTH * WIDTH;
    const TypedArray array = {row.data, row.dtype};
    const float *x = as_floats(array, at, n, buffer);
    if (x != buffer && (row.softcap > 0.0 || padded != n)) {
        memcpy(buffer, x, (size_t)n * sizeof(float));
        x = buffer;
    }
    if (row.softcap > 0.0) soften(buffer, n, (float)row.softcap, slope);
    for (int i = n; i < padded; ++i) buffer[i] = -INFINITY;
    return x;
}

// log2(e) / temperature; finite, so that a temperature near 0 leaves the maximum's 0 * c at 0.
static inline float log2_scale(double temperature) {
    const double c = LOG2_E / temperature;
    return (float)(c < 3e38 ? c : 3e38);
}

struct Lanes {
    Vec max, sum, weighted;
};

static inline void move_max(Lanes &lanes, Vec max, float c) {
    const Vec t = larger(all(NO_LESS), (lanes.max - max) * c);
    const Vec shrink = exp2_of(t);
    lanes.weighted = shrink * (lanes.weighted + lanes.sum * t);
    lanes.sum = shrink * lanes.sum;
    lanes.max = max;
}

static inline RowStats row_stats(const LogitRow &row) {
    float buffer[BLOCK];
    const float c = log2_scale(row.temperature);
    Lanes lanes = {all(LOWEST), Vec{}, Vec{}};
    for (int64_t at = 0; at < row.vocab; at += BLOCK) {
        const int n = row.vocab - at < BLOCK ? (int)(row.vocab - at) : BLOCK;
        const float *x = logit_block(row, at, n, buffer, nullptr);
        Vec max = lanes.max, max_b = max;
        int i = 0;
        for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
            max = larger(load(x + i), max);
            max_b = larger(load(x + i + WIDTH), max_b);
        }
        for (; i < n; i += WIDTH) max = larger(load(x + i), max);
        move_max(lanes, larger(max, max_b), c);
        Vec sum = {}, weighted = {};
        for (i = 0; i < n; i += WIDTH) {
            const Vec t = larger(all(NO_LESS), (load(x + i) - lanes.max) * c);
            const Vec e = exp2_of(t);
            sum += e;
            weighted += e * t;
        }
        lanes.sum += sum;
        lanes.weighted += weighted;
    }
    RowStats stats = {LOWEST, 0.0f, 0.0f};
    for (int k = 0; k < WIDTH; ++k) stats.max = lanes.max[k] > stats.max ? lanes.max[k] : stats.max;
    move_max(lanes, all(stats.max), c);
    double sum = 0.0, weighted = 0.0;
    for (int k = 0; k < WIDTH; ++k) {
        sum += (double)lanes.sum[k];
        weighted += (double)lanes.weighted[k];
    }
    stats.sum = (float)sum;
    stats.weighted = (float)weighted;
    return stats;
}

static inline float logit_at(const LogitRow &row, int64_t at) {
    float x = one_float({row.data, row.dtype}, at);
    if (row.softcap > 0.0) soften(&x, 1, (float)row.softcap, nullptr);
    return x;
}

static void logprob_row(const LogitRow &row, int64_t label, float *logprob, float *entropy, float *lse) {
    const bool here = label >= 0;  // else it lies in another shard of the vocabulary
    const float picked = here ? logit_at(row, label) : 0.0f;
    const RowResult result = finish_row(row_stats(row), picked, row.temperature);
    *logprob = here ? result.logprob : 0.0f;
    if (entropy) *entropy = result.entropy;
    *lse = result.lse;
}

// A saved lse far from 0 has lost digits (half an ulp is 1e-6 at 16): sum the row's probabilities again and mend it. A
// saved lse that is not this row's own, rounded, is that of a vocabulary of which the row is one shard: it stays.
static inline double mended_lse(const LogitRow &row, float lse) {
    if (!(lse >= 16.0f || lse <= -16.0f)) return (double)lse;
    const RowStats stats = row_stats(row);
    const double own = (double)stats.max / row.temperature + log((double)stats.sum);
    return (float)own == lse ? own : (double)lse;
}

static void logits_gradient(const LogitRow &row, const RowUpstream &up, void *out) {
    float buffer[BLOCK], slope[BLOCK], gradient[BLOCK];
    const int64_t bytes = row.vocab * (row.dtype == PPOMAX_FP32 ? 4 : 2);
    if (up.lse == -INFINITY || (up.dlogprob == 0.0f && up.dentropy == 0.0f)) {
        memset(out, 0, (size_t)bytes);
        return;
    }
    // With t = log2 p: dx = p * (a + b * t), and one more term at the label.
    const double lse = mended_lse(row, up.lse), shift = lse * row.temperature;
    const float shift_high = (float)shift, shift_low = (float)(shift - (double)shift_high);
    const float c = log2_scale(row.temperature);
    const float a = (float)(-((double)up.dlogprob + (double)up.dentropy * (double)up.entropy) / row.temperature);
    const float b = (float)(-(double)up.dentropy * LN_2 / row.temperature);
    const float at_label = (float)((double)up.dlogprob / row.temperature);
    for (int64_t at = 0; at < row.vocab; at += BLOCK) {
        const int n = row.vocab - at < BLOCK ? (int)(row.vocab - at) : BLOCK;
        const float *x = logit_block(row, at, n, buffer, slope);
        const bool direct = row.dtype == PPOMAX_FP32 && n % WIDTH == 0;
        float *target = direct ? (float *)out + at : gradient;
        for (int i = 0; i < n; i += WIDTH) {
            const Vec t = larger(all(-150.0f), ((load(x + i) - shift_high) - shift_low) * c);
            const Vec p = exp2_of(larger(all(NO_LESS), t));
            const Vec d = p * (a + b * t);
            store(target + i, t < NO_LESS ? Vec{} : d);
        }
        if (up.label >= at && up.label < at + n) target[up.label - at] += at_label;
        if (row.softcap > 0.0)
            for (int i = 0; i < n; ++i) target[i] *= slope[i];
        if (!direct) put_floats(gradient, n, out, row.dtype, at);
    }
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
