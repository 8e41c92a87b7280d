// Entry point of paged_attention: checks, new keys and values into their pages, scratch memory, threads. One token and
// key head is in attention_loops.h.
#include <atomic>
#include <memory>
#include <new>

#include <string.h>

#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

static_assert(ATTENTION_PAGE == PPOMAX_PAGE, "one page size in header and loops");

namespace {

struct Cache {
    const int32_t *tables, *sequence_of, *positions;
    int64_t blocks;

    const int32_t *table(int64_t n) const { return tables + sequence_of[n] * blocks; }
    int64_t page(int64_t n) const { return table(n)[positions[n] / PPOMAX_PAGE]; }
    int64_t inside(int64_t n) const { return positions[n] % PPOMAX_PAGE; }
};

bool inside_arrays(const Cache &cache, int64_t tokens, int64_t sequences, int64_t pages) {
    for (int64_t n = 0; n < tokens; ++n) {
        const int64_t sequence = cache.sequence_of[n], position = cache.positions[n];
        if (sequence < 0 || sequence >= sequences || position < 0 || position >= cache.blocks * PPOMAX_PAGE)
            return false;
        const int32_t *table = cache.table(n);
        for (int64_t b = 0; b <= position / PPOMAX_PAGE; ++b)
            if (table[b] < 0 || table[b] >= pages) return false;
    }
    return true;
}

// A key goes down a column of its page, a value along a row.
template <class T>
void write_token(const T *key, const T *value, int64_t key_dim, int64_t value_dim, int64_t inside, T *keys, T *values) {
    for (int64_t d = 0; d < key_dim; ++d) keys[d * PPOMAX_PAGE + inside] = key[d];
    memcpy(values + inside * value_dim, value, (size_t)value_dim * sizeof(T));
}

}  // namespace

extern "C" int ppomax_paged_attention_cpu(const void *query, int64_t query_token_stride, int64_t query_head_stride,
                                          const void *key, int64_t key_token_stride, int64_t key_head_stride,
                                          const void *value, int64_t value_token_stride, int64_t value_head_stride,
                                          int dtype, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t key_dim,
                                          int64_t value_dim, void *key_pages, void *value_pages, int64_t pages,
                                          const int32_t *tables, int64_t sequences, int64_t blocks,
                                          const int32_t *sequence_of, const int32_t *positions, double scale,
                                          int64_t window, double softcap, void *out, int threads) {
    if (tokens < 0 || pages < 0 || sequences < 0 || blocks < 0 || window < 0) return PPOMAX_BAD_SIZE;
    if (kv_heads < 1 || heads < kv_heads || heads % kv_heads || key_dim < 1 || value_dim < 1) return PPOMAX_BAD_SIZE;
    if (!known_dtype(dtype)) return PPOMAX_BAD_DTYPE;
    if (!finite(scale) || !(softcap >= 0.0) || !finite(softcap)) return PPOMAX_BAD_SCALAR;
    if (tokens == 0) return PPOMAX_OK;
    if (!query || !key || !value || !key_pages || !value_pages || !tables || !sequence_of || !positions || !out)
        return PPOMAX_BAD_POINTER;
    const Cache cache = {tables, sequence_of, positions, blocks};
    if (!inside_arrays(cache, tokens, sequences, pages)) return PPOMAX_BAD_PAGE;

    const int64_t key_page = key_dim * PPOMAX_PAGE, value_page = PPOMAX_PAGE * value_dim, group = heads / kv_heads;
    auto write = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t n = i / kv_heads, g = i % kv_heads, at = cache.page(n) * kv_heads + g;
            const void *k = element_at(key, dtype, n * key_token_stride + g * key_head_stride);
            const void *v = element_at(value, dtype, n * value_token_stride + g * value_head_stride);
            if (dtype == PPOMAX_FP32)
                write_token((const uint32_t *)k, (const uint32_t *)v, key_dim, value_dim, cache.inside(n),
                            (uint32_t *)key_pages + at * key_page, (uint32_t *)value_pages + at * value_page);
            else
                write_token((const uint16_t *)k, (const uint16_t *)v, key_dim, value_dim, cache.inside(n),
                            (uint16_t *)key_pages + at * key_page, (uint16_t *)value_pages + at * value_page);
        }
    };
    parallel_for(threads, tokens * kv_heads, chunk_for(2 * (key_dim + value_dim)), write);

    int64_t longest = 0, read = 0;
    for (int64_t n = 0; n < tokens; ++n) {
        const int64_t seen = window && positions[n] >= window ? window : positions[n] + 1;
        longest = seen > longest ? seen : longest;
        read += seen;
    }
    const VectorOps &ops = vector_ops();
    std::atomic<int> outcome{PPOMAX_OK};
    const int64_t scores = 4 * (longest + 2 * PPOMAX_PAGE), queries = group * key_dim, results = group * value_dim;
    auto body = [&](int64_t begin, int64_t end) {
        std::unique_ptr<float[]> scratch(new (std::nothrow) float[(size_t)(scores + queries + results)]);
        if (!scratch) {
            outcome.store(PPOMAX_NO_MEMORY);
            return;
        }
        for (int64_t i = begin; i < end; ++i) {
            const int64_t n = i / kv_heads, g = i % kv_heads, position = positions[n];
            AttentionRow row;
            row.key_pages = element_at(key_pages, dtype, g * key_page);
            row.value_pages = element_at(value_pages, dtype, g * value_page);
            row.key_page_stride = kv_heads * key_page;
            row.value_page_stride = kv_heads * value_page;
            row.table = cache.table(n);
            row.first = window && position >= window ? position - window + 1 : 0;
            row.end = position + 1;
            row.heads = group;
            row.key_dim = key_dim;
            row.value_dim = value_dim;
            row.scale = (float)scale;
            row.softcap = (float)softcap;
            row.scores = scratch.get();
            row.query = row.scores + scores;
            row.out = row.query + queries;
            ops.attend(row, element_at(query, dtype, n * query_token_stride + g * group * query_head_stride),
                       query_head_stride, dtype,
                       const_cast<void *>(element_at(out, dtype, (n * heads + g * group) * value_dim)));
        }
    };
    // About one nanosecond for every 16 multiplications, and some for each softmax.
    parallel_for(threads, tokens * kv_heads, chunk_for(100 + read / tokens * group * (key_dim + value_dim) / 16, DENSE),
                 body);
    return outcome.load();
}
