// Drawing one token from a row of logits without sorting it.
// top-k: the k-th largest of the maxima of groups of 32 bounds the k-th largest logit from below, so few logits are
// looked at twice; the threshold among those is found by descending through the digits of the floats' bits, counting.
// top-p: the same descent, adding up masses.
#pragma once

#include "logprob_loops.h"

namespace ppomax {
namespace PPOMAX_NS {

constexpr int GROUP = 32;

// Bits in the order of the floats: a < b as floats <=> a < b as keys.
PPOMAX_INLINE uint32_t ordered(float x) {
    const uint32_t bits = to_bits(x);
    return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}
PPOMAX_INLINE float unordered(uint32_t key) { return from_bits(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu)); }

// The largest v in `values` with: sum of the weights (1 if NULL) of values >= v reaches `target`. The least value if
// none does.
static float threshold_of(const float *values, const float *weights, int64_t n, double target) {
    constexpr int SHIFTS[3] = {21, 10, 0}, WIDTHS[3] = {11, 11, 10};
    double mass[2048], above = 0.0;
    bool present[2048];
    uint32_t prefix = 0;
    for (int level = 0; level < 3; ++level) {
        const int shift = SHIFTS[level], buckets = 1 << WIDTHS[level];
        for (int b = 0; b < buckets; ++b) {
            mass[b] = 0.0;
            present[b] = false;
        }
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t key = ordered(values[i]);
            if (level && (key >> (shift + WIDTHS[level])) != prefix) continue;
            const uint32_t b = (key >> shift) & (uint32_t)(buckets - 1);
            mass[b] += weights ? (double)weights[i] : 1.0;
            present[b] = true;
        }
        int chosen = 0;
        for (int b = buckets - 1; b >= 0; --b) {
            if (!present[b]) continue;
            chosen = b;
            if (above + mass[b] >= target) break;
            above += mass[b];
        }
        prefix = (prefix << WIDTHS[level]) | (uint32_t)chosen;
    }
    return unordered(prefix);
}

// out = e^((x - max) / temperature), exactly 0 below 2^-126.
static inline void weights_of(const float *x, int64_t n, float max, float c, float *out) {
    for (int64_t i = 0; i < n; i += WIDTH) {
        float tail[WIDTH];
        const int64_t left = n - i;
        Vec v;
        if (left >= WIDTH) {
            v = load(x + i);
        } else {
            for (int64_t k = 0; k < WIDTH; ++k) tail[k] = k < left ? x[i + k] : -INFINITY;
            v = load(tail);
        }
        const Vec t = larger(all(-150.0f), (v - max) * c);
        const Vec e = exp2_of(larger(all(NO_LESS), t));
        const Vec w = t < NO_LESS ? Vec{} : e;
        if (left >= WIDTH) {
            store(out + i, w);
        } else {
            store(tail, w);
            for (int64_t k = 0; k < left; ++k) out[i + k] = tail[k];
        }
    }
}

// Values and places of the logits >= the k-th largest (k = 0: of all) that are above -inf, in index order.
static int64_t candidates_of(const float *x, int64_t vocab, int64_t top_k, float *maxima, float *values,
                             int32_t *places) {
    const bool cut = top_k > 0 && top_k < vocab;
    const int64_t groups = (vocab + GROUP - 1) / GROUP;
    float bound = LOWEST;
    if (cut && top_k < groups) {
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t end = (g + 1) * GROUP < vocab ? (g + 1) * GROUP : vocab;
            float max = x[g * GROUP];
            for (int64_t i = g * GROUP; i < end; ++i) max = x[i] > max ? x[i] : max;
            maxima[g] = max;
        }
        bound = threshold_of(maxima, nullptr, groups, (double)top_k);
    }
    const bool pruned = bound > LOWEST;
    int64_t m = 0;
    for (int64_t g = 0; g < groups; ++g) {
        if (pruned && maxima[g] < bound) continue;
        const int64_t end = (g + 1) * GROUP < vocab ? (g + 1) * GROUP : vocab;
        for (int64_t i = g * GROUP; i < end; ++i) {
            values[m] = x[i];
            places[m] = (int32_t)i;
            m += x[i] >= bound;  // LOWEST keeps all but -inf
        }
    }
    if (!cut || m <= top_k) return m;
    const float least = threshold_of(values, nullptr, m, (double)top_k);
    int64_t kept = 0;
    for (int64_t i = 0; i < m; ++i) {
        values[kept] = values[i];
        places[kept] = places[i];
        kept += values[i] >= least;
    }
    return kept;
}

// Keeps the candidates of weight >= `least` and value >= `floor`, in order; returns how many.
static int64_t keep(float *values, float *weights, int32_t *places, int64_t m, float floor, float least) {
    int64_t kept = 0;
    for (int64_t i = 0; i < m; ++i) {
        const float value = values[i], weight = weights[i];
        values[kept] = value;
        weights[kept] = weight;
        places[kept] = places[i];
        kept += (value >= floor) & (weight >= least);
    }
    return kept;
}

// Keeps the most probable candidates whose mass reaches top_p. Weights below (1 - top_p) * total / m add up to less
// than what is cut, so they are dropped at once; the search looks at the rest.
static int64_t nucleus_of(float *values, float *weights, int32_t *places, int64_t m, double top_p, double total) {
    const double least = 0.999 * (1.0 - top_p) * total / (double)m;
    m = keep(values, weights, places, m, LOWEST, (float)least);
    return keep(values, weights, places, m, threshold_of(values, weights, m, top_p * total), 0.0f);
}

static double sum_of_weights(const float *weights, int64_t n) {
    double total = 0.0;
    for (int64_t at = 0; at < n; at += BLOCK) total += sum_of(weights + at, n - at < BLOCK ? (int)(n - at) : BLOCK);
    return total;
}

// First place whose cumulative weight exceeds `target`; the last place of positive weight if rounding leaves none.
// Whole blocks are skipped by their sums.
static int64_t place_of(const float *weights, int64_t n, double target) {
    double before = 0.0;
    int64_t last = 0;
    for (int64_t at = 0; at < n; at += BLOCK) {
        const int64_t count = n - at < BLOCK ? n - at : BLOCK;
        const double sum = sum_of(weights + at, (int)count);
        if (sum > 0.0) {
            double cumulative = before;
            if (before + sum > target || at + count >= n) {
                for (int64_t i = at; i < at + count; ++i) {
                    if (!(weights[i] > 0.0f)) continue;
                    last = i;
                    cumulative += (double)weights[i];
                    if (cumulative > target) return i;
                }
                if (before + sum > target) return last;
            }
            for (int64_t i = at + count - 1; i >= at; --i)
                if (weights[i] > 0.0f) {
                    last = i;
                    break;
                }
        }
        before += sum;
    }
    return last;
}

static void sample(const SampleRow &row, SampleResult *out) {
    const int64_t stride = row.vocab + SAMPLE_PAD;
    float *buffer = row.scratch, *values = buffer + stride, *weights = buffer + 2 * stride;
    int32_t *places = (int32_t *)(buffer + 3 * stride);
    const LogitRow plain = {row.logits, row.dtype, row.vocab, 1.0, 0.0};
    const RowStats stats = row_stats(plain);
    if (is_dead(stats) || !(stats.sum < INFINITY)) {
        *out = {-1, NAN, NAN, NAN};
        return;
    }
    const float *x = (const float *)row.logits;
    if (row.dtype != PPOMAX_FP32) {
        const TypedArray array = {row.logits, row.dtype};
        for (int64_t at = 0; at < row.vocab; at += BLOCK)
            as_floats(array, at, row.vocab - at < BLOCK ? (int)(row.vocab - at) : BLOCK, buffer + at);
        x = buffer;
    }
    int64_t token = 0;
    double logprob = 0.0;
    if (row.temperature == 0.0) {
        while (x[token] != stats.max) ++token;
    } else {
        const float c = log2_scale(row.temperature);
        double total;
        if (row.top_p >= 1.0 && (row.top_k <= 0 || row.top_k >= row.vocab)) {
            weights_of(x, row.vocab, stats.max, c, weights);
            total = sum_of_weights(weights, row.vocab);
            token = place_of(weights, row.vocab, row.uniform * total);
        } else {
            int64_t m =
                candidates_of(x, row.vocab, row.top_k, weights, values, places);  // weights hold the maxima for now
            weights_of(values, m, stats.max, c, weights);
            total = sum_of_weights(weights, m);
            if (row.top_p < 1.0) {
                m = nucleus_of(values, weights, places, m, row.top_p, total);
                total = sum_of_weights(weights, m);
            }
            token = places[place_of(weights, m, row.uniform * total)];
        }
        logprob = ((double)x[token] - (double)stats.max) / row.temperature - log(total);
    }
    const RowResult result = finish_row(stats, x[token], 1.0);
    *out = {token, (float)logprob, result.logprob, result.entropy};
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
