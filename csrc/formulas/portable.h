// What the shared formulas stand on, on host and device: the inline macro, and exp, expm1 and tanh without branches, so
// that a plain loop over them vectorises. Host code is compiled once per instruction set; each copy lives in a
// namespace of its own (PPOMAX_NS) and every function is forced inline, so that the linker can never hand AVX-512 code
// to a machine without it.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#include <math.h>
#define PPOMAX_INLINE __host__ __device__ __forceinline__
#else
#define PPOMAX_INLINE inline __attribute__((always_inline))
#endif

#ifndef PPOMAX_NS
#define PPOMAX_NS portable
#endif

namespace ppomax {
namespace PPOMAX_NS {

constexpr float LOG_RATIO_LIMIT =
    20.0f;  // log-ratios are clamped to +-20: e^20 is 4.9e8, and no gradient passes outside

PPOMAX_INLINE float clamp(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;  // NaN stays NaN
}

#if !defined(__CUDA_ARCH__)
// e^x = s * (1 + q) with s a power of two and |x - ln s| <= ln(2)/2. The rounding trick needs |x| well below 2^22:
// callers clamp.
PPOMAX_INLINE void exp_parts(float x, float *s, float *q) {
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low mantissa bits
    const float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f;  // ln 2 in two parts; the first has 9 bits, so n times it is exact
    r = r + n * 2.12194440e-4f;
    float p = 1.38144754e-3f;  // minimax for (e^r - 1 - r) / r^2 on |r| <= 0.347: 3e-9 of e^r
    p = p * r + 8.36877618e-3f;
    p = p * r + 4.16683927e-2f;
    p = p * r + 1.66665196e-1f;
    p = p * r + 4.99999940e-1f;
    *q = r + r * r * p;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + 0x3f800000u;
    memcpy(s, &bits, 4);
}
#endif

// e^x to about 1 ulp for x <= 88 (larger x are taken as 88); 0 below -87, so that no denormals are made.
PPOMAX_INLINE float exp_of(float x) {
#if defined(__CUDA_ARCH__)
    return expf(x);
#else
    float s, q;
    exp_parts(clamp(x, -87.0f, 88.0f), &s, &q);
    const float y = s * q + s;
    return x < -87.0f ? 0.0f : y;
#endif
}

// e^x - 1 without cancellation near 0, for x <= 87.
PPOMAX_INLINE float expm1_of(float x) {
#if defined(__CUDA_ARCH__)
    return expm1f(x);
#else
    float s, q;
    exp_parts(clamp(x, -87.0f, 87.0f), &s, &q);
    return s * q + (s - 1.0f);
#endif
}

// e^x and e^x - 1 from one evaluation, for |x| <= 87.
PPOMAX_INLINE void exp_pair(float x, float *exponential, float *minus_one) {
#if defined(__CUDA_ARCH__)
    *exponential = expf(x);
    *minus_one = expm1f(x);
#else
    float s, q;
    exp_parts(x, &s, &q);
    *exponential = s * q + s;
    *minus_one = s * q + (s - 1.0f);
#endif
}

// tanh x and its slope 1 - tanh^2 x. The slope of a saturated tanh is far below tanh's rounding: with e = e^(-2|x|) it
// is 4e / (1 + e)^2.
PPOMAX_INLINE void tanh_pair(float x, float *y, float *slope) {
    const float magnitude = x < 0.0f ? -x : x;
    float e, minus_one;
    exp_pair(clamp(-2.0f * magnitude, -87.0f, 0.0f), &e, &minus_one);
    const float tanh_magnitude = -minus_one / (minus_one + 2.0f);
    *y = x < 0.0f ? -tanh_magnitude : tanh_magnitude;
    *slope = 4.0f * e / ((1.0f + e) * (1.0f + e));
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
