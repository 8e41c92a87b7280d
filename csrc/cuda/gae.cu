// GAE as a parallel scan: one block a sequence, tiles of ITEMS steps a thread walked from the sequence's end. Each
// thread folds its steps into one map (gae_scan.cuh), the maps of a warp are joined by shuffles, those of the warps are
// applied one after another to the state that comes from the right, and each thread then walks its own steps again from
// the state that is really after them. Reads r, V once, writes A, R once: 16 B a token in fp32; with some 10^4 tokens
// the time is launch and latency, one launch whatever T. Bits do not depend on the block's size (the state passes warp
// by warp from the end in any case), so the launcher may pick it from N and S; nor on where the sequence lies, nor on
// masked steps after its last kept one, so packed and right-padded rows agree to the bit. Left out on purpose:
// splitting one sequence over blocks, and whitening.
#include "../ppomax_kernels.h"
#include "gae_scan.cuh"

namespace ppomax {
namespace {

constexpr int ITEMS = 8;
constexpr int MOST_THREADS = 1024;

struct Floats {  // small inputs of any dtype: the branch on the dtype is the same for a whole launch
    const void *data;
    int dtype;
    int64_t stride;

    __device__ __forceinline__ float at(int64_t i) const {
        if (dtype == PPOMAX_FP32) return static_cast<const float *>(data)[i];
        if (dtype == PPOMAX_BF16) return to_float(static_cast<const __nv_bfloat16 *>(data)[i]);
        return to_float(static_cast<const __half *>(data)[i]);
    }
};

struct Gae {
    Floats rewards, values, lams, bootstrap;  // lams, bootstrap: data may be NULL
    const uint8_t *mask;
    int64_t mask_stride;
    const int32_t *cu_seqlens;  // NULL: padded rows of `tokens` steps
    int64_t tokens;
    double gamma, lam;
    float *advantages, *returns;
};

struct Span {  // one sequence: its steps [start, end), and where step 0 lies in each array
    int64_t start, end, rewards, values, mask, out;
};

__device__ __forceinline__ int64_t within(int64_t x, int64_t most) { return x < 0 ? 0 : x > most ? most : x; }

__device__ __forceinline__ Span span_of(const Gae &g, int64_t s) {
    if (g.cu_seqlens)  // wrong values never lead outside the arrays
        return {within(g.cu_seqlens[s], g.tokens), within(g.cu_seqlens[s + 1], g.tokens), 0, 0, 0, 0};
    return {0, g.tokens, s * g.rewards.stride, s * g.values.stride, s * g.mask_stride, s * g.tokens};
}

struct Steps {  // the consecutive steps of one thread
    float r[ITEMS], v[ITEMS];
    unsigned kept;  // bit j: step j counts

    __device__ __forceinline__ void load(const Gae &g, const Span &at, int64_t first) {
        kept = 0;
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            const int64_t t = first + j;
            if (t >= at.start && (!g.mask || g.mask[at.mask + t])) {
                kept |= 1u << j;
                r[j] = g.rewards.at(at.rewards + t);
                v[j] = g.values.at(at.values + t);
            }
        }
    }
};

// All steps of the thread, from the last to the first.
template <typename Visit>
__device__ __forceinline__ void walk(const Steps &steps, float gamma, float decay, GaeState &state, Visit visit) {
#pragma unroll
    for (int j = ITEMS - 1; j >= 0; --j) {
        const bool kept = steps.kept >> j & 1u;
        if (kept) {
            const float delta = portable::gae_delta(steps.r[j], steps.v[j], state.value, gamma);
            state.advantage = portable::gae_advantage(delta, decay, state.advantage);
            state.value = steps.v[j];
        }
        visit(j, kept);
    }
}

__device__ __forceinline__ GaeRun run_of(const Steps &steps, float gamma, double decay) {
    GaeState state = {0.0f, 0.0f};
    double a = 1.0;
    float b = 0.0f;
    int any = 0;
    walk(steps, gamma, static_cast<float>(decay), state, [&](int, bool kept) {
        if (!kept) return;
        b = any ? b * static_cast<float>(decay) : gamma;
        a *= decay;
        any = 1;
    });
    return {a, b, state.advantage, state.value, any};
}

// The end of the sequence without the masked steps that close it, the same in all threads: where tiles are counted
// from.
__device__ __forceinline__ int64_t kept_end(const Gae &g, const Span &at, int64_t tile) {
    __shared__ int of_warp[2][MOST_THREADS / WARP];
    if (!g.mask) return at.end;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int turn = 0;
    for (int64_t right = at.end; right > at.start; right -= tile, turn ^= 1) {
        int kept = 0;  // one past the last kept step, counted from the tile's begin
        for (int i = threadIdx.x * ITEMS; i < static_cast<int>(threadIdx.x + 1) * ITEMS; ++i) {
            const int64_t t = right - tile + i;
            if (t >= at.start && g.mask[at.mask + t]) kept = i + 1;
        }
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) {
            const int other = __shfl_down_sync(ALL_LANES, kept, step);
            kept = other > kept ? other : kept;
        }
        if (lane == 0) of_warp[turn][warp] = kept;
        __syncthreads();
        for (int w = 0; w < warps; ++w) kept = of_warp[turn][w] > kept ? of_warp[turn][w] : kept;
        if (kept) return right - tile + kept;
    }
    return at.start;
}

__global__ void __launch_bounds__(MOST_THREADS) gae_kernel(Gae g) {
    __shared__ GaeRun of_warp[2][MOST_THREADS / WARP];  // two, so that one barrier a tile is enough
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int64_t s = blockIdx.x;
    const Span at = span_of(g, s);
    const float gamma = static_cast<float>(g.gamma);
    const double decay = g.gamma * (g.lams.data ? g.lams.at(s) : g.lam);
    GaeState carry = {0.0f, g.bootstrap.data ? g.bootstrap.at(s) : 0.0f};
    const int64_t tile = static_cast<int64_t>(blockDim.x) * ITEMS;
    const int64_t end = kept_end(g, at, tile);
    for (int64_t t = end + threadIdx.x; t < at.end; t += blockDim.x)
        g.advantages[at.out + t] = g.returns[at.out + t] = 0.0f;
    int turn = 0;
    for (int64_t right = end; right > at.start; right -= tile, turn ^= 1) {
        const int64_t first = right - tile + static_cast<int64_t>(threadIdx.x) * ITEMS;
        Steps steps;
        steps.load(g, at, first);
        GaeRun run = run_of(steps, gamma, decay);
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const GaeRun then = from_lane_above(run, step);
            if (lane + step < WARP) run = joined(run, then);
        }
        GaeRun above = from_lane_above(run, 1);
        if (lane == WARP - 1) above = no_steps();
        if (lane == 0) of_warp[turn][warp] = run;
        __syncthreads();
        GaeState state = carry;
        for (int w = warps - 1; w >= 0; --w) {
            if (w == warp) state = before(above, carry);
            carry = before(of_warp[turn][w], carry);
        }
        walk(steps, gamma, static_cast<float>(decay), state, [&](int j, bool kept) {
            const int64_t t = first + j;
            if (t < at.start) return;
            g.advantages[at.out + t] = kept ? state.advantage : 0.0f;
            g.returns[at.out + t] = kept ? state.advantage + state.value : 0.0f;
        });
    }
}

bool is_float(int dtype) { return dtype == PPOMAX_FP32 || dtype == PPOMAX_BF16 || dtype == PPOMAX_FP16; }

// As many threads as the sequences' mean length keeps busy.
int threads_for(int64_t tokens, int64_t sequences, bool packed) {
    const int64_t mean = packed ? tokens / sequences : tokens;
    int threads = 64;
    while (threads < MOST_THREADS && static_cast<int64_t>(threads) * ITEMS < mean) threads *= 2;
    return threads;
}

}  // namespace
}  // namespace ppomax

using namespace ppomax;

extern "C" int ppomax_gae_cuda(const void *rewards, int rewards_dtype, int64_t rewards_stride, const void *values,
                               int values_dtype, int64_t values_stride, const uint8_t *mask, int64_t mask_stride,
                               const int32_t *cu_seqlens, int64_t sequences, int64_t tokens, double gamma, double lam,
                               const void *lams, int lams_dtype, const void *bootstrap, int bootstrap_dtype,
                               float *advantages, float *returns, void *stream) {
    if (sequences < 0 || tokens < 0 || sequences > MOST_BLOCKS) return PPOMAX_BAD_SIZE;
    if (!is_float(rewards_dtype) || !is_float(values_dtype) || (lams && !is_float(lams_dtype)) ||
        (bootstrap && !is_float(bootstrap_dtype)))
        return PPOMAX_BAD_DTYPE;
    if (!(gamma >= 0.0 && gamma <= 1.0) || !(lams || (lam >= 0.0 && lam <= 1.0))) return PPOMAX_BAD_SCALAR;
    if (sequences == 0 || tokens == 0) return PPOMAX_OK;
    if (!rewards || !values || !advantages || !returns) return PPOMAX_BAD_POINTER;
    const Gae g = {{rewards, rewards_dtype, rewards_stride},
                   {values, values_dtype, values_stride},
                   {lams, lams_dtype, 1},
                   {bootstrap, bootstrap_dtype, 1},
                   mask,
                   mask_stride,
                   cu_seqlens,
                   tokens,
                   gamma,
                   lam,
                   advantages,
                   returns};
    PPOMAX_LAUNCH(gae_kernel, sequences, threads_for(tokens, sequences, cu_seqlens != nullptr), stream, g);
    return launched();
}
