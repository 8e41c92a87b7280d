// One row of logits, summarised in one pass and finished here.
// With c = log2(e)/temperature and t_j = (x_j - max) * c: sum = sum_j 2^t_j, weighted = sum_j 2^t_j * t_j. Differences
// are taken before the temperature, so that a common shift of the logits costs no digits.
#pragma once

#include <math.h>

#include "portable.h"

namespace ppomax {
namespace PPOMAX_NS {

constexpr double LN_2 = 0.693147180559945309;
constexpr double LOG2_E = 1.44269504088896341;
constexpr float LOWEST = -3.402823466e+38f;  // where a running max starts: -inf would make NaN of -inf - -inf

struct RowStats {
    float max, sum, weighted;
};

struct RowResult {
    float logprob, entropy, lse;
};

// A row of nothing but -inf: each term is 2^-126 at most, whereas a true maximum contributes 1.
PPOMAX_INLINE bool is_dead(const RowStats &stats) { return stats.max == LOWEST && stats.sum < 0.5f; }

// `picked` is the label's logit (after the softcap).
PPOMAX_INLINE RowResult finish_row(const RowStats &stats, float picked, double temperature) {
    RowResult result;
    if (is_dead(stats)) {
        result.logprob = -INFINITY;
        result.entropy = 0.0f;
        result.lse = -INFINITY;
        return result;
    }
    const double log_sum = log((double)stats.sum);
    result.logprob = (float)(((double)picked - (double)stats.max) / temperature - log_sum);
    const double entropy = log_sum - LN_2 * (double)stats.weighted / (double)stats.sum;
    result.entropy = (float)(entropy < 0.0 ? 0.0 : entropy);  // NaN stays NaN
    result.lse = (float)((double)stats.max / temperature + log_sum);
    return result;
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
