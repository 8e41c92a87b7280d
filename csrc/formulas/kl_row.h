// KL estimates of one token, from u = logprob - ref_logprob. Source: J. Schulman, "Approximating KL divergence" (2020).
#pragma once

#include "../ppomax_kernels.h"
#include "portable.h"

namespace ppomax {
namespace PPOMAX_NS {

template <int ESTIMATOR>
PPOMAX_INLINE float kl_value(float u) {
    if (ESTIMATOR == PPOMAX_K1) return u;
    if (ESTIMATOR == PPOMAX_K2) return 0.5f * u * u;
    if (ESTIMATOR == PPOMAX_KABS) return u < 0.0f ? -u : u;
    u = clamp(u, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT);
    return expm1_of(-u) + u;
}

// d kl / d logprob; k3's clamp passes no gradient outside, and lets it through at the border.
template <int ESTIMATOR>
PPOMAX_INLINE float kl_slope(float u) {
    if (ESTIMATOR == PPOMAX_K1) return 1.0f;
    if (ESTIMATOR == PPOMAX_K2) return u;
    if (ESTIMATOR == PPOMAX_KABS) return u > 0.0f ? 1.0f : (u < 0.0f ? -1.0f : u);  // 0 at 0, NaN at NaN
    const float inner = clamp(u, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT);
    const float slope = -expm1_of(-inner);
    return u < -LOG_RATIO_LIMIT || u > LOG_RATIO_LIMIT ? 0.0f : slope;
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
