// The loops that are compiled once per instruction set, and the table through which the ops reach the copy that suits
// the machine.
#pragma once

#include <stdint.h>

namespace ppomax {

struct TypedArray {
    const void *data;  // may be NULL
    int dtype;
};

struct LogitRow {
    const void *data;
    int dtype;
    int64_t vocab;
    double temperature, softcap;
};

struct RowUpstream {
    float dlogprob, dentropy, lse, entropy;
    int64_t label;
};

struct GaeSequence {
    TypedArray rewards, values;
    const uint8_t *mask;
    int64_t rewards_at, values_at, mask_at, out_at, steps;
    double gamma, step, bootstrap;
    float *advantages, *returns;
};

struct PpoArrays {
    TypedArray logprobs, old_logprobs, advantages, is_weights, ref_logprobs, entropy;
    const uint8_t *mask;
    float clip_low, clip_high, dual_clip, kl_coef;
    int estimator;
    float *dlogprobs;  // may be NULL
};

struct PpoSums {
    double pg, approx_kl, clipped, dual, ratio, kl, entropy, tokens;
    float ratio_max, ratio_gap;
};

struct ValueArrays {
    TypedArray values, old_values, returns;
    const uint8_t *mask;
    float clip;
    float *dvalues;  // may be NULL
};

struct ValueSums {
    double loss, clipped, value, target, squared, tokens;
};

struct Moments {
    double count, mean, m2;
};

struct SampleRow {
    const void *logits;
    int dtype;
    int64_t vocab;
    double temperature;  // 0 is greedy
    int64_t top_k;       // 0 is off
    double top_p;        // 1 is off
    double uniform;      // in (0, 1)
    float *scratch;      // SAMPLE_SCRATCH arrays of vocab + SAMPLE_PAD floats
};
constexpr int SAMPLE_SCRATCH = 4, SAMPLE_PAD = 64;

struct SampleResult {
    int64_t token;  // -1 if the row cannot be drawn from
    float logprob, plain_logprob, entropy;
};

constexpr int LINEAR_PANEL = 32;       // output columns that packed weights hold side by side
constexpr int64_t LINEAR_NEAR = 1024;  // inputs of a panel that the second cache holds beside x
constexpr int ATTENTION_PAGE = 16;     // tokens of a page of the KV cache

// One token and one key head: `heads` query heads against positions first .. end of the token's sequence.
struct AttentionRow {
    const void *key_pages, *value_pages;  // at this key head of page 0
    int64_t key_page_stride, value_page_stride;
    const int32_t *table;
    int64_t first, end, heads, key_dim, value_dim;
    float scale, softcap;
    float *query, *scores, *out;  // scratch: heads x key_dim, 4 x the tokens of the pages, heads x value_dim
};

// x[r, i] at data[r * row + i * input]; one of the two strides is 1.
struct LeftSide {
    const float *data;
    int64_t row, input;
};

struct VectorOps {
    void (*logprob_row)(const LogitRow &, int64_t label, float *logprob, float *entropy, float *lse);
    void (*logits_gradient)(const LogitRow &, const RowUpstream &, void *out);
    void (*kl)(TypedArray logprobs, TypedArray ref, int64_t at, int64_t n, int estimator, float scale, float *out);
    void (*kl_gradient)(const float *dkl, TypedArray logprobs, TypedArray ref, int64_t at, int64_t n, int estimator,
                        float *out);
    void (*gae)(const GaeSequence &);
    void (*moments)(TypedArray x, const uint8_t *mask, int64_t at, int64_t n, Moments *out);
    void (*whiten)(TypedArray x, const uint8_t *mask, int64_t at, int64_t n, double mean, double scale, double shift,
                   float *out);
    void (*ppo)(const PpoArrays &, int64_t at, int64_t n, PpoSums *out);
    void (*value)(const ValueArrays &, int64_t at, int64_t n, ValueSums *out);
    void (*sample)(const SampleRow &, SampleResult *out);
    void (*attend)(const AttentionRow &, const void *query, int64_t query_stride, int dtype, void *out);
    void (*attention_weights)(float *scores, int64_t rows, int64_t stride, int64_t own, int64_t window, float scale,
                              float *share);
    void (*attention_gradient)(float *scores, float *slopes, int64_t rows, int64_t stride, int64_t own, int64_t window,
                               float scale);
    void (*linear_panel)(const LeftSide &x, int64_t rows, int64_t inputs, const float *panel, const float *bias,
                         int add, float *y, int64_t y_stride, int64_t columns);
    void (*linear_panel_bf16)(const uint16_t *x, int64_t x_stride, int64_t rows, int64_t inputs, const uint16_t *panel,
                              const uint16_t *bias, uint16_t *y, int64_t y_stride, int64_t columns);
    void (*rms_norm)(TypedArray x, int64_t first, int64_t rows, int64_t width, TypedArray weight, float offset,
                     double eps, void *y);
    void (*rms_norm_gradient)(const float *x, int64_t first, int64_t rows, int64_t width, const float *weight,
                              float offset, double eps, const float *dy, float *dx, float *dweight);
    void (*silu_mul)(TypedArray x, int64_t first, int64_t rows, int64_t width, void *y);
    void (*silu_mul_gradient)(const float *x, int64_t first, int64_t rows, int64_t width, const float *dy, float *dx);
    void (*rotate_head)(TypedArray x, int64_t at, TypedArray cosine, TypedArray sine, int64_t angle, int64_t dim,
                        int back, void *y, int64_t to);
    void (*add)(TypedArray a, TypedArray b, int64_t at, int64_t n, void *y);
    float (*one_float)(TypedArray, int64_t at);
    const char *name;
};

// The table of the instruction set in use.
const VectorOps &vector_ops();

}  // namespace ppomax
