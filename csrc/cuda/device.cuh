// What the CUDA kernels share: number types in and out of registers, 16-byte loads and stores at any alignment,
// launches. The tests compile the kernels for the host too (tests/kernels/cuda_on_host.h takes the place of the CUDA
// headers), so a kernel uses only what is named here and the usual thread indices, barriers and shuffles.
#pragma once

#include <math.h>
#include <stdint.h>

#ifndef PPOMAX_ON_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define PPOMAX_LAUNCH(kernel, blocks, threads, stream, ...) \
    kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace ppomax {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int64_t MOST_BLOCKS = 0x7fffffff;  // of grid-x; the other two axes end at 65535, so tokens are always on x
constexpr float FAR = -1e30f;                // stands in for -inf where it meets a factor of 0

// 2^x in one instruction, 2 ulp; below 2^-126 it gives 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef PPOMAX_ON_HOST
    return x < -126.0f ? 0.0f : exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void from_float(float x, float &y) { y = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16 &y) { y = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half &y) { y = __float2half_rn(x); }

// Rows on two levels without a copy: row r lies (r / inner) * outer_stride + (r % inner) * inner_stride elements after
// the first.
struct Rows {
    int64_t inner, outer_stride, inner_stride;
    __device__ int64_t at(int64_t r) const { return (r / inner) * outer_stride + (r % inner) * inner_stride; }
};

// As many elements as 16 bytes hold.
template <typename T>
struct Vector {
    static constexpr int N = 16 / sizeof(T);
    union Bits {
        uint4 quad;
        uint32_t word[4];
        T element[N];
        __device__ Bits() {}
    } bits;

    __device__ __forceinline__ float operator[](int j) const { return to_float(bits.element[j]); }
};

__device__ __forceinline__ void shift_words(uint32_t (&w)[8], unsigned bytes) {
    // Compile-time indices only: a run-time index would move the words to local memory.
    if (bytes & 8) {
#pragma unroll
        for (int j = 0; j < 6; ++j) w[j] = w[j + 2];
    }
    if (bytes & 4) {
#pragma unroll
        for (int j = 0; j < 7; ++j) w[j] = w[j + 1];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = __funnelshift_r(w[j], w[j + 1], 8 * (bytes & 3));
}

__device__ __forceinline__ unsigned past_16_bytes(const void *p) {
    return static_cast<unsigned>(reinterpret_cast<uintptr_t>(p)) & 15u;
}

// Columns [c, c + N) of a row of V; c + N <= V. ALIGNED: the caller knows that they begin at a multiple of 16 bytes. If
// not, the vector is read as a pair of aligned words, shifted together; near the row's ends, where such a pair would
// reach outside the row, element by element.
template <bool ALIGNED, typename T>
__device__ __forceinline__ Vector<T> load_vector(const T *row, int64_t V, int64_t c) {
    Vector<T> x;
    const T *from = row + c;
    if (ALIGNED) {
        x.bits.quad = __ldcs(reinterpret_cast<const uint4 *>(from));
        return x;
    }
    const unsigned ahead = past_16_bytes(from);
    if (c * static_cast<int64_t>(sizeof(T)) >= ahead && (V - c) * static_cast<int64_t>(sizeof(T)) + ahead >= 32) {
        const uint4 *pair = reinterpret_cast<const uint4 *>(reinterpret_cast<uintptr_t>(from) - ahead);
        const uint4 low = pair[0], high = pair[1];
        uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        shift_words(w, ahead);
        x.bits.quad = make_uint4(w[0], w[1], w[2], w[3]);
    } else {
#pragma unroll
        for (int j = 0; j < Vector<T>::N; ++j) x.bits.element[j] = from[j];
    }
    return x;
}

template <typename T>
__device__ __forceinline__ void store_vector(T *to, const float (&x)[Vector<T>::N]) {  // `to` is 16-byte aligned
    Vector<T> y;
#pragma unroll
    for (int j = 0; j < Vector<T>::N; ++j) from_float(x[j], y.bits.element[j]);
    __stcs(reinterpret_cast<uint4 *>(to), y.bits.quad);
}

// The launch's own error, kept for ppomax_cuda_error() (in error.cu).
int launched();

}  // namespace ppomax
