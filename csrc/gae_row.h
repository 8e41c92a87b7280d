// One step of generalised advantage estimation, walked from a sequence's end.
#pragma once

#include "portable.h"

namespace ppomax {
namespace PPOMAX_NS {

// delta_t = r_t + gamma * V_{t+1} - V_t
PPOMAX_INLINE float gae_delta(float reward, float value, float next_value, float gamma) { return reward + gamma * next_value - value; }

// A_t = delta_t + step * A_{t+1}, step = gamma * lam
PPOMAX_INLINE float gae_advantage(float delta, float step, float next_advantage) { return delta + step * next_advantage; }

}  // namespace PPOMAX_NS
}  // namespace ppomax
