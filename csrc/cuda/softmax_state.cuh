// Softmax statistics of one row (RowStats of formulas/logprob_row.h: max, sum, weighted) gathered by the threads of a
// block. Everything is measured from the maximum, so a common offset of all logits costs no digits. A logit of -inf
// adds nothing; NaN and +inf make sum NaN (fmaxf drops a NaN, so max is never NaN).
#pragma once

#include "../formulas/logprob_row.h"
#include "device.cuh"

namespace ppomax {

using portable::RowStats;

__device__ __forceinline__ RowStats no_logits() { return {portable::LOWEST, 0.0f, 0.0f}; }

// The same statistics measured from another maximum m >= s.max; c = log2(e) / temperature.
__device__ __forceinline__ RowStats rebased(RowStats s, float m, float c) {
    const float shift = fmaxf((s.max - m) * c, FAR);
    const float factor = exp2_fast(shift);
    return {m, s.sum * factor, fmaf(s.sum, shift, s.weighted) * factor};
}

__device__ __forceinline__ RowStats merged(RowStats a, RowStats b, float c) {
    const float m = fmaxf(a.max, b.max);
    a = rebased(a, m, c);
    b = rebased(b, m, c);
    return {m, a.sum + b.sum, a.weighted + b.weighted};
}

template <int N>
__device__ __forceinline__ void add(RowStats &s, const float (&x)[N], float c) {
    float m = s.max;
#pragma unroll
    for (int j = 0; j < N; ++j) m = fmaxf(m, x[j]);
    if (m > s.max) s = rebased(s, m, c);
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const float t = (x[j] - m) * c;
        const float e = exp2_fast(t);
        s.sum += e;
        s.weighted = fmaf(e, fmaxf(t, FAR), s.weighted);
    }
}

// Whole-block merge in a fixed order: down the lanes of each warp, then the warps one after another. The result is
// thread 0's.
__device__ __forceinline__ RowStats merged_over_block(RowStats s, float c) {
    __shared__ RowStats of_warp[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        const RowStats other = {__shfl_down_sync(ALL_LANES, s.max, step), __shfl_down_sync(ALL_LANES, s.sum, step),
                                __shfl_down_sync(ALL_LANES, s.weighted, step)};
        s = merged(s, other, c);
    }
    if (lane == 0) of_warp[warp] = s;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < static_cast<int>(blockDim.x) / WARP; ++w) s = merged(s, of_warp[w], c);
    }
    return s;
}

}  // namespace ppomax
