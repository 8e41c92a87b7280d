// Entry points of kl_penalty and token_rewards, which is a KL penalty with a score at each sequence's end.
#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

namespace {

int check_pair(const void *logprobs, int logprobs_dtype, const void *ref, int ref_dtype, int64_t n, int estimator,
               const float *out) {
    if (n < 0) return PPOMAX_BAD_SIZE;
    if (!known_dtype(logprobs_dtype) || !known_dtype(ref_dtype)) return PPOMAX_BAD_DTYPE;
    if (!known_estimator(estimator)) return PPOMAX_BAD_SCALAR;
    if (n > 0 && (!logprobs || !ref || !out)) return PPOMAX_BAD_POINTER;
    return PPOMAX_OK;
}

void kl_over(TypedArray logprobs, TypedArray ref, int64_t n, int estimator, float scale, float *out, int threads) {
    const VectorOps &ops = vector_ops();
    auto body = [&](int64_t begin, int64_t end) { ops.kl(logprobs, ref, begin, end - begin, estimator, scale, out); };
    parallel_for(threads, n, chunk_for(1), body);
}

}  // namespace

extern "C" int ppomax_kl_penalty_cpu(const void *logprobs, int logprobs_dtype, const void *ref_logprobs, int ref_dtype,
                                     int64_t n, int estimator, float *kl, int threads) {
    const int status = check_pair(logprobs, logprobs_dtype, ref_logprobs, ref_dtype, n, estimator, kl);
    if (status) return status;
    kl_over({logprobs, logprobs_dtype}, {ref_logprobs, ref_dtype}, n, estimator, 1.0f, kl, threads);
    return PPOMAX_OK;
}

extern "C" int ppomax_kl_penalty_backward_cpu(const float *dkl, const void *logprobs, int logprobs_dtype,
                                              const void *ref_logprobs, int ref_dtype, int64_t n, int estimator,
                                              float *dlogprobs, int threads) {
    const int status = check_pair(logprobs, logprobs_dtype, ref_logprobs, ref_dtype, n, estimator, dlogprobs);
    if (status) return status;
    if (n > 0 && !dkl) return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    auto body = [&](int64_t begin, int64_t end) {
        ops.kl_gradient(dkl, {logprobs, logprobs_dtype}, {ref_logprobs, ref_dtype}, begin, end - begin, estimator,
                        dlogprobs);
    };
    parallel_for(threads, n, chunk_for(1), body);
    return PPOMAX_OK;
}

extern "C" int ppomax_token_rewards_cpu(const void *scores, int scores_dtype, const void *logprobs, int logprobs_dtype,
                                        const void *ref_logprobs, int ref_dtype, const int32_t *cu_seqlens,
                                        int64_t sequences, int64_t tokens, double kl_coef, int estimator,
                                        float *rewards, int threads) {
    if (sequences < 0) return PPOMAX_BAD_SIZE;
    if (!cu_seqlens || (sequences > 0 && !scores)) return PPOMAX_BAD_POINTER;
    if (!known_dtype(scores_dtype)) return PPOMAX_BAD_DTYPE;
    if (!(kl_coef >= 0.0) || !finite(kl_coef)) return PPOMAX_BAD_SCALAR;
    int status = check_pair(logprobs, logprobs_dtype, ref_logprobs, ref_dtype, tokens, estimator, rewards);
    if (!status) status = check_seqlens(cu_seqlens, sequences, tokens);
    if (status) return status;
    kl_over({logprobs, logprobs_dtype}, {ref_logprobs, ref_dtype}, tokens, estimator, (float)-kl_coef, rewards,
            threads);
    const VectorOps &ops = vector_ops();
    for (int64_t s = 0; s < sequences; ++s) rewards[cu_seqlens[s + 1] - 1] += ops.one_float({scores, scores_dtype}, s);
    return PPOMAX_OK;
}
