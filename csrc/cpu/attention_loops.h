// One token's attention over the pages of its sequence, for the query heads that share one key head.
// Scores: keys lie as [dimension][token of the page], so a register holds one dimension of WIDTH tokens, and the score
// of WIDTH tokens grows in one register for each head: no sums across lanes. Values lie as [token][dimension]. Pages
// before the window and after the token are not read; where a page is read in part, scores outside are -inf and values
// outside are not touched.
#pragma once

#include <math.h>

#include "convert.h"
#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

constexpr int PAGE = ATTENTION_PAGE, LANES = PAGE / WIDTH;  // registers that a page's tokens fill
static_assert(PAGE % WIDTH == 0, "a page fills whole registers");
typedef uint16_t HalfVec __attribute__((vector_size(2 * WIDTH)));

PPOMAX_INLINE Vec load_as(const float *p) { return load(p); }

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

PPOMAX_INLINE Vec load_as(const Bf16 *p) {
    HalfVec h;
    memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, IntVec) << 16);
}
PPOMAX_INLINE Vec load_as(const Fp16 *p) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_cvtph_ps((__mmask16)-1, _mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    Vec v;
    for (int k = 0; k < WIDTH; ++k) v[k] = from_fp16(p[k].bits);
    return v;
#endif
}
PPOMAX_INLINE float one_as(const float *p) { return *p; }
PPOMAX_INLINE float one_as(const Bf16 *p) { return from_bf16(p->bits); }
PPOMAX_INLINE float one_as(const Fp16 *p) { return from_fp16(p->bits); }

// scores[h][token] = query[h] . key[token] for the tokens of some pages, which hide the latency of few heads; keys[p]
// are those of one page. Dimensions are added one after the other, as packed_attention adds them.
template <int HEADS, int PAGES, class T>
static inline void page_scores(const float *query, int64_t dim, const T *const *keys, float *scores, int64_t stride) {
    Vec sum[PAGES][HEADS][LANES] = {};
    for (int64_t d = 0; d < dim; ++d)
        for (int p = 0; p < PAGES; ++p)
            for (int lane = 0; lane < LANES; ++lane) {
                const Vec key = load_as(keys[p] + d * PAGE + lane * WIDTH);
                for (int h = 0; h < HEADS; ++h) sum[p][h][lane] += key * query[h * dim + d];
            }
    for (int p = 0; p < PAGES; ++p)
        for (int h = 0; h < HEADS; ++h)
            for (int lane = 0; lane < LANES; ++lane)
                store(scores + h * stride + p * PAGE + lane * WIDTH, sum[p][h][lane]);
}

typedef float FourLanes __attribute__((vector_size(16)));

// All lanes joined by `join`, which takes registers and numbers alike, halving what is left.
template <class Join>
PPOMAX_INLINE float across(FourLanes v, Join join) {
    return join(join(v[0], v[2]), join(v[1], v[3]));
}
#if defined(__AVX2__)
typedef float EightLanes __attribute__((vector_size(32)));

template <class Half, class Whole, class Join>
PPOMAX_INLINE Half joined_halves(Whole v, Join join) {
    Half halves[2];
    memcpy(halves, &v, sizeof v);
    return join(halves[0], halves[1]);
}
template <class Join>
PPOMAX_INLINE float across(EightLanes v, Join join) {
    return across(joined_halves<FourLanes>(v, join), join);
}
#endif
#if defined(__AVX512F__)
template <class Join>
PPOMAX_INLINE float across(Vec v, Join join) {
    return across(joined_halves<EightLanes>(v, join), join);
}
#endif

// Scores of `n` tokens (a multiple of PAGE) into weights e^(score - max); returns their sum. Tokens before `first` and
// from `end` on weigh 0.
static inline float weights_of_scores(float *scores, int64_t n, int64_t first, int64_t end, float scale,
                                      float softcap) {
    if (softcap > 0.0f) {
        for (int64_t i = 0; i < n; ++i) {
            float slope;
            tanh_pair(scores[i] * (scale / softcap), &scores[i], &slope);
        }
        scale = softcap;
    }
    for (int64_t i = 0; i < first; ++i) scores[i] = -INFINITY;
    for (int64_t i = end; i < n; ++i) scores[i] = -INFINITY;
    Vec most = all(-INFINITY);
    for (int64_t i = 0; i < n; i += WIDTH) most = larger(load(scores + i), most);
    const float max = across(most, [](auto a, auto b) { return a > b ? a : b; });
    const float c = scale * 1.44269504f;
    Vec sum = {};
    for (int64_t i = 0; i < n; i += WIDTH) {
        const Vec t = (load(scores + i) - max) * c;
        const Vec e = exp2_of(larger(all(-126.0f), t));
        const Vec w = t < -126.0f ? Vec{} : e;
        store(scores + i, w);
        sum += w;
    }
    return across(sum, [](auto a, auto b) { return a + b; });
}

// The first and the end of what row r of a block sees: all keys up to its own, or the last `window` of them. `own`: the
// key of row 0.
struct Seen {
    int64_t first, end;

    Seen(int64_t r, int64_t own, int64_t window)
        : first(window && own + r >= window ? own + r + 1 - window : 0), end(own + r + 1) {}
    int64_t padded() const { return (end + PAGE - 1) / PAGE * PAGE; }
};

// Rows of scores into weights e^(score - max), 0 where a row does not see, and share[r] = 1 / their sum. stride is a
// multiple of PAGE.
static void attention_weights(float *scores, int64_t rows, int64_t stride, int64_t own, int64_t window, float scale,
                              float *share) {
    for (int64_t r = 0; r < rows; ++r, scores += stride) {
        const Seen seen(r, own, window);
        share[r] = 1.0f / weights_of_scores(scores, seen.padded(), seen.first, seen.end, scale, 0.0f);
        for (int64_t i = seen.padded(); i < stride; ++i) scores[i] = 0.0f;
    }
}

// Rows of scores into weights that sum to 1, and rows of their slopes dw, the gradient of each weight, into those of
// the scores: scale * w * (dw - sum of w * dw).
static void attention_gradient(float *scores, float *slopes, int64_t rows, int64_t stride, int64_t own, int64_t window,
                               float scale) {
    for (int64_t r = 0; r < rows; ++r, scores += stride, slopes += stride) {
        const Seen seen(r, own, window);
        const int64_t n = seen.padded();
        const float share = 1.0f / weights_of_scores(scores, n, seen.first, seen.end, scale, 0.0f);
        Vec sum = {};
        for (int64_t i = 0; i < n; i += WIDTH) {
            const Vec w = load(scores + i) * share;
            store(scores + i, w);
            sum += w * load(slopes + i);
        }
        const float mean = across(sum, [](auto a, auto b) { return a + b; });
        for (int64_t i = 0; i < n; i += WIDTH) store(slopes + i, load(scores + i) * (load(slopes + i) - mean) * scale);
        for (int64_t i = n; i < stride; ++i) scores[i] = slopes[i] = 0.0f;
    }
}

// out[h][0 .. width) += sum of weight[h][t] * value[t] over tokens first .. end of one page; width = SPAN registers.
template <int HEADS, int SPAN, class T>
static inline void add_values(const float *weights, int64_t stride, const T *values, int64_t dim, int first, int end,
                              Vec (&sum)[HEADS][SPAN]) {
    for (int t = first; t < end; ++t) {
        Vec value[SPAN];
        for (int s = 0; s < SPAN; ++s) value[s] = load_as(values + t * dim + s * WIDTH);
        for (int h = 0; h < HEADS; ++h)
            for (int s = 0; s < SPAN; ++s) sum[h][s] += value[s] * weights[h * stride + t];
    }
}

template <int HEADS, int SPAN, class T>
static inline void values_span(const AttentionRow &row, const T *pages, const float *weights, int64_t stride,
                               const float *share, int64_t d, float *out) {
    Vec sum[HEADS][SPAN] = {};
    const int64_t first_page = row.first / PAGE;
    for (int64_t page = first_page; page * PAGE < row.end; ++page) {
        const int from = page == first_page ? (int)(row.first % PAGE) : 0;
        const int to = row.end - page * PAGE < PAGE ? (int)(row.end - page * PAGE) : PAGE;
        add_values<HEADS, SPAN>(weights + (page - first_page) * PAGE, stride,
                                pages + row.table[page] * row.value_page_stride + d, row.value_dim, from, to, sum);
    }
    for (int h = 0; h < HEADS; ++h)
        for (int s = 0; s < SPAN; ++s) store(out + h * row.value_dim + d + s * WIDTH, sum[h][s] * share[h]);
}

template <int HEADS, class T>
static void attend_heads(const AttentionRow &row, const float *query, float *out) {
    const int64_t first_page = row.first / PAGE, pages = (row.end + PAGE - 1) / PAGE - first_page,
                  stride = pages * PAGE;
    const T *key_pages = (const T *)row.key_pages, *value_pages = (const T *)row.value_pages;
    float *scores = row.scores, share[HEADS];
    constexpr int FEW = HEADS * LANES, TOGETHER = FEW >= 8 ? 1 : FEW >= 3 ? 2 : 4;
    const auto keys_of = [&](int64_t p) { return key_pages + row.table[first_page + p] * row.key_page_stride; };
    int64_t p = 0;
    for (; p + TOGETHER <= pages; p += TOGETHER) {
        const T *keys[TOGETHER];
        for (int k = 0; k < TOGETHER; ++k) keys[k] = keys_of(p + k);
        page_scores<HEADS, TOGETHER>(query, row.key_dim, keys, scores + p * PAGE, stride);
    }
    for (; p < pages; ++p) {
        const T *keys[] = {keys_of(p)};
        page_scores<HEADS, 1>(query, row.key_dim, keys, scores + p * PAGE, stride);
    }
    for (int h = 0; h < HEADS; ++h)
        share[h] = 1.0f / weights_of_scores(scores + h * stride, stride, row.first - first_page * PAGE,
                                            row.end - first_page * PAGE, row.scale, row.softcap);
    int64_t d = 0;
    for (; d + 2 * WIDTH <= row.value_dim; d += 2 * WIDTH)
        values_span<HEADS, 2>(row, value_pages, scores, stride, share, d, out);
    for (; d + WIDTH <= row.value_dim; d += WIDTH)
        values_span<HEADS, 1>(row, value_pages, scores, stride, share, d, out);
    for (; d < row.value_dim; ++d)
        for (int h = 0; h < HEADS; ++h) {
            float sum = 0.0f;
            for (int64_t t = row.first; t < row.end; ++t)
                sum += scores[h * stride + t - first_page * PAGE] *
                       one_as(value_pages + row.table[t / PAGE] * row.value_page_stride + t % PAGE * row.value_dim + d);
            out[h * row.value_dim + d] = sum * share[h];
        }
}

template <class T>
static void attend_typed(const AttentionRow &row) {
    for (int64_t h = 0; h < row.heads;) {
        const float *query = row.query + h * row.key_dim;
        float *out = row.out + h * row.value_dim;
        const int64_t left = row.heads - h;
        if (left >= 4) {
            attend_heads<4, T>(row, query, out);
            h += 4;
        } else if (left == 3) {
            attend_heads<3, T>(row, query, out);
            h += 3;
        } else if (left == 2) {
            attend_heads<2, T>(row, query, out);
            h += 2;
        } else {
            attend_heads<1, T>(row, query, out);
            h += 1;
        }
    }
}

// The group's queries, read as fp32, against its pages; the result in the dtype of the queries.
static void attend(const AttentionRow &row, const void *query, int64_t query_stride, int dtype, void *out) {
    if (dtype == PPOMAX_FP32) {
        for (int64_t h = 0; h < row.heads; ++h)
            for (int64_t d = 0; d < row.key_dim; ++d)
                row.query[h * row.key_dim + d] = ((const float *)query)[h * query_stride + d];
        AttentionRow direct = row;
        direct.out = (float *)out;
        attend_typed<float>(direct);
        return;
    }
    const TypedArray array = {query, dtype};
    for (int64_t h = 0; h < row.heads; ++h)
        as_floats(array, h * query_stride, (int)row.key_dim, row.query + h * row.key_dim);
    if (dtype == PPOMAX_BF16)
        attend_typed<Bf16>(row);
    else
        attend_typed<Fp16>(row);
    put_floats(row.out, (int)(row.heads * row.value_dim), out, dtype, 0);
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
