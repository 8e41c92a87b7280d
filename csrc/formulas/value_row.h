// One token of the clipped value loss: 1/2 * max((V-R)^2, (V_old + clamp(V-V_old, +-clip) - R)^2); clip below 0 is
// none.
#pragma once

#include <math.h>

#include "portable.h"

namespace ppomax {
namespace PPOMAX_NS {

struct ValueTerm {
    float loss;     // twice the loss: the larger square
    float squared;  // (V - R)^2
    float slope;    // d (loss / 2) / d V
    float clipped;  // 1 if the clipped square is the larger one
};

PPOMAX_INLINE ValueTerm value_term(float value, float old_value, float target, float clip) {
    ValueTerm term;
    const float error = value - target;
    term.squared = error * error;
    const float moved = value - old_value;
    const float reach = clip < 0.0f ? INFINITY : clip;
    const float bounded = old_value + clamp(moved, -reach, reach) - target;
    const float squared_bounded = bounded * bounded;
    // Inside the interval the two squares are one number, but old + (V - old) may round away from V: that is not a
    // clip.
    float larger_square = moved < -reach ? squared_bounded : term.squared;
    larger_square = moved > reach ? squared_bounded : larger_square;
    larger_square =
        larger_square > term.squared ? larger_square : term.squared;  // NaN: the plain square, which is NaN too
    term.slope = larger_square > term.squared ? 0.0f : error;
    term.clipped = larger_square > term.squared ? 1.0f : 0.0f;
    term.loss = larger_square;
    return term;
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
