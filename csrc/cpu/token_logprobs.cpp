// Entry points of token_logprobs: checks, the walk over rows, threads. The arithmetic of a row is in logprob_loops.h.
#include <atomic>

#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

namespace {

int check_rows(const void *logits, int dtype, int64_t outer, int64_t inner, int64_t vocab, const int64_t *labels,
               double temperature, double softcap) {
    if (outer < 0 || inner < 0 || vocab < 1) return PPOMAX_BAD_SIZE;
    if (!known_dtype(dtype)) return PPOMAX_BAD_DTYPE;
    if (!(temperature > 0.0) || !finite(temperature) || !(softcap >= 0.0) || !finite(softcap)) return PPOMAX_BAD_SCALAR;
    if (outer * inner > 0 && (!logits || !labels)) return PPOMAX_BAD_POINTER;
    return PPOMAX_OK;
}

bool counts(int64_t label, int64_t vocab, int64_t ignore_index) {
    return label != ignore_index && ((label >= 0 && label < vocab) || label == PPOMAX_FOREIGN_LABEL);
}

}  // namespace

extern "C" int ppomax_token_logprobs_cpu(const void *logits, int dtype, int64_t outer, int64_t inner, int64_t vocab,
                                         int64_t outer_stride, int64_t inner_stride, const int64_t *labels,
                                         int64_t labels_outer_stride, int64_t labels_inner_stride, double temperature,
                                         double softcap, int64_t ignore_index, float *logprobs, float *entropy,
                                         float *lse, int threads) {
    const int status = check_rows(logits, dtype, outer, inner, vocab, labels, temperature, softcap);
    if (status) return status;
    const int64_t rows = outer * inner;
    if (rows > 0 && (!logprobs || !lse)) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    std::atomic<int> outcome{PPOMAX_OK};
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t o = r / inner, i = r % inner;
            const int64_t label = labels[o * labels_outer_stride + i * labels_inner_stride];
            float *h = entropy ? entropy + r : nullptr;
            if (counts(label, vocab, ignore_index)) {
                const LogitRow row = {element_at(logits, dtype, o * outer_stride + i * inner_stride), dtype, vocab,
                                      temperature, softcap};
                ops.logprob_row(row, label, logprobs + r, h, lse + r);
                continue;
            }
            logprobs[r] = lse[r] = 0.0f;
            if (h) *h = 0.0f;
            if (label != ignore_index) outcome.store(PPOMAX_BAD_LABEL, std::memory_order_relaxed);
        }
    };
    parallel_for(threads, rows, chunk_for(vocab / 2 + 100), body);
    return outcome.load();
}

extern "C" int ppomax_token_logprobs_backward_cpu(
    const float *dlogprobs, int64_t dlogprobs_outer_stride, int64_t dlogprobs_inner_stride, const float *dentropy,
    int64_t dentropy_outer_stride, int64_t dentropy_inner_stride, const void *logits, int dtype, int64_t outer,
    int64_t inner, int64_t vocab, int64_t outer_stride, int64_t inner_stride, const int64_t *labels,
    int64_t labels_outer_stride, int64_t labels_inner_stride, const float *lse, const float *entropy,
    double temperature, double softcap, int64_t ignore_index, void *dlogits, int threads) {
    const int status = check_rows(logits, dtype, outer, inner, vocab, labels, temperature, softcap);
    if (status) return status;
    const int64_t rows = outer * inner;
    if (rows > 0 && (!lse || !dlogits || (dentropy && !entropy))) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    std::atomic<int> outcome{PPOMAX_OK};
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t o = r / inner, i = r % inner;
            const int64_t label = labels[o * labels_outer_stride + i * labels_inner_stride];
            const bool counted = counts(label, vocab, ignore_index);
            RowUpstream up = {0.0f, 0.0f, lse[r], 0.0f,
                              label};  // without a token the upstream gradient is 0, and so is the row
            if (counted && dlogprobs) up.dlogprob = dlogprobs[o * dlogprobs_outer_stride + i * dlogprobs_inner_stride];
            if (counted && dentropy) {
                up.dentropy = dentropy[o * dentropy_outer_stride + i * dentropy_inner_stride];
                up.entropy = entropy[r];
            }
            if (!counted && label != ignore_index) outcome.store(PPOMAX_BAD_LABEL, std::memory_order_relaxed);
            const LogitRow row = {element_at(logits, dtype, o * outer_stride + i * inner_stride), dtype, vocab,
                                  temperature, softcap};
            ops.logits_gradient(row, up, static_cast<char *>(dlogits) + r * vocab * bytes_of(dtype));
        }
    };
    parallel_for(threads, rows, chunk_for(vocab / 2 + 100), body);
    return outcome.load();
}
