// One decoder block of a rollout in one call: what the ops beside it do one by one, without what a caller spends
// between them.
#include <string.h>

#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

namespace {

constexpr int64_t WIDEST_HALF_HEAD = 1024;  // BLOCK of convert.h

// One array of scratch after the other, all of one dtype.
struct Scratch {
    char *next;
    int dtype;

    void *take(int64_t elements) {
        void *taken = next;
        next += elements * bytes_of(dtype);
        return taken;
    }
};

void *place(void *data, int dtype, int64_t at) { return const_cast<void *>(element_at(data, dtype, at)); }

}  // namespace

extern "C" int64_t ppomax_decode_block_scratch(const ppomax_block *b, int64_t rows) {
    const int64_t heads = b->heads + b->kv_heads;
    return rows * (b->hidden + (2 * heads + b->kv_heads + b->heads) * b->dim + 3 * b->inner);
}

extern "C" int ppomax_decode_block_cpu(const ppomax_block *b, const void *x, int dtype, int64_t rows,
                                       const void *cosine, const void *sine, void *key_pages, void *value_pages,
                                       int64_t pages, const int32_t *tables, int64_t sequences, int64_t blocks,
                                       const int32_t *sequence_of, const int32_t *positions, double scale,
                                       int64_t window, double softcap, void *scratch, void *y, int threads) {
    if (!b) return PPOMAX_BAD_POINTER;
    if (dtype != PPOMAX_FP32 && dtype != PPOMAX_BF16) return PPOMAX_BAD_DTYPE;
    if (rows < 0 || b->hidden < 1 || b->heads < 1 || b->kv_heads < 1 || b->inner < 1) return PPOMAX_BAD_SIZE;
    if (b->dim < 2 || b->dim % 2 || (dtype != PPOMAX_FP32 && b->dim > WIDEST_HALF_HEAD)) return PPOMAX_BAD_SIZE;
    if (rows == 0) return PPOMAX_OK;
    if (!x || !cosine || !sine || !scratch || !y || !b->before_attention.weight || !b->before_mlp.weight)
        return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    const int64_t hidden = b->hidden, dim = b->dim, heads = b->heads, turning = heads + b->kv_heads,
                  all = turning + b->kv_heads, inner = b->inner;
    Scratch room = {(char *)scratch, dtype};
    void *normed = room.take(rows * hidden), *every = room.take(rows * all * dim),
         *turned = room.take(rows * turning * dim), *attended = room.take(rows * heads * dim),
         *gated = room.take(rows * 2 * inner), *mixed = room.take(rows * inner);
    int status = PPOMAX_OK;
    auto norm = [&](const void *of, int64_t first, int64_t count, int64_t width, const ppomax_norm &by, void *to) {
        ops.rms_norm({of, dtype}, first, count, width, {by.weight, dtype}, (float)by.offset, by.eps, to);
    };
    auto product = [&](const void *of, const ppomax_panels &by, int64_t inputs, int64_t outputs, void *to) {
        if (status == PPOMAX_OK)
            status = ppomax_packed_linear_cpu(of, dtype, rows, inputs, inputs, 1, by.panels, by.bias, outputs, 0, to,
                                              threads);
    };
    // each(row) for all rows, some `cost` nanoseconds of work in each.
    auto for_rows = [&](int64_t cost, auto each) {
        auto body = [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) each(r);
        };
        parallel_for(threads, rows, chunk_for(cost, DENSE), body);
    };

    for_rows(hidden / 4, [&](int64_t r) { norm(x, r, 1, hidden, b->before_attention, normed); });
    product(normed, b->qkv, hidden, all * dim, every);
    for_rows(turning * dim / 2, [&](int64_t r) {
        void *query = place(every, dtype, r * all * dim), *key = place(query, dtype, heads * dim);
        if (b->of_query.weight) norm(query, 0, heads, dim, b->of_query, query);
        if (b->of_key.weight) norm(key, 0, b->kv_heads, dim, b->of_key, key);
        for (int64_t h = 0; h < turning; ++h)
            ops.rotate_head({query, dtype}, h * dim, {cosine, dtype}, {sine, dtype}, r * dim, dim, 0, turned,
                            (r * turning + h) * dim);
    });
    if (status == PPOMAX_OK)
        status = ppomax_paged_attention_cpu(turned, turning * dim, dim, element_at(turned, dtype, heads * dim),
                                            turning * dim, dim, element_at(every, dtype, turning * dim), all * dim, dim,
                                            dtype, rows, heads, b->kv_heads, dim, dim, key_pages, value_pages, pages,
                                            tables, sequences, blocks, sequence_of, positions, scale, window, softcap,
                                            attended, threads);
    product(attended, b->out, heads * dim, hidden, y);
    for_rows(hidden / 2, [&](int64_t r) {
        ops.add({x, dtype}, {y, dtype}, r * hidden, hidden, y);
        norm(y, r, 1, hidden, b->before_mlp, normed);
    });
    product(normed, b->gate_up, hidden, 2 * inner, gated);
    for_rows(inner / 2, [&](int64_t r) { ops.silu_mul({gated, dtype}, r, 1, inner, mixed); });
    product(mixed, b->down, inner, hidden, normed);
    for_rows(hidden / 8, [&](int64_t r) { ops.add({y, dtype}, {normed, dtype}, r * hidden, hidden, y); });
    return status;
}
