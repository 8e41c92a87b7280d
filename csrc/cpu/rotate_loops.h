// Rotary position embedding of heads, in fp32.
#pragma once

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

}  // namespace PPOMAX_NS
}  // namespace ppomax
