// Entry points of packed_attention: causal attention within packed sequences, a block of queries against all keys that
// it sees as one matrix product, and its gradients. Products are those of packed_linear (linear_loops.h), the softmax
// of a block's rows is in attention_loops.h; both add in the order of paged_attention, so that a token's result is what
// decoding gives, to the bit.
#include <atomic>
#include <memory>
#include <new>

#include <string.h>

#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

namespace {

constexpr int64_t PANEL = LINEAR_PANEL, ROWS = 32;  // queries of a block, at most

int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL; }

// Rows of one head: x[token, dimension] at data[token * stride + dimension].
struct Head {
    const float *data;
    int64_t stride, dim;
};

// Panels of PANEL tokens, [dimension][token]: what `rows @ head^T` reads. Zeros where a panel has no token.
void pack_tokens(const Head &x, int64_t tokens, float *panels) {
    for (int64_t t = 0; t < panels_of(tokens) * PANEL; ++t) {
        float *to = panels + t / PANEL * x.dim * PANEL + t % PANEL;
        for (int64_t d = 0; d < x.dim; ++d) to[d * PANEL] = t < tokens ? x.data[t * x.stride + d] : 0.0f;
    }
}

// Panels of PANEL dimensions, [token][dimension]: what `weights @ head` reads. Zeros where a panel has no dimension.
void pack_dimensions(const Head &x, int64_t tokens, float *panels) {
    for (int64_t d = 0; d < x.dim; d += PANEL, panels += tokens * PANEL) {
        const int64_t some = x.dim - d < PANEL ? x.dim - d : PANEL;
        for (int64_t t = 0; t < tokens; ++t) {
            memcpy(panels + t * PANEL, x.data + t * x.stride + d, (size_t)some * sizeof(float));
            memset(panels + t * PANEL + some, 0, (size_t)(PANEL - some) * sizeof(float));
        }
    }
}

// The queries begin .. end of a sequence, and the keys first .. end that they see; `first` starts a panel.
struct Block {
    int64_t begin, end, first;

    int64_t rows() const { return end - begin; }
    int64_t keys() const { return end - first; }
    int64_t width() const { return panels_of(keys()) * PANEL; }
    // Of a row of scores: no power of two, so that a key's scores lie in different sets of the near cache.
    int64_t stride() const { return width() + ATTENTION_PAGE; }
};

// y[the block's queries, the keys that it sees] = x @ head^T by pack_tokens' panels.
void times_tokens(const VectorOps &ops, const Head &x, const float *panels, const Block &block, float *y) {
    for (int64_t t = 0; t < block.width(); t += PANEL)
        ops.linear_panel({x.data, x.stride, 1}, block.rows(), x.dim, panels + (block.first + t) * x.dim, nullptr, 0,
                         y + t, block.stride(), PANEL);
}

// y[rows, dim] (+)= x @ head, by pack_dimensions' panels of `tokens` tokens, of which x weighs `some` from `first` on.
void times_dimensions(const VectorOps &ops, const LeftSide &x, int64_t rows, const float *panels, int64_t tokens,
                      int64_t first, int64_t some, int add, float *y, int64_t stride, int64_t dim) {
    for (int64_t d = 0; d < dim; d += PANEL)
        ops.linear_panel(x, rows, some, panels + d * tokens + first * PANEL, nullptr, add, y + d, stride,
                         dim - d < PANEL ? dim - d : PANEL);
}

Block block_of(int64_t tokens, int64_t window, int64_t b, int64_t blocks) {
    const int64_t begin = tokens * b / blocks, end = tokens * (b + 1) / blocks;
    return {begin, end, window && begin >= window ? (begin + 1 - window) / PANEL * PANEL : 0};
}

int64_t blocks_of(int64_t tokens) { return (tokens + ROWS - 1) / ROWS; }

struct Sizes {
    const int32_t *ends;
    int64_t sequences, heads, kv_heads, key_dim, value_dim, window;
    float scale;

    int64_t tokens(int64_t s) const { return ends[s + 1] - ends[s]; }
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t s = 0; s < sequences; ++s) most = tokens(s) > most ? tokens(s) : most;
        return most;
    }
    int64_t padded() const { return panels_of(longest()) * PANEL; }
    // Key and value of a token, in whole panels.
    int64_t wide() const { return (panels_of(key_dim) + panels_of(value_dim)) * PANEL; }
    // Items of a parallel loop that one costs some nanoseconds, `times` products of a pair of tokens in each.
    int64_t chunk(int64_t times) const {
        const int64_t mean = ends[sequences] / sequences;
        return chunk_for(mean * mean / 2 * heads / kv_heads * (key_dim + value_dim) * times / 60, DENSE);
    }
};

int check(const Sizes &sizes, int64_t tokens, const void *const *arrays, int count) {
    if (tokens < 0 || sizes.sequences < 0 || sizes.window < 0) return PPOMAX_BAD_SIZE;
    if (sizes.kv_heads < 1 || sizes.heads < sizes.kv_heads || sizes.heads % sizes.kv_heads) return PPOMAX_BAD_SIZE;
    if (sizes.key_dim < 1 || sizes.value_dim < 1) return PPOMAX_BAD_SIZE;
    if (!finite(sizes.scale)) return PPOMAX_BAD_SCALAR;
    for (int k = 0; k < count && tokens; ++k)
        if (!arrays[k]) return PPOMAX_BAD_POINTER;
    if (!sizes.ends) return PPOMAX_BAD_POINTER;
    return check_seqlens(sizes.ends, sizes.sequences, tokens);
}

// body(scratch, sequence, key head) for all of them; scratch: `floats` of each thread's own.
template <class Body>
int for_heads(const Sizes &sizes, int64_t floats, int64_t chunk, int threads, Body each) {
    std::atomic<int> outcome{PPOMAX_OK};
    auto body = [&](int64_t begin, int64_t end) {
        std::unique_ptr<float[]> scratch(new (std::nothrow) float[(size_t)floats]);
        if (!scratch) {
            outcome.store(PPOMAX_NO_MEMORY);
            return;
        }
        for (int64_t i = begin; i < end; ++i) each(scratch.get(), i / sizes.kv_heads, i % sizes.kv_heads);
    };
    parallel_for(threads, sizes.sequences * sizes.kv_heads, chunk, body);
    return outcome.load();
}

}  // namespace

extern "C" int ppomax_packed_attention_cpu(const float *query, int64_t query_token_stride, int64_t query_head_stride,
                                           const float *key, int64_t key_token_stride, int64_t key_head_stride,
                                           const float *value, int64_t value_token_stride, int64_t value_head_stride,
                                           int64_t tokens, int64_t heads, int64_t kv_heads, int64_t key_dim,
                                           int64_t value_dim, const int32_t *ends, int64_t sequences, double scale,
                                           int64_t window, float *out, int threads) {
    const Sizes sizes = {ends, sequences, heads, kv_heads, key_dim, value_dim, window, (float)scale};
    const void *arrays[] = {query, key, value, out};
    if (const int status = check(sizes, tokens, arrays, 4)) return status;
    if (tokens == 0) return PPOMAX_OK;
    const VectorOps &ops = vector_ops();
    const int64_t longest = sizes.padded(), group = heads / kv_heads;
    auto each = [&](float *scratch, int64_t s, int64_t g) {
        const int64_t at = ends[s], count = sizes.tokens(s);
        float *keys = scratch, *values = keys + longest * key_dim, *scores = values + longest * sizes.wide();
        float share[ROWS];
        pack_tokens({key + at * key_token_stride + g * key_head_stride, key_token_stride, key_dim}, count, keys);
        pack_dimensions({value + at * value_token_stride + g * value_head_stride, value_token_stride, value_dim}, count,
                        values);
        for (int64_t h = g * group; h < (g + 1) * group; ++h)
            for (int64_t b = 0; b < blocks_of(count); ++b) {
                const Block block = block_of(count, window, b, blocks_of(count));
                const int64_t stride = block.stride();
                const Head q = {query + (at + block.begin) * query_token_stride + h * query_head_stride,
                                query_token_stride, key_dim};
                float *y = out + ((at + block.begin) * heads + h) * value_dim;
                times_tokens(ops, q, keys, block, scores);
                ops.attention_weights(scores, block.rows(), stride, block.begin - block.first, window, sizes.scale,
                                      share);
                times_dimensions(ops, {scores, stride, 1}, block.rows(), values, count, block.first, block.keys(), 0, y,
                                 heads * value_dim, value_dim);
                for (int64_t r = 0; r < block.rows(); ++r)
                    for (int64_t d = 0; d < value_dim; ++d) y[r * heads * value_dim + d] *= share[r];
            }
    };
    return for_heads(sizes, longest * (key_dim + sizes.wide() + ROWS) + ROWS * ATTENTION_PAGE, sizes.chunk(2), threads,
                     each);
}

extern "C" int ppomax_packed_attention_backward_cpu(
    const float *query, int64_t query_token_stride, int64_t query_head_stride, const float *key,
    int64_t key_token_stride, int64_t key_head_stride, const float *value, int64_t value_token_stride,
    int64_t value_head_stride, const float *dout, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t key_dim,
    int64_t value_dim, const int32_t *ends, int64_t sequences, double scale, int64_t window, float *dquery, float *dkey,
    float *dvalue, int threads) {
    const Sizes sizes = {ends, sequences, heads, kv_heads, key_dim, value_dim, window, (float)scale};
    const void *arrays[] = {query, key, value, dout, dquery, dkey, dvalue};
    if (const int status = check(sizes, tokens, arrays, 7)) return status;
    if (tokens == 0) return PPOMAX_OK;
    const VectorOps &ops = vector_ops();
    const int64_t longest = sizes.padded(), group = heads / kv_heads;
    auto each = [&](float *scratch, int64_t s, int64_t g) {
        const int64_t at = ends[s], count = sizes.tokens(s), key_row = kv_heads * key_dim,
                      value_row = kv_heads * value_dim, query_row = heads * key_dim, out_row = heads * value_dim;
        float *key_tokens = scratch, *value_tokens = key_tokens + longest * key_dim,
              *key_dims = value_tokens + longest * value_dim, *upstream_dims = key_dims + longest * sizes.wide(),
              *query_dims = upstream_dims + ROWS * panels_of(value_dim) * PANEL,
              *weights = upstream_dims + ROWS * sizes.wide(), *slopes = weights + ROWS * (longest + ATTENTION_PAGE);
        const Head k = {key + at * key_token_stride + g * key_head_stride, key_token_stride, key_dim};
        const Head v = {value + at * value_token_stride + g * value_head_stride, value_token_stride, value_dim};
        float *dk = dkey + at * key_row + g * key_dim, *dv = dvalue + at * value_row + g * value_dim;
        pack_tokens(k, count, key_tokens);
        pack_tokens(v, count, value_tokens);
        pack_dimensions(k, count, key_dims);
        for (int64_t t = 0; t < count; ++t) {
            memset(dk + t * key_row, 0, (size_t)key_dim * sizeof(float));
            memset(dv + t * value_row, 0, (size_t)value_dim * sizeof(float));
        }
        for (int64_t h = g * group; h < (g + 1) * group; ++h)
            for (int64_t b = 0; b < blocks_of(count); ++b) {
                const Block block = block_of(count, window, b, blocks_of(count));
                const int64_t rows = block.rows(), stride = block.stride(), keys = block.keys(), row = at + block.begin;
                const Head q = {query + row * query_token_stride + h * query_head_stride, query_token_stride, key_dim};
                const Head up = {dout + row * out_row + h * value_dim, out_row, value_dim};
                times_tokens(ops, q, key_tokens, block, weights);
                times_tokens(ops, up, value_tokens, block, slopes);
                ops.attention_gradient(weights, slopes, rows, stride, block.begin - block.first, window, sizes.scale);
                pack_dimensions(up, rows, upstream_dims);
                pack_dimensions(q, rows, query_dims);
                times_dimensions(ops, {weights, 1, stride}, keys, upstream_dims, rows, 0, rows, 1,
                                 dv + block.first * value_row, value_row, value_dim);
                times_dimensions(ops, {slopes, 1, stride}, keys, query_dims, rows, 0, rows, 1,
                                 dk + block.first * key_row, key_row, key_dim);
                times_dimensions(ops, {slopes, stride, 1}, rows, key_dims, count, block.first, keys, 0,
                                 dquery + row * query_row + h * key_dim, query_row, key_dim);
            }
    };
    const int64_t floats =
        longest * (key_dim + value_dim + sizes.wide() + 2 * ROWS) + ROWS * (sizes.wide() + 2 * ATTENTION_PAGE);
    return for_heads(sizes, floats, sizes.chunk(6), threads, each);
}
