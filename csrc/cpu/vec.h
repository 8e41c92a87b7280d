// A register of floats, as wide as the instruction set that this file is compiled for has. GCC and Clang vector
// extensions, so the same lines serve SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include "../formulas/portable.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace ppomax {
namespace PPOMAX_NS {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t IntVec __attribute__((vector_size(4 * WIDTH)));

PPOMAX_INLINE Vec load(const float *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
PPOMAX_INLINE void store(float *p, Vec v) { memcpy(p, &v, sizeof v); }
PPOMAX_INLINE Vec all(float x) { return x - Vec{}; }
PPOMAX_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b if either is NaN

// Sum of `n` floats, in an order that depends on n alone: in fp32 lane by lane over 256 elements (16 additions a lane
// on AVX-512), in fp64 above.
static inline double sum_of(const float *x, int n) {
    double total = 0.0;
    int i = 0;
    while (i + WIDTH <= n) {
        Vec a = {}, b = {};
        const int end = n - i < 256 ? n : i + 256;
        for (; i + 2 * WIDTH <= end; i += 2 * WIDTH) {
            a += load(x + i);
            b += load(x + i + WIDTH);
        }
        if (i + WIDTH <= end) {
            a += load(x + i);
            i += WIDTH;
        }
        a += b;
        for (int half = WIDTH / 2; half > 0; half /= 2)
            for (int k = 0; k < half; ++k) a[k] += a[k + half];
        total += (double)a[0];
    }
    for (; i < n; ++i) total += (double)x[i];
    return total;
}

// 2^t for t >= -126 (below: garbage; clamp first); NaN stays NaN. Minimax of degree 5 on [-1/2, 1/2], exact at 0: 9e-8,
// about 1 ulp.
PPOMAX_INLINE Vec exp2_of(Vec t) {
#if defined(__AVX512F__)
    const Vec n = (Vec)_mm512_roundscale_ps((__m512)t, 0);
#else
    const Vec shifted = t + 12582912.0f;  // 1.5 * 2^23
    const Vec n = shifted - 12582912.0f;
#endif
    const Vec f = t - n;
    Vec p = all(1.32647273e-3f);
    p = p * f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const IntVec power = ((IntVec)shifted << 23) + 0x3f800000;
    return p * (Vec)power;
#endif
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
