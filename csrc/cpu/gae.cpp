// Entry point of gae: checks and the walk over sequences. One sequence is in gae_loops.h.
#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

extern "C" int ppomax_gae_cpu(const void *rewards, int rewards_dtype, int64_t rewards_stride, const void *values,
                              int values_dtype, int64_t values_stride, const uint8_t *mask, int64_t mask_stride,
                              const int32_t *cu_seqlens, int64_t sequences, int64_t tokens, double gamma, double lam,
                              const void *lams, int lams_dtype, const void *bootstrap, int bootstrap_dtype,
                              float *advantages, float *returns, int threads) {
    if (sequences < 0 || tokens < 0) return PPOMAX_BAD_SIZE;
    if (!known_dtype(rewards_dtype) || !known_dtype(values_dtype)) return PPOMAX_BAD_DTYPE;
    if ((lams && !known_dtype(lams_dtype)) || (bootstrap && !known_dtype(bootstrap_dtype))) return PPOMAX_BAD_DTYPE;
    if (!(gamma >= 0.0 && gamma <= 1.0) || (!lams && !(lam >= 0.0 && lam <= 1.0))) return PPOMAX_BAD_SCALAR;
    if (sequences * tokens > 0 && (!rewards || !values || !advantages || !returns)) return PPOMAX_BAD_POINTER;
    if (cu_seqlens) {
        const int status = check_seqlens(cu_seqlens, sequences, tokens);
        if (status) return status;
    }
    const VectorOps &ops = vector_ops();
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
            const double lambda = lams ? (double)ops.one_float({lams, lams_dtype}, s) : lam;
            const double after = bootstrap ? (double)ops.one_float({bootstrap, bootstrap_dtype}, s) : 0.0;
            GaeSequence one = {{rewards, rewards_dtype},
                               {values, values_dtype},
                               mask,
                               s * rewards_stride,
                               s * values_stride,
                               s * mask_stride,
                               s * tokens,
                               tokens,
                               gamma,
                               gamma * lambda,
                               after,
                               advantages,
                               returns};
            if (cu_seqlens) {
                one.rewards_at = one.values_at = one.mask_at = one.out_at = cu_seqlens[s];
                one.steps = cu_seqlens[s + 1] - cu_seqlens[s];
            }
            ops.gae(one);
        }
    };
    const int64_t average = sequences > 0 ? (cu_seqlens ? tokens / sequences : tokens) : 1;
    parallel_for(threads, sequences, chunk_for(average), body);
    return PPOMAX_OK;
}
