// Log-probability of each label and entropy of each row, from logits; and the gradient. One block a row, tokens on
// grid-x. Forward: z = scale * x (x = softcap * tanh(logit / softcap) if capped), one pass of online max, sum and
// weighted sum, exp2 with the scale folded in; reads N*V once, writes 12 B a row. Backward: from the saved lse and
// entropy, elementwise; reads N*V once, writes N*V once. Both are bound by memory: 16-byte loads, four in flight a
// thread. A row's bits depend on its values alone, not on N or on its place. Left out on purpose: splitting a row over
// blocks (fewer rows than multiprocessors leave some idle), and the fused linear head.
#include "../ppomax_kernels.h"
#include "softmax_state.cuh"

namespace ppomax {
namespace {

constexpr int MOST_THREADS = 256;
constexpr int BLOCKS_PER_SM = 3;  // leaves 80 registers a thread: enough for the vectors in flight without spills
constexpr int IN_FLIGHT = 4;

int threads_for(int64_t V) { return V >= 2048 ? MOST_THREADS : 64; }

struct Row {  // what both passes need to find and read a row
    const void *logits;
    const int64_t *labels;
    Rows rows, label_rows;
    int64_t V, ignore_index;
    double temperature;
    float scale, cap;  // 1 / temperature; softcap, 0 if none
};

template <bool CAPPED>
__device__ __forceinline__ float capped(float x, float cap) {
    return CAPPED ? cap * tanhf(x / cap) : x;
}

template <typename T, bool CAPPED>
__device__ __forceinline__ void add_vector(RowStats &s, const Vector<T> &v, const Row &a, float c) {
    float x[Vector<T>::N];
#pragma unroll
    for (int j = 0; j < Vector<T>::N; ++j) x[j] = capped<CAPPED>(v[j], a.cap);
    add(s, x, c);
}

// This thread's share of the row. Which columns those are is fixed by V alone, whatever the row's address: a row's bits
// would else depend on its place among the others.
template <typename T, bool CAPPED, bool ALIGNED>
__device__ __forceinline__ RowStats gathered(const T *row, const Row &a, float c) {
    constexpr int N = Vector<T>::N;
    const int64_t vectors = a.V / N, threads = blockDim.x;
    RowStats s = no_logits();
    int64_t k = threadIdx.x;
    for (; k + (IN_FLIGHT - 1) * threads < vectors; k += IN_FLIGHT * threads) {
        Vector<T> v[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) v[i] = load_vector<ALIGNED>(row, a.V, (k + i * threads) * N);
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) add_vector<T, CAPPED>(s, v[i], a, c);
    }
    for (; k < vectors; k += threads) add_vector<T, CAPPED>(s, load_vector<ALIGNED>(row, a.V, k * N), a, c);
    const int64_t last = vectors * N + threadIdx.x;  // fewer than N columns are left
    if (last < a.V) {
        const float x[1] = {capped<CAPPED>(to_float(row[last]), a.cap)};
        add(s, x, c);
    }
    return s;
}

template <typename T, bool CAPPED>
__global__ void __launch_bounds__(MOST_THREADS, BLOCKS_PER_SM)
    token_logprobs_kernel(Row a, float *logprobs, float *entropy, float *lse) {
    const int64_t r = blockIdx.x;
    const T *row = static_cast<const T *>(a.logits) + a.rows.at(r);
    const int64_t label = a.labels[a.label_rows.at(r)];
    const bool here = label >= 0 && label < a.V;  // else it lies in another shard of the vocabulary, or nowhere
    if (label == a.ignore_index || (!here && label != PPOMAX_FOREIGN_LABEL)) {
        if (threadIdx.x == 0) {
            const float fill = label == a.ignore_index ? 0.0f : NAN;
            logprobs[r] = lse[r] = fill;
            if (entropy) entropy[r] = fill;
        }
        return;
    }
    const float c = a.scale * static_cast<float>(portable::LOG2_E);
    RowStats s = past_16_bytes(row) == 0 ? gathered<T, CAPPED, true>(row, a, c) : gathered<T, CAPPED, false>(row, a, c);
    s = merged_over_block(s, c);
    if (threadIdx.x != 0) return;
    const float picked = here ? capped<CAPPED>(to_float(row[label]), a.cap) : 0.0f;
    const portable::RowResult result = portable::finish_row(s, picked, a.temperature);
    logprobs[r] = here ? result.logprob : 0.0f;
    lse[r] = result.lse;
    if (entropy) entropy[r] = result.entropy;
}

struct Upstream {  // the gradients that come in, and what the forward saved
    const float *dlogprobs, *dentropy, *lse, *entropy;
    Rows dlogprob_rows, dentropy_rows;
};

struct RowGradient {
    float g, h, L, H, scale, cap;

    // d loss / d logit, from that logit; p * z is 0 where p is 0, so a logit of -inf gets 0.
    template <bool CAPPED>
    __device__ __forceinline__ float at(float logit, bool is_label) const {
        const float x = capped<CAPPED>(logit, cap);
        const float logp = fmaf(x, scale, -L);
        const float p = exp2_fast(logp * static_cast<float>(portable::LOG2_E));
        const float dz = (is_label ? g : 0.0f) - (p == 0.0f ? 0.0f : p * fmaf(h, logp + H, g));
        return dz * scale * (CAPPED ? 1.0f - (x / cap) * (x / cap) : 1.0f);
    }
};

template <typename T>
__device__ __forceinline__ void fill_row(T *out, int64_t V, float with) {
    for (int64_t i = threadIdx.x; i < V; i += blockDim.x) from_float(with, out[i]);
}

template <typename T, bool CAPPED>
__device__ __forceinline__ void write_one(const T *row, T *out, const RowGradient &gradient, int64_t label,
                                          int64_t col) {
    from_float(gradient.at<CAPPED>(to_float(row[col]), col == label), out[col]);
}

template <typename T, bool CAPPED>
__device__ __forceinline__ void write_vector(const Vector<T> &v, T *out, const RowGradient &gradient, int64_t label,
                                             int64_t col) {
    const int64_t here = label - col;
    float d[Vector<T>::N];
#pragma unroll
    for (int j = 0; j < Vector<T>::N; ++j) d[j] = gradient.at<CAPPED>(v[j], here == j);
    store_vector(out + col, d);
}

// `vectors` vectors of the row from column `head` on, where the output is 16-byte aligned.
template <typename T, bool CAPPED, bool ALIGNED>
__device__ __forceinline__ void write_vectors(const T *row, T *out, const RowGradient &gradient, int64_t label,
                                              int64_t V, int64_t head, int64_t vectors) {
    constexpr int N = Vector<T>::N;
    const int64_t threads = blockDim.x;
    int64_t k = threadIdx.x;
    for (; k + (IN_FLIGHT - 1) * threads < vectors; k += IN_FLIGHT * threads) {
        Vector<T> v[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) v[i] = load_vector<ALIGNED>(row, V, head + (k + i * threads) * N);
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i)
            write_vector<T, CAPPED>(v[i], out, gradient, label, head + (k + i * threads) * N);
    }
    for (; k < vectors; k += threads)
        write_vector<T, CAPPED>(load_vector<ALIGNED>(row, V, head + k * N), out, gradient, label, head + k * N);
}

// Elementwise, so columns are dealt out as the output's alignment likes it: single ones up to the first 16-byte
// boundary, vectors, single ones. The output may be the logits themselves: each element is read by the thread that
// writes it, before it does (rows are then aligned alike).
template <typename T, bool CAPPED>
__global__ void __launch_bounds__(MOST_THREADS, BLOCKS_PER_SM)
    token_logprobs_backward_kernel(Row a, Upstream up, void *dlogits) {
    constexpr int N = Vector<T>::N;
    const int64_t r = blockIdx.x;
    const T *row = static_cast<const T *>(a.logits) + a.rows.at(r);
    T *out = static_cast<T *>(dlogits) + r * a.V;
    int64_t label = a.labels[a.label_rows.at(r)];
    const float g = up.dlogprobs ? up.dlogprobs[up.dlogprob_rows.at(r)] : 0.0f;
    const float h = up.dentropy ? up.dentropy[up.dentropy_rows.at(r)] : 0.0f;
    const float L = up.lse[r];
    if (label == a.ignore_index || L == -INFINITY || (g == 0.0f && h == 0.0f)) return fill_row(out, a.V, 0.0f);
    if (label != PPOMAX_FOREIGN_LABEL && (label < 0 || label >= a.V)) return fill_row(out, a.V, NAN);
    if (label < 0) label = -1;  // in another shard: no column's, and small enough for differences
    const RowGradient gradient = {g, h, L, up.dentropy ? up.entropy[r] : 0.0f, a.scale, a.cap};

    const int64_t to_boundary = (16 - past_16_bytes(out)) % 16 / sizeof(T),
                  head = to_boundary < a.V ? to_boundary : a.V;
    const int64_t vectors = (a.V - head) / N, tail = head + vectors * N;
    for (int64_t i = threadIdx.x; i < head + a.V - tail; i += blockDim.x)
        write_one<T, CAPPED>(row, out, gradient, label, i < head ? i : tail + i - head);
    if (past_16_bytes(row + head) == 0)
        write_vectors<T, CAPPED, true>(row, out, gradient, label, a.V, head, vectors);
    else
        write_vectors<T, CAPPED, false>(row, out, gradient, label, a.V, head, vectors);
}

int check(const void *logits, int dtype, int64_t outer, int64_t inner, int64_t vocab, const int64_t *labels,
          double temperature, double softcap) {
    if (outer < 0 || inner < 0 || vocab < 1) return PPOMAX_BAD_SIZE;
    if (inner > 0 && outer > MOST_BLOCKS / inner) return PPOMAX_BAD_SIZE;
    if (dtype != PPOMAX_FP32 && dtype != PPOMAX_BF16 && dtype != PPOMAX_FP16) return PPOMAX_BAD_DTYPE;
    if (!(temperature > 0.0) || !(softcap >= 0.0)) return PPOMAX_BAD_SCALAR;
    if (outer * inner > 0 && (!logits || !labels)) return PPOMAX_BAD_POINTER;
    return PPOMAX_OK;
}

template <typename T>
int launch_forward(const Row &a, int64_t rows, float *logprobs, float *entropy, float *lse, void *stream) {
    const int threads = threads_for(a.V);
    if (a.cap > 0.0f) {
        PPOMAX_LAUNCH((token_logprobs_kernel<T, true>), rows, threads, stream, a, logprobs, entropy, lse);
    } else {
        PPOMAX_LAUNCH((token_logprobs_kernel<T, false>), rows, threads, stream, a, logprobs, entropy, lse);
    }
    return launched();
}

template <typename T>
int launch_backward(const Row &a, const Upstream &up, int64_t rows, void *dlogits, void *stream) {
    const int threads = threads_for(a.V);
    if (a.cap > 0.0f) {
        PPOMAX_LAUNCH((token_logprobs_backward_kernel<T, true>), rows, threads, stream, a, up, dlogits);
    } else {
        PPOMAX_LAUNCH((token_logprobs_backward_kernel<T, false>), rows, threads, stream, a, up, dlogits);
    }
    return launched();
}

}  // namespace
}  // namespace ppomax

using namespace ppomax;

extern "C" int ppomax_token_logprobs_cuda(const void *logits, int dtype, int64_t outer, int64_t inner, int64_t vocab,
                                          int64_t outer_stride, int64_t inner_stride, const int64_t *labels,
                                          int64_t labels_outer_stride, int64_t labels_inner_stride, double temperature,
                                          double softcap, int64_t ignore_index, float *logprobs, float *entropy,
                                          float *lse, void *stream) {
    if (const int bad = check(logits, dtype, outer, inner, vocab, labels, temperature, softcap)) return bad;
    const int64_t rows = outer * inner;
    if (rows == 0) return PPOMAX_OK;
    if (!logprobs || !lse) return PPOMAX_BAD_POINTER;
    const Row a = {logits,
                   labels,
                   {inner, outer_stride, inner_stride},
                   {inner, labels_outer_stride, labels_inner_stride},
                   vocab,
                   ignore_index,
                   temperature,
                   static_cast<float>(1.0 / temperature),
                   static_cast<float>(softcap)};
    if (dtype == PPOMAX_FP32) return launch_forward<float>(a, rows, logprobs, entropy, lse, stream);
    if (dtype == PPOMAX_BF16) return launch_forward<__nv_bfloat16>(a, rows, logprobs, entropy, lse, stream);
    return launch_forward<__half>(a, rows, logprobs, entropy, lse, stream);
}

extern "C" int ppomax_token_logprobs_backward_cuda(
    const float *dlogprobs, int64_t dlogprobs_outer_stride, int64_t dlogprobs_inner_stride, const float *dentropy,
    int64_t dentropy_outer_stride, int64_t dentropy_inner_stride, const void *logits, int dtype, int64_t outer,
    int64_t inner, int64_t vocab, int64_t outer_stride, int64_t inner_stride, const int64_t *labels,
    int64_t labels_outer_stride, int64_t labels_inner_stride, const float *lse, const float *entropy,
    double temperature, double softcap, int64_t ignore_index, void *dlogits, void *stream) {
    if (const int bad = check(logits, dtype, outer, inner, vocab, labels, temperature, softcap)) return bad;
    const int64_t rows = outer * inner;
    if (rows == 0) return PPOMAX_OK;
    if (!lse || !dlogits || (dentropy && !entropy)) return PPOMAX_BAD_POINTER;
    const Row a = {logits,
                   labels,
                   {inner, outer_stride, inner_stride},
                   {inner, labels_outer_stride, labels_inner_stride},
                   vocab,
                   ignore_index,
                   temperature,
                   static_cast<float>(1.0 / temperature),
                   static_cast<float>(softcap)};
    const Upstream up = {dlogprobs,
                         dentropy,
                         lse,
                         entropy,
                         {inner, dlogprobs_outer_stride, dlogprobs_inner_stride},
                         {inner, dentropy_outer_stride, dentropy_inner_stride}};
    if (dtype == PPOMAX_FP32) return launch_backward<float>(a, up, rows, dlogits, stream);
    if (dtype == PPOMAX_BF16) return launch_backward<__nv_bfloat16>(a, up, rows, dlogits, stream);
    return launch_backward<__half>(a, up, rows, dlogits, stream);
}
