// Rotary position embedding of heads, in fp32.
#pragma once

#include "convert.h"
#include "vec.h"

namespace ppomax {
namespace PPOMAX_NS {

// One head of `dim` elements, the two halves of which turn into each other: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; or
// with `back` what takes a gradient of y to one of x: y1 = x1 c1 + x2 s2, y2 = x2 c2 - x1 s1.
static void rotate_head(const float *x, const float *cosine, const float *sine, int64_t dim, int back, float *y) {
    const int64_t half = dim / 2;
    const float *c2 = cosine + half, *s2 = sine + half;
    const float *a = back ? s2 : sine, *b = back ? sine : s2;
    const float turn = back ? 1.0f : -1.0f;
    int64_t i = 0;
    for (; i + WIDTH <= half; i += WIDTH) {
        const Vec x1 = load(x + i), x2 = load(x + half + i);
        store(y + i, x1 * load(cosine + i) + turn * x2 * load(a + i));
        store(y + half + i, x2 * load(c2 + i) - turn * x1 * load(b + i));
    }
    for (; i < half; ++i) {
        const float x1 = x[i], x2 = x[half + i];
        y[i] = x1 * cosine[i] + turn * x2 * a[i];
        y[half + i] = x2 * c2[i] - turn * x1 * b[i];
    }
}

// The same of a head of any dtype at x[at], with the angles at cosine[angle] and sine[angle], in fp32 and rounded once
// into y[to]; 16-bit heads of at most BLOCK elements.
static void rotate_typed(TypedArray x, int64_t at, TypedArray cosine, TypedArray sine, int64_t angle, int64_t dim,
                         int back, void *y, int64_t to) {
    if (x.dtype == PPOMAX_FP32)
        return rotate_head((const float *)x.data + at, (const float *)cosine.data + angle,
                           (const float *)sine.data + angle, dim, back, (float *)y + to);
    float head[BLOCK], c[BLOCK], s[BLOCK], out[BLOCK];
    const int n = (int)dim;
    rotate_head(as_floats(x, at, n, head), as_floats(cosine, angle, n, c), as_floats(sine, angle, n, s), dim, back,
                out);
    put_floats(out, n, y, x.dtype, to);
}

// y[at + i] = a[at + i] + b[at + i] for n elements of one dtype, rounded once; y may be b.
static void add_typed(TypedArray a, TypedArray b, int64_t at, int64_t n, void *y) {
    float left[BLOCK], right[BLOCK], sum[BLOCK];
    for (int64_t first = 0; first < n; first += BLOCK) {
        const int some = block_from(first, n);
        const float *x = as_floats(a, at + first, some, left), *z = as_floats(b, at + first, some, right);
        for (int i = 0; i < some; ++i) sum[i] = x[i] + z[i];
        put_floats(sum, some, y, a.dtype, at + first);
    }
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
