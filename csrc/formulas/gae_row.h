// One step of generalised advantage estimation, walked from a sequence's end.
#pragma once

#include "portable.h"

namespace ppomax {
namespace PPOMAX_NS {

// Real is float or double.
// delta_t = r_t + gamma * V_{t+1} - V_t
template <class Real>
PPOMAX_INLINE Real gae_delta(Real reward, Real value, Real next_value, Real gamma) {
    return reward + gamma * next_value - value;
}

// A_t = delta_t + step * A_{t+1}, step = gamma * lam
template <class Real>
PPOMAX_INLINE Real gae_advantage(Real delta, Real step, Real next_advantage) {
    return delta + step * next_advantage;
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
