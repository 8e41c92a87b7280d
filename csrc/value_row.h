// One token of the clipped value loss: 1/2 * max((V-R)^2, (V_old + clamp(V-V_old, +-clip) - R)^2); clip below 0 is none.
#pragma once

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
    const float bounded = clip < 0.0f ? error : old_value + clamp(moved, -clip, clip) - target;
    const float squared_bounded = bounded * bounded;
    // Inside the interval the two squares are one number, but old + (V - old) may round away from V: that is not a clip.
    const bool inside = (moved >= -clip) & (moved <= clip);
    const bool was_clipped = (squared_bounded > term.squared) & !inside;
    term.loss = was_clipped ? squared_bounded : term.squared;
    term.slope = was_clipped ? 0.0f : error;
    term.clipped = was_clipped ? 1.0f : 0.0f;
    return term;
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
