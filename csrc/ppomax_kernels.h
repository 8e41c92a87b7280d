/* ppomax kernels: the C ABI. Plain C99; knows nothing of Python or torch.
 *
 * One function per op and device. Rules that hold for all of them:
 *   - The return value is a ppomax_status; 0 is success. Nothing is printed, nothing is thrown, no argument is kept.
 *   - Inputs are const and may be read by other threads; outputs must not overlap inputs unless a function says so.
 *   - `dtype` arguments are ppomax_dtype codes. Strides count elements, not bytes. Sizes are int64_t: buffers may
 * exceed 2^31 elements.
 *   - Pointers need no more alignment than their element type asks for. Where a size is 0 the pointer may be NULL.
 *   - A "mask" is one byte an element, nonzero for elements that count, or NULL for all. Masked elements never reach a
 * result.
 *   - `threads` is how many threads a CPU call may use, the calling one included; small calls stay on the calling
 * thread. Results do not depend on it, to the bit. Calls may come from several threads at once, and after fork().
 *   - Arithmetic is fp32 on inputs of any dtype; results are fp32 where not said otherwise.
 */
#ifndef PPOMAX_KERNELS_H
#define PPOMAX_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define PPOMAX_API __declspec(dllexport)
#else
#define PPOMAX_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Grows when a signature changes. */
#define PPOMAX_ABI_VERSION 1

typedef enum ppomax_status {
    PPOMAX_OK = 0,
    PPOMAX_BAD_POINTER = 1, /* a needed pointer is NULL */
    PPOMAX_BAD_SIZE = 2,    /* a size is negative, or a vocabulary is empty */
    PPOMAX_BAD_DTYPE = 3,   /* not a ppomax_dtype code, or one that the function does not take */
    PPOMAX_BAD_SCALAR = 4,  /* a temperature, coefficient or enum code outside its range */
    PPOMAX_BAD_LABEL = 5,   /* a label outside [0, vocab) that is not ignore_index; outputs are unspecified */
    PPOMAX_BAD_SEQLENS =
        6, /* cu_seqlens does not run from 0 to the token count, strictly increasing; no output is written */
    PPOMAX_BAD_LOGITS = 7, /* sampling from a row that holds NaN or +inf, or nothing but -inf; outputs of other rows are
                              valid, its token is -1 */
    PPOMAX_NO_MEMORY = 8,  /* scratch memory could not be allocated */
    PPOMAX_BAD_ISA = 9,    /* an instruction set that this machine, or this build, does not have */
    PPOMAX_CUDA_ERROR = 10, /* a CUDA call failed: see ppomax_cuda_error() */
    PPOMAX_BAD_PAGE = 11    /* a sequence, position or page outside the arrays; nothing is written */
} ppomax_status;

typedef enum ppomax_dtype { PPOMAX_FP32 = 0, PPOMAX_BF16 = 1, PPOMAX_FP16 = 2 } ppomax_dtype;

/* With u = logprob - ref_logprob: u; u^2/2; e^-u - 1 + u (u clamped to +-20, without gradient outside); |u|. */
typedef enum ppomax_estimator { PPOMAX_K1 = 0, PPOMAX_K2 = 1, PPOMAX_K3 = 2, PPOMAX_KABS = 3 } ppomax_estimator;

/* Instruction sets that CPU code is compiled for; on Arm there is PPOMAX_ISA_BASE alone (NEON). */
typedef enum ppomax_isa_code {
    PPOMAX_ISA_AUTO = -1, /* the best one that the machine has */
    PPOMAX_ISA_BASE = 0,  /* x86-64 baseline (SSE2), or the target's baseline elsewhere */
    PPOMAX_ISA_V3 = 1,    /* AVX2, FMA, F16C */
    PPOMAX_ISA_V4 = 2     /* AVX-512 F, BW, DQ, VL, CD */
} ppomax_isa_code;

/* PPOMAX_ABI_VERSION of the built library. */
PPOMAX_API int ppomax_abi_version(void);

/* What a status means, in English; never NULL, never to be freed. */
PPOMAX_API const char *ppomax_status_string(int status);

/* The instruction set in use, the best one that machine and build have, and a name for a code (NULL for an unknown
 * code). */
PPOMAX_API int ppomax_isa(void);
PPOMAX_API int ppomax_best_isa(void);
PPOMAX_API const char *ppomax_isa_name(int isa);

/* Use `isa` from now on in this process (PPOMAX_ISA_AUTO: the best one). Meant for tests and timings: no call may be in
 * flight. PPOMAX_BAD_ISA if the machine does not have it. */
PPOMAX_API int ppomax_force_isa(int isa);

/* The label of a row whose true label lies in another shard of the vocabulary (vocabulary-parallel heads). */
#define PPOMAX_FOREIGN_LABEL INT64_MIN

/* Log-probability of each row's label and, if asked for, each row's entropy.
 * z = logits / temperature (softcap * tanh(logits / softcap) first if softcap > 0), L = logsumexp(z), p = softmax(z):
 *     logprobs = z[label] - L ;  entropy = L - sum p*z ;  lse = L.
 * logits: `outer` x `inner` rows of `vocab` elements next to one another; row (o, i) starts at o*outer_stride +
 * i*inner_stride. labels: (o, i) at o*labels_outer_stride + i*labels_inner_stride. Outputs: outer*inner floats each,
 * contiguous; `entropy` may be NULL. A row whose label is PPOMAX_FOREIGN_LABEL gives logprob 0, entropy and lse as
 * usual; its gradient lacks the term 1[label]. A row whose label is ignore_index is not read and gives 0, 0, 0. A row
 * of nothing but -inf (without softcap) gives -inf, 0, -inf. NaN or +inf in a row gives NaN. temperature > 0; softcap 0
 * is none. */
PPOMAX_API int ppomax_token_logprobs_cpu(const void *logits, int dtype, int64_t outer, int64_t inner, int64_t vocab,
                                         int64_t outer_stride, int64_t inner_stride, const int64_t *labels,
                                         int64_t labels_outer_stride, int64_t labels_inner_stride, double temperature,
                                         double softcap, int64_t ignore_index, float *logprobs, float *entropy,
                                         float *lse, int threads);

/* Gradient of the above: dlogits = J^T (dlogprobs, dentropy), from the saved lse and entropy (each outer*inner floats,
 * contiguous). dz = dlogprob * (1[label] - p) - dentropy * p * (z - L + H), p*z = 0 where p = 0; then through
 * temperature and softcap. dlogprobs, dentropy: strided like labels (stride 0 is a broadcast), or NULL for zero;
 * without dentropy, `entropy` may be NULL. dlogits: outer*inner*vocab elements of the dtype of logits, contiguous; it
 * may be the logits buffer itself if that is contiguous. Rows of ignore_index and rows of -inf get zeros. */
PPOMAX_API int ppomax_token_logprobs_backward_cpu(
    const float *dlogprobs, int64_t dlogprobs_outer_stride, int64_t dlogprobs_inner_stride, const float *dentropy,
    int64_t dentropy_outer_stride, int64_t dentropy_inner_stride, const void *logits, int dtype, int64_t outer,
    int64_t inner, int64_t vocab, int64_t outer_stride, int64_t inner_stride, const int64_t *labels,
    int64_t labels_outer_stride, int64_t labels_inner_stride, const float *lse, const float *entropy,
    double temperature, double softcap, int64_t ignore_index, void *dlogits, int threads);

/* KL estimate per token, n elements, contiguous. */
PPOMAX_API int ppomax_kl_penalty_cpu(const void *logprobs, int logprobs_dtype, const void *ref_logprobs, int ref_dtype,
                                     int64_t n, int estimator, float *kl, int threads);

/* dlogprobs = dkl * d kl / d logprobs (the gradient for ref_logprobs is its negative). */
PPOMAX_API int ppomax_kl_penalty_backward_cpu(const float *dkl, const void *logprobs, int logprobs_dtype,
                                              const void *ref_logprobs, int ref_dtype, int64_t n, int estimator,
                                              float *dlogprobs, int threads);

/* rewards[t] = -kl_coef * kl[t], plus scores[s] at the last token of sequence s. Packed: `tokens` tokens in `sequences`
 * sequences, cu_seqlens[0] = 0 < cu_seqlens[1] < ... < cu_seqlens[sequences] = tokens. */
PPOMAX_API int ppomax_token_rewards_cpu(const void *scores, int scores_dtype, const void *logprobs, int logprobs_dtype,
                                        const void *ref_logprobs, int ref_dtype, const int32_t *cu_seqlens,
                                        int64_t sequences, int64_t tokens, double kl_coef, int estimator,
                                        float *rewards, int threads);

/* Generalised advantage estimation: delta_t = r_t + gamma*V_{t+1} - V_t ; A_t = delta_t + gamma*lam*A_{t+1} ; returns_t
 * = A_t + V_t. After a sequence's end V is bootstrap[s] (0 if NULL) and A is 0. A masked step passes V and A on to the
 * step before it; its outputs are 0. Packed (cu_seqlens not NULL): `tokens` is N, the row strides are not used. Padded
 * (cu_seqlens NULL): `sequences` rows of `tokens` steps, row s of an input at s*stride; outputs contiguous. lams: one
 * lambda per sequence, or NULL for `lam`. gamma, lam in [0, 1]. */
PPOMAX_API int ppomax_gae_cpu(const void *rewards, int rewards_dtype, int64_t rewards_stride, const void *values,
                              int values_dtype, int64_t values_stride, const uint8_t *mask, int64_t mask_stride,
                              const int32_t *cu_seqlens, int64_t sequences, int64_t tokens, double gamma, double lam,
                              const void *lams, int lams_dtype, const void *bootstrap, int bootstrap_dtype,
                              float *advantages, float *returns, int threads);

/* moments[0..2] = count, mean, sum of squared deviations from the mean, over the mask. */
PPOMAX_API int ppomax_moments_cpu(const void *x, int dtype, const uint8_t *mask, int64_t n, double *moments,
                                  int threads);

/* y = (x - mean) / sqrt(M2 / max(count, 1) + eps), + mean again if not shift_mean; 0 where masked. */
PPOMAX_API int ppomax_whiten_cpu(const void *x, int dtype, const uint8_t *mask, int64_t n, const double *moments,
                                 int shift_mean, double eps, float *y, int threads);

/* Clipped policy loss. With u = clamp(logprob - old, +-20), w = e^u:
 *     pg = is_weight * max(-A*w, -A*clip(w, 1-clip_low, 1+clip_high)), for A < 0 and dual_clip > 0 at most -A*dual_clip
 * (before is_weight); loss = (sum pg + kl_coef * sum kl - ent_coef * sum entropy) / denominator, sums over the mask.
 * The denominator is *normalizer if that is not NULL, else norm_value if > 0, else the count of unmasked tokens; *scale
 * = 1/denominator, or 0 if that is not above 0. is_weights, ref_logprobs, entropy, mask, normalizer may be NULL. All
 * arrays: n elements, contiguous. metrics: 10 floats: pg_loss, approx_kl, clipfrac, dual_clipfrac, ratio_mean,
 * ratio_max, kl, entropy, tokens, ratio_gap (max |w - 1|). dlogprobs (NULL if not wanted): the gradient of sum pg +
 * kl_coef * sum kl, that is without the factor *scale. */
PPOMAX_API int ppomax_ppo_loss_cpu(const void *logprobs, int logprobs_dtype, const void *old_logprobs, int old_dtype,
                                   const void *advantages, int advantages_dtype, const uint8_t *mask,
                                   const void *is_weights, int is_weights_dtype, const void *ref_logprobs,
                                   int ref_dtype, const void *entropy, int entropy_dtype, int64_t n,
                                   const float *normalizer, double norm_value, double clip_low, double clip_high,
                                   double dual_clip, double kl_coef, int estimator, double ent_coef, float *loss,
                                   float *metrics, float *dlogprobs, float *scale, int threads);

/* Clipped value loss: 1/2 * sum max((V-R)^2, (V_old + clamp(V-V_old, +-clip) - R)^2) / denominator; clip < 0 is none.
 * Denominator and scale as in ppomax_ppo_loss_cpu. metrics: 6 floats: v_loss, clipfrac, value_mean, return_mean,
 * squared_error, tokens. dvalues (NULL if not wanted): the gradient of the sum, without the factor *scale. */
PPOMAX_API int ppomax_value_loss_cpu(const void *values, int values_dtype, const void *old_values, int old_dtype,
                                     const void *returns, int returns_dtype, const uint8_t *mask, int64_t n,
                                     const float *normalizer, double norm_value, double clip, float *loss,
                                     float *metrics, float *dvalues, float *scale, int threads);

/* Draw one token a row from softmax(logits / temperature), cut to the top_k largest (ties kept; 0 is off) and then to
 * the most probable tokens whose mass reaches top_p (ties kept, at least one; 1 is off). temperature 0 takes the first
 * maximum. u = (philox4x32-10(key = seed, counter = (position, 0))[0] >> 8 + 0.5) / 2^24, inverse of the distribution
 * function in index order. logits: `rows` rows of `vocab`, row b at b*row_stride. seeds, positions: one a row. Outputs,
 * one a row: token; its logprob under the distribution drawn from; its logprob under softmax(logits); the entropy of
 * softmax(logits). */
PPOMAX_API int ppomax_sample_cpu(const void *logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                                 const int64_t *seeds, const int64_t *positions, double temperature, int64_t top_k,
                                 double top_p, int64_t *token, float *logprob, float *plain_logprob, float *entropy,
                                 int threads);

/* Tokens of a page of the KV cache below. */
#define PPOMAX_PAGE 16

/* Causal attention over a paged KV cache. Token n stands at positions[n] of sequence sequence_of[n], whose pages are
 * the row of `tables` (sequences x blocks page numbers). First key and value of every token are written into their
 * places, then out[n, h] = sum_t softmax_t(cap(scale * query[n, h] . key_t)) * value_t,  t = max(0, positions[n] -
 * window + 1) .. positions[n], with cap(x) = softcap * tanh(x / softcap). window 0: from the start; softcap 0: none.
 * Query head h reads key head h / (heads / kv_heads). query, key, value: token n, head h at n*token_stride +
 * h*head_stride, dimensions next to one another. key_pages: pages x kv_heads x key_dim x PPOMAX_PAGE; value_pages:
 * pages x kv_heads x PPOMAX_PAGE x value_dim; out: tokens x heads x value_dim; all of `dtype`, contiguous. A page may
 * belong to several sequences; nobody else may use the pages meanwhile. */
PPOMAX_API int ppomax_paged_attention_cpu(const void *query, int64_t query_token_stride, int64_t query_head_stride,
                                          const void *key, int64_t key_token_stride, int64_t key_head_stride,
                                          const void *value, int64_t value_token_stride, int64_t value_head_stride,
                                          int dtype, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t key_dim,
                                          int64_t value_dim, void *key_pages, void *value_pages, int64_t pages,
                                          const int32_t *tables, int64_t sequences, int64_t blocks,
                                          const int32_t *sequence_of, const int32_t *positions, double scale,
                                          int64_t window, double softcap, void *out, int threads);

/* A weight that ppomax_pack_linear_cpu packed, and its bias or NULL. */
typedef struct {
    const void *panels, *bias;
} ppomax_panels;

/* Terms of ppomax_rms_norm_cpu; weight NULL: no norm. */
typedef struct {
    const void *weight;
    double offset, eps;
} ppomax_norm;

/* x + out(attention(rotary(qkv(norm(x))))) and then x + down(silu(gate(norm(x))) * up(norm(x))), with norms of the
 * heads of query and key where there are any. qkv: queries, then keys, then values; gate_up: `inner` outputs of each.
 */
typedef struct {
    int64_t hidden, heads, kv_heads, dim, inner;
    ppomax_norm before_attention, before_mlp, of_query, of_key;
    ppomax_panels qkv, out, gate_up, down;
} ppomax_block;

/* Elements of scratch that `rows` tokens need. */
PPOMAX_API int64_t ppomax_decode_block_scratch(const ppomax_block *block, int64_t rows);

/* The block over x, y: rows x hidden; cosine, sine: rows x dim. What stands between key_pages and softcap is that of
 * ppomax_paged_attention_cpu. All arrays and weights of `dtype`, fp32 or bf16 (there `dim` is at most 1,024), and
 * contiguous. To the bit what the functions beside give one by one, with rotary embedding in fp32 rounded once. */
PPOMAX_API int ppomax_decode_block_cpu(const ppomax_block *block, const void *x, int dtype, int64_t rows,
                                       const void *cosine, const void *sine, void *key_pages, void *value_pages,
                                       int64_t pages, const int32_t *tables, int64_t sequences, int64_t blocks,
                                       const int32_t *sequence_of, const int32_t *positions, double scale,
                                       int64_t window, double softcap, void *scratch, void *y, int threads);

/* Causal attention within packed sequences, in fp32: token n of the sequence ends[s] .. ends[s + 1] - 1 attends to it
 * from its start, or the last `window` tokens (0: all), up to n: out[n, h] = sum_t softmax_t(scale * query[n, h] .
 * key_t) * value_t, to the bit what ppomax_paged_attention_cpu gives. ends: sequences + 1, from 0 to `tokens`, rising;
 * strides as there; out: tokens x heads x value_dim, contiguous. */
PPOMAX_API int ppomax_packed_attention_cpu(const float *query, int64_t query_token_stride, int64_t query_head_stride,
                                           const float *key, int64_t key_token_stride, int64_t key_head_stride,
                                           const float *value, int64_t value_token_stride, int64_t value_head_stride,
                                           int64_t tokens, int64_t heads, int64_t kv_heads, int64_t key_dim,
                                           int64_t value_dim, const int32_t *ends, int64_t sequences, double scale,
                                           int64_t window, float *out, int threads);

/* Its gradients from dout (tokens x heads x value_dim): dquery: tokens x heads x key_dim, dkey: tokens x kv_heads x
 * key_dim, dvalue: tokens x kv_heads x value_dim; these four contiguous. Scores are computed again. */
PPOMAX_API int ppomax_packed_attention_backward_cpu(
    const float *query, int64_t query_token_stride, int64_t query_head_stride, const float *key,
    int64_t key_token_stride, int64_t key_head_stride, const float *value, int64_t value_token_stride,
    int64_t value_head_stride, const float *dout, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t key_dim,
    int64_t value_dim, const int32_t *ends, int64_t sequences, double scale, int64_t window, float *dquery, float *dkey,
    float *dvalue, int threads);

/* Output columns of a panel below. */
#define PPOMAX_PANEL 32

/* y = x W^T + bias, rows x outputs, contiguous; sums in fp32, one input after the other, so that a row of y does not
 * depend on the others to the bit. x[r, i] lies at r * x_row_stride + i * x_input_stride, one of the two being 1 (bf16:
 * the second). panels: ceil(outputs / PPOMAX_PANEL) x inputs x PPOMAX_PANEL, W packed so that panel p holds
 * W[p * PPOMAX_PANEL + c, i] at [i][c], and in bf16 at [i / 2][c][i % 2] with an even number of inputs; columns past
 * `outputs` are not used. bias: `outputs` elements, or NULL. All of `dtype`: fp32 or bf16. add: the sums go on from
 * what y holds (fp32). */
PPOMAX_API int ppomax_packed_linear_cpu(const void *x, int dtype, int64_t rows, int64_t inputs, int64_t x_row_stride,
                                        int64_t x_input_stride, const void *panels, const void *bias, int64_t outputs,
                                        int add, void *y, int threads);

/* W (outputs x inputs) as such panels; zeros in the columns past `outputs`. W[o, i] lies at o * output_stride + i *
 * input_stride (bf16: the second is 1). */
PPOMAX_API int ppomax_pack_linear_cpu(const void *weight, int dtype, int64_t outputs, int64_t inputs,
                                      int64_t output_stride, int64_t input_stride, void *panels, int threads);

/* y = x / sqrt(mean(x^2) + eps) * (weight + offset), row by row, in fp32 and rounded once to `dtype`, that of x and y:
 * rows x width, contiguous; weight: `width` elements. */
PPOMAX_API int ppomax_rms_norm_cpu(const void *x, int dtype, int64_t rows, int64_t width, const void *weight,
                                   int weight_dtype, double offset, double eps, void *y, int threads);

/* Rows whose part of a weight's gradient is summed into one row below. */
#define PPOMAX_GRADIENT_ROWS 64

/* Gradients of the above in fp32. dy, dx: rows x width; dx is set. dweights: ceil(rows / PPOMAX_GRADIENT_ROWS) x width,
 * set to sums over that many rows each, whose sum is the gradient of weight. All contiguous. */
PPOMAX_API int ppomax_rms_norm_backward_cpu(const float *x, int64_t rows, int64_t width, const float *weight,
                                            double offset, double eps, const float *dy, float *dx, float *dweights,
                                            int threads);

/* y[r, i] = g / (1 + e^-g) * x[r, width + i] with g = x[r, i], in fp32 and rounded once. x: rows x 2 * width, y: rows x
 * width, contiguous. */
PPOMAX_API int ppomax_silu_mul_cpu(const void *x, int dtype, int64_t rows, int64_t width, void *y, int threads);

/* Its gradient in fp32: dy: rows x width, dx: rows x 2 * width, contiguous. */
PPOMAX_API int ppomax_silu_mul_backward_cpu(const float *x, int64_t rows, int64_t width, const float *dy, float *dx,
                                            int threads);

/* Rotary position embedding in fp32: y = x * cosine + (-x2, x1) * sine, x1 and x2 the halves of a head's `dim`
 * elements; with `back` the transpose of it, which takes gradients back. x: an array of batch x tokens x heads x dim
 * with the strides given, the last 1. cosine, sine: tokens x dim, contiguous, a batch `angle_stride` elements after the
 * other (0: the same for all). y: batch x tokens x heads x dim, contiguous. */
PPOMAX_API int ppomax_rotate_cpu(const float *x, int64_t batch_stride, int64_t token_stride, int64_t head_stride,
                                 int64_t batch, int64_t tokens, int64_t heads, int64_t dim, const float *cosine,
                                 const float *sine, int64_t angle_stride, int back, float *y, int threads);

/* Reads `bytes` bytes (a multiple of 256 KiB) once and returns a sum of them: the memory bandwidth that benchmarks
 * compare with. */
PPOMAX_API uint64_t ppomax_stream_read(const void *data, int64_t bytes, int threads);

/* ---- CUDA: functions below this line are in the library if it was built with a CUDA compiler
 * --------------------------------------- */

/* 1 if the library was built with a CUDA compiler, else 0; and in words, for which architectures or why not. Both are
 * always there; the functions after them only where ppomax_cuda_built() is 1. The library needs no CUDA driver to be
 * loaded. */
PPOMAX_API int ppomax_cuda_built(void);
PPOMAX_API const char *ppomax_cuda_note(void);

/* What the last PPOMAX_CUDA_ERROR of this thread was. */
PPOMAX_API const char *ppomax_cuda_error(void);

/* As on a CPU, with these differences. Every pointer is device memory of the current device; `stream` is a cudaStream_t
 * of it (NULL: the default stream); the call only queues work. Values are not read back: a label outside [0, vocab)
 * that is not ignore_index gives NaN (and a gradient row of NaN), and wrong cu_seqlens never lead outside the arrays. A
 * gradient row whose upstream gradients are 0 is set to 0 without reading its logits. Rows and sequences: at most 2^31
 * - 1 a call. */
PPOMAX_API int ppomax_token_logprobs_cuda(const void *logits, int dtype, int64_t outer, int64_t inner, int64_t vocab,
                                          int64_t outer_stride, int64_t inner_stride, const int64_t *labels,
                                          int64_t labels_outer_stride, int64_t labels_inner_stride, double temperature,
                                          double softcap, int64_t ignore_index, float *logprobs, float *entropy,
                                          float *lse, void *stream);

PPOMAX_API int ppomax_token_logprobs_backward_cuda(
    const float *dlogprobs, int64_t dlogprobs_outer_stride, int64_t dlogprobs_inner_stride, const float *dentropy,
    int64_t dentropy_outer_stride, int64_t dentropy_inner_stride, const void *logits, int dtype, int64_t outer,
    int64_t inner, int64_t vocab, int64_t outer_stride, int64_t inner_stride, const int64_t *labels,
    int64_t labels_outer_stride, int64_t labels_inner_stride, const float *lse, const float *entropy,
    double temperature, double softcap, int64_t ignore_index, void *dlogits, void *stream);

PPOMAX_API int ppomax_gae_cuda(const void *rewards, int rewards_dtype, int64_t rewards_stride, const void *values,
                               int values_dtype, int64_t values_stride, const uint8_t *mask, int64_t mask_stride,
                               const int32_t *cu_seqlens, int64_t sequences, int64_t tokens, double gamma, double lam,
                               const void *lams, int lams_dtype, const void *bootstrap, int bootstrap_dtype,
                               float *advantages, float *returns, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* PPOMAX_KERNELS_H */
