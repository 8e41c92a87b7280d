// Entry point of sample: checks, each row's uniform number, scratch memory, threads. One row is in sample_loops.h.
#include <atomic>
#include <memory>
#include <new>

#define PPOMAX_NS entry
#include "../formulas/philox.h"
#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

extern "C" int ppomax_sample_cpu(const void *logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                                 const int64_t *seeds, const int64_t *positions, double temperature, int64_t top_k,
                                 double top_p, int64_t *token, float *logprob, float *plain_logprob, float *entropy,
                                 int threads) {
    if (rows < 0 || vocab < 1 || vocab > INT32_MAX) return PPOMAX_BAD_SIZE;
    if (!known_dtype(dtype)) return PPOMAX_BAD_DTYPE;
    if (!(temperature >= 0.0) || !finite(temperature) || top_k < 0 || !(top_p > 0.0 && top_p <= 1.0))
        return PPOMAX_BAD_SCALAR;
    if (rows > 0 && (!logits || !seeds || !positions || !token || !logprob || !plain_logprob || !entropy))
        return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    std::atomic<int> outcome{PPOMAX_OK};
    auto body = [&](int64_t begin, int64_t end) {
        std::unique_ptr<float[]> scratch(new (std::nothrow) float[(size_t)(SAMPLE_SCRATCH * (vocab + SAMPLE_PAD))]);
        if (!scratch) {
            outcome.store(PPOMAX_NO_MEMORY);
            return;
        }
        for (int64_t b = begin; b < end; ++b) {
            const double uniform = entry::philox_uniform((uint64_t)seeds[b], (uint64_t)positions[b]);
            const SampleRow row = {element_at(logits, dtype, b * row_stride),
                                   dtype,
                                   vocab,
                                   temperature,
                                   top_k,
                                   top_p,
                                   uniform,
                                   scratch.get()};
            SampleResult result;
            ops.sample(row, &result);
            token[b] = result.token;
            logprob[b] = result.logprob;
            plain_logprob[b] = result.plain_logprob;
            entropy[b] = result.entropy;
            int expected = PPOMAX_OK;
            if (result.token < 0) outcome.compare_exchange_strong(expected, PPOMAX_BAD_LOGITS);
        }
    };
    parallel_for(threads, rows, chunk_for(vocab), body);
    return outcome.load();
}
