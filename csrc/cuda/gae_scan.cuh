// A run of steps of one sequence as a map from what comes after it to what stands before it, so that runs can be joined
// in parallel. A kept step takes (A, V) of the step after it to (r + gamma*V - v + gamma*lam*A, v); a masked step
// leaves (A, V) as they are. Hence a run with any kept step is A' = a*A + b*V + c, V' = v, and a run without one is the
// identity. a = (gamma*lam)^steps is kept in double: joining equal runs squares it, and would double its relative error
// at each level in float.
#pragma once

#include "../formulas/gae_row.h"
#include "device.cuh"

namespace ppomax {

struct GaeRun {
    double a;
    float b, c, v;
    int kept;  // 0: the identity; c and v are then 0
};

__device__ __forceinline__ GaeRun no_steps() { return {1.0, 0.0f, 0.0f, 0.0f, 0}; }

// `first` stands before `then` in time, so it is applied last.
__device__ __forceinline__ GaeRun joined(const GaeRun &first, const GaeRun &then) {
    if (!first.kept) return then;
    if (!then.kept) return first;
    const float a = static_cast<float>(first.a);
    return {first.a * then.a, a * then.b, fmaf(a, then.c, fmaf(first.b, then.v, first.c)), first.v, 1};
}

struct GaeState {
    float advantage, value;
};

__device__ __forceinline__ GaeState before(const GaeRun &run, const GaeState &after) {
    if (!run.kept) return after;
    return {fmaf(static_cast<float>(run.a), after.advantage, fmaf(run.b, after.value, run.c)), run.v};
}

__device__ __forceinline__ GaeRun from_lane_above(const GaeRun &run, int step) {
    return {__shfl_down_sync(ALL_LANES, run.a, step), __shfl_down_sync(ALL_LANES, run.b, step),
            __shfl_down_sync(ALL_LANES, run.c, step), __shfl_down_sync(ALL_LANES, run.v, step),
            __shfl_down_sync(ALL_LANES, run.kept, step)};
}

}  // namespace ppomax
