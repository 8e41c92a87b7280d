// Blocks of fp32 from fp32, bf16 or fp16 arrays, and back. fp32 is used where it lies; the others pass through a buffer
// that stays in L1.
#pragma once

#include "../formulas/portable.h"
#include "../ppomax_kernels.h"
#include "vector_ops.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace ppomax {
namespace PPOMAX_NS {

constexpr int BLOCK = 1024;  // elements of a block: 4 KB of fp32

PPOMAX_INLINE float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
PPOMAX_INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

PPOMAX_INLINE float from_bf16(uint16_t h) { return from_bits((uint32_t)h << 16); }

PPOMAX_INLINE uint16_t to_bf16(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

PPOMAX_INLINE float from_fp16(uint16_t h) {
    const uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    const float scaled =
        from_bits(magnitude) * 5.192296858534828e33f;  // 2^112 moves the exponent's bias, denormals included
    const uint32_t special = magnitude | 0x7f800000u;
    const uint32_t bits = (h & 0x7c00u) == 0x7c00u ? special : to_bits(scaled);
    return from_bits(bits | ((uint32_t)(h & 0x8000u) << 16));
}

PPOMAX_INLINE uint16_t to_fp16(float x) {
    const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Normal halves: rebias, round to nearest even. Small ones: adding 1/2 lets the FPU round at the right bit.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t tiny = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? tiny : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return (uint16_t)(half | sign);
}

// `n` elements from `at` on, as fp32: where they lie, or in `buffer`.
static inline const float *as_floats(const TypedArray &array, int64_t at, int n, float *buffer) {
    if (array.dtype == PPOMAX_FP32) return (const float *)array.data + at;
    const uint16_t *source = (const uint16_t *)array.data + at;
    if (array.dtype == PPOMAX_BF16) {
        for (int i = 0; i < n; ++i) buffer[i] = from_bf16(source[i]);
        return buffer;
    }
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(source + i))));
#endif
    for (; i < n; ++i) buffer[i] = from_fp16(source[i]);
    return buffer;
}

// The reverse, for 16-bit types: `n` floats to `target` from `at` on.
static inline void put_floats(const float *source, int n, void *target, int dtype, int64_t at) {
    if (dtype == PPOMAX_FP32) {
        memcpy((float *)target + at, source, (size_t)n * sizeof(float));
        return;
    }
    uint16_t *out = (uint16_t *)target + at;
    if (dtype == PPOMAX_BF16) {
        for (int i = 0; i < n; ++i) out[i] = to_bf16(source[i]);
        return;
    }
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; ++i) out[i] = to_fp16(source[i]);
}

// One element as fp32.
PPOMAX_INLINE float one_float(const TypedArray &array, int64_t at) {
    if (array.dtype == PPOMAX_FP32) return ((const float *)array.data)[at];
    const uint16_t h = ((const uint16_t *)array.data)[at];
    return array.dtype == PPOMAX_BF16 ? from_bf16(h) : from_fp16(h);
}

// Elements from `at` on that a block takes of a row of `width`.
static inline int block_from(int64_t at, int64_t width) { return width - at < BLOCK ? (int)(width - at) : BLOCK; }

}  // namespace PPOMAX_NS
}  // namespace ppomax
