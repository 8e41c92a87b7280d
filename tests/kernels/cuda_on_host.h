// Runs the CUDA kernels of csrc/cuda on a CPU, one block at a time, for tests: takes the place of the CUDA headers
// (g++ -x c++ -include cuda_on_host.h). Each CUDA thread is a coroutine that runs up to a barrier or a shuffle and then
// lets the others run; a barrier that not all threads reach is reported. What this shows is the kernels' logic
// (indices, alignment, masks, carries, reductions), not their machine code: memory order, the approximate exp2 and
// speed are the GPU's own.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define PPOMAX_ON_HOST
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another
#define PPOMAX_LAUNCH(kernel, blocks, threads, stream, ...) \
    cuda_on_host::run(blocks, threads, [&] { kernel(__VA_ARGS__); })

namespace cuda_on_host {

struct Index {
    unsigned x;
};

struct Barrier {
    int arrived = 0, passed = 0;
};

struct Block {
    std::vector<ucontext_t> context;
    std::vector<std::vector<char>> stack;
    std::vector<char> done;
    std::vector<uint64_t> slot;  // what each thread holds out to a shuffle
    std::vector<Barrier> of_warp;
    Barrier of_block;
    ucontext_t scheduler;
    std::function<void()> body;
    int current = 0, live = 0;
    long events = 0;
};

inline Block block;
inline Index thread_index, block_index, block_size;

inline void enter() {
    block.body();
    block.done[block.current] = 1;
    --block.live;
    ++block.events;
}

inline void wait(Barrier &barrier, int expected) {
    ++block.events;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.passed;
        return;
    }
    const int before = barrier.passed;
    while (barrier.passed == before) swapcontext(&block.context[block.current], &block.scheduler);
}

inline void start_threads(int threads) {
    block.done.assign(threads, 0);
    block.slot.assign(threads, 0);
    block.of_warp.assign((threads + 31) / 32, Barrier());
    block.of_block = Barrier();
    block.live = threads;
    for (int t = 0; t < threads; ++t) {
        getcontext(&block.context[t]);
        block.context[t].uc_stack.ss_sp = block.stack[t].data();
        block.context[t].uc_stack.ss_size = block.stack[t].size();
        block.context[t].uc_link = &block.scheduler;
        makecontext(&block.context[t], enter, 0);
    }
}

inline void run(int64_t blocks, int threads, std::function<void()> body) {
    block.body = std::move(body);
    block.context.resize(threads);
    block.stack.assign(threads, std::vector<char>(1 << 16));
    block_size.x = threads;
    for (int64_t b = 0; b < blocks; ++b) {
        block_index.x = static_cast<unsigned>(b);
        start_threads(threads);
        while (block.live) {
            const long events = block.events;
            for (int t = 0; t < threads; ++t) {
                if (block.done[t]) continue;
                block.current = t;
                thread_index.x = t;
                swapcontext(&block.scheduler, &block.context[t]);
            }
            if (block.live && events == block.events) {
                fprintf(stderr, "cuda_on_host: a barrier or shuffle that not all threads of block %lld reach\n",
                        static_cast<long long>(b));
                abort();
            }
        }
    }
}

}  // namespace cuda_on_host

#define threadIdx cuda_on_host::thread_index
#define blockIdx cuda_on_host::block_index
#define blockDim cuda_on_host::block_size

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::block.of_block, cuda_on_host::block_size.x); }

template <typename T>
T __shfl_down_sync(unsigned, T x, int step) {
    static_assert(sizeof(T) <= 8, "one register or two");
    auto &block = cuda_on_host::block;
    const int me = block.current, lane = me % 32;
    auto &warp = block.of_warp[me / 32];
    memcpy(&block.slot[me], &x, sizeof(T));
    cuda_on_host::wait(warp, 32);
    memcpy(&x, &block.slot[lane + step < 32 ? me + step : me], sizeof(T));
    cuda_on_host::wait(warp, 32);
    return x;
}

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint4 __ldcs(const uint4 *from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) abort();  // a GPU would fault
    return *from;
}
inline void __stcs(uint4 *to, uint4 x) {
    if (reinterpret_cast<uintptr_t>(to) % 16) abort();
    *to = x;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, unsigned bits) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
    uint16_t bits;
};
inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    const float size = exponent == 0    ? ldexpf(static_cast<float>(mantissa), -24)
                       : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                        : ldexpf(static_cast<float>(1024 + mantissa), exponent - 25);
    return x.bits >> 15 ? -size : size;
}
inline __half __float2half_rn(float x) {
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    const float size = fabsf(x);
    if (x != x) return {0x7fff};
    if (size == 0.0f) return {sign};
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    int exponent;
    frexpf(size, &exponent);                                // size < 2^exponent
    const int unit = exponent < -13 ? -24 : exponent - 11;  // weight of the last bit
    const int steps = static_cast<int>(rintf(ldexpf(size, -unit)));
    return {static_cast<uint16_t>(sign | (((unit + 24) << 10) + steps))};
}

typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "no error"; }
