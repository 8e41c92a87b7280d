// One decoder block of a rollout in one call: what the ops beside it do one by one, without what a caller spends
// between them.
#include <string.h>

#include "arguments.h"
#include "parallel.h"

using namespace ppomax;

namespace {

// One float array of scratch after the other.
struct Scratch {
    float *next;

    float *take(int64_t floats) {
        float *taken = next;
        next += floats;
        return taken;
    }
};

void norm_rows(const VectorOps &ops, const float *x, int64_t rows, int64_t width, const ppomax_norm &norm, float *y) {
    ops.rms_norm({x, PPOMAX_FP32}, 0, rows, width, {norm.weight, PPOMAX_FP32}, (float)norm.offset, norm.eps, y);
}

}  // namespace

extern "C" int64_t ppomax_decode_block_scratch(const ppomax_block *b, int64_t rows) {
    const int64_t heads = b->heads + b->kv_heads;
    return rows * (b->hidden + (2 * heads + b->kv_heads + b->heads) * b->dim + 3 * b->inner);
}

extern "C" int ppomax_decode_block_cpu(const ppomax_block *b, const float *x, int64_t rows, const float *cosine,
                                       const float *sine, float *key_pages, float *value_pages, int64_t pages,
                                       const int32_t *tables, int64_t sequences, int64_t blocks,
                                       const int32_t *sequence_of, const int32_t *positions, double scale,
                                       int64_t window, double softcap, float *scratch, float *y, int threads) {
    if (!b) return PPOMAX_BAD_POINTER;
    if (rows < 0 || b->hidden < 1 || b->heads < 1 || b->kv_heads < 1 || b->inner < 1) return PPOMAX_BAD_SIZE;
    if (b->dim < 2 || b->dim % 2) return PPOMAX_BAD_SIZE;
    if (rows == 0) return PPOMAX_OK;
    if (!x || !cosine || !sine || !scratch || !y || !b->before_attention.weight || !b->before_mlp.weight)
        return PPOMAX_BAD_POINTER;
    const VectorOps &ops = vector_ops();
    const int64_t hidden = b->hidden, dim = b->dim, heads = b->heads, turning = heads + b->kv_heads,
                  all = turning + b->kv_heads, inner = b->inner;
    Scratch room = {scratch};
    float *normed = room.take(rows * hidden), *every = room.take(rows * all * dim),
          *turned = room.take(rows * turning * dim), *attended = room.take(rows * heads * dim),
          *gated = room.take(rows * 2 * inner), *mixed = room.take(rows * inner);
    int status = PPOMAX_OK;
    auto product = [&](const float *of, const ppomax_panels &by, int64_t inputs, int64_t outputs, float *to) {
        if (status == PPOMAX_OK)
            status = ppomax_packed_linear_cpu(of, PPOMAX_FP32, rows, inputs, inputs, 1, by.panels, by.bias, outputs, 0,
                                              to, threads);
    };
    // each(row) for all rows, some `cost` nanoseconds of work in each.
    auto for_rows = [&](int64_t cost, auto each) {
        auto body = [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) each(r);
        };
        parallel_for(threads, rows, chunk_for(cost, DENSE), body);
    };

    for_rows(hidden / 4,
             [&](int64_t r) { norm_rows(ops, x + r * hidden, 1, hidden, b->before_attention, normed + r * hidden); });
    product(normed, b->qkv, hidden, all * dim, every);
    for_rows(turning * dim / 2, [&](int64_t r) {
        float *row = every + r * all * dim;
        if (b->of_query.weight) norm_rows(ops, row, heads, dim, b->of_query, row);
        if (b->of_key.weight) norm_rows(ops, row + heads * dim, b->kv_heads, dim, b->of_key, row + heads * dim);
        for (int64_t h = 0; h < turning; ++h)
            ops.rotate_head(row + h * dim, cosine + r * dim, sine + r * dim, dim, 0, turned + (r * turning + h) * dim);
    });
    if (status == PPOMAX_OK)
        status = ppomax_paged_attention_cpu(turned, turning * dim, dim, turned + heads * dim, turning * dim, dim,
                                            every + turning * dim, all * dim, dim, PPOMAX_FP32, rows, heads,
                                            b->kv_heads, dim, dim, key_pages, value_pages, pages, tables, sequences,
                                            blocks, sequence_of, positions, scale, window, softcap, attended, threads);
    product(attended, b->out, heads * dim, hidden, y);
    for_rows(hidden / 2, [&](int64_t r) {
        float *sum = y + r * hidden;
        for (int64_t i = 0; i < hidden; ++i) sum[i] = x[r * hidden + i] + sum[i];
        norm_rows(ops, sum, 1, hidden, b->before_mlp, normed + r * hidden);
    });
    product(normed, b->gate_up, hidden, 2 * inner, gated);
    for_rows(inner / 2,
             [&](int64_t r) { ops.silu_mul({gated + r * 2 * inner, PPOMAX_FP32}, 0, 1, inner, mixed + r * inner); });
    product(mixed, b->down, inner, hidden, normed);
    for_rows(hidden / 8, [&](int64_t r) {
        for (int64_t i = 0; i < hidden; ++i) y[r * hidden + i] += normed[r * hidden + i];
    });
    return status;
}
