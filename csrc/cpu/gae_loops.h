// Generalised advantage estimation of one sequence, from its end, a block at a time.
// A_t = delta_t + step * A_{t+1} is a chain of dependent steps. Doubling breaks it: after adding step^k * x_{t+k} for k
// = 1, 2, 4, 8, x_t holds its own 16 steps, and A_t = x_t + step^16 * A_{t+16} goes sixteen at a time. Masked steps are
// squeezed out of the block first. In fp64: with lambda near 1 the advantages are long sums, and this costs half more
// than fp32, whose error grows with their length.
#pragma once

#include "../formulas/gae_row.h"
#include "convert.h"

namespace ppomax {
namespace PPOMAX_NS {

constexpr int REACH = 16;

// x[0..n) = delta on the way in, A on the way out; x[n] = A after the block, x[n+1 .. n+REACH) = 0.
static inline void scan_block(double *x, int n, double step) {
    double power = step;
    for (int k = 1; k < REACH; k *= 2) {
        for (int t = 0; t < n; ++t) x[t] = gae_advantage(x[t], power, x[t + k]);
        power *= power;
    }
    int t = n - REACH;
    for (; t >= 0; t -= REACH)
        for (int k = 0; k < REACH; ++k) x[t + k] = gae_advantage(x[t + k], power, x[t + k + REACH]);
    for (int k = 0; k < t + REACH; ++k) x[k] = gae_advantage(x[k], power, x[k + REACH]);
}

static void gae(const GaeSequence &s) {
    float rewards_buffer[BLOCK], values_buffer[BLOCK + 1], kept_rewards[BLOCK], kept_values[BLOCK + 1];
    double x[BLOCK + REACH], next_value = s.bootstrap, next_advantage = 0.0;
    for (int64_t end = s.steps; end > 0; end -= BLOCK) {
        const int n = end < BLOCK ? (int)end : BLOCK;
        const int64_t at = end - n;
        const float *rewards = as_floats(s.rewards, s.rewards_at + at, n, rewards_buffer);
        const float *values = as_floats(s.values, s.values_at + at, n, values_buffer);
        const uint8_t *mask = s.mask ? s.mask + s.mask_at + at : nullptr;
        int m = n;
        if (mask) {
            m = 0;
            for (int t = 0; t < n; ++t) {
                kept_rewards[m] = rewards[t];
                kept_values[m] = values[t];
                m += mask[t] != 0;
            }
            kept_values[m] = 0.0f;  // read and dropped where the block ends in masked steps
            rewards = kept_rewards;
            values = kept_values;
        }
        for (int t = 0; t + 1 < m; ++t) x[t] = gae_delta<double>(rewards[t], values[t], values[t + 1], s.gamma);
        if (m) x[m - 1] = gae_delta<double>(rewards[m - 1], values[m - 1], next_value, s.gamma);
        x[m] = next_advantage;
        for (int k = 1; k < REACH; ++k) x[m + k] = 0.0;
        scan_block(x, m, s.step);
        float *advantages = s.advantages + s.out_at + at, *returns = s.returns + s.out_at + at;
        if (mask) {
            for (int t = 0, from = 0; t < n; ++t) {
                advantages[t] = mask[t] ? (float)x[from] : 0.0f;
                returns[t] = mask[t] ? (float)(x[from] + (double)values[from]) : 0.0f;
                from += mask[t] != 0;
            }
        } else {
            for (int t = 0; t < n; ++t) {
                advantages[t] = (float)x[t];
                returns[t] = (float)(x[t] + (double)values[t]);
            }
        }
        if (m) {
            next_value = values[0];
            next_advantage = x[0];
        }
    }
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
