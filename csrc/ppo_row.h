// One token of the clipped policy loss. w = e^u, u = clamp(logprob - old, +-20):
// max(-A*w, -A*clip(w, 1-low, 1+high)), for A < 0 and dual > 0 at most -A*dual. Sources: arXiv 1707.06347; dual clip arXiv 1912.09729.
#pragma once

#include "portable.h"

namespace ppomax {
namespace PPOMAX_NS {

struct PpoTerm {
    float loss;       // before the importance weight
    float slope;      // d loss / d logprob
    float ratio;      // w
    float approx_kl;  // (w - 1) - log w
    float clipped;    // 1 if the clip decided
    float dual;       // 1 if the dual clip decided
};

PPOMAX_INLINE PpoTerm ppo_term(float logprob, float old_logprob, float advantage, float low, float high, float dual_clip) {
    PpoTerm term;
    const float u = logprob - old_logprob;
    const float inner = clamp(u, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT);
    const float growth = expm1_of(inner);
    term.ratio = growth + 1.0f;
    term.ratio = inner < -1.0f ? exp_of(inner) : term.ratio;  // w - 1 + 1 would lose a small ratio's digits
    term.approx_kl = growth - inner;
    const float plain = -advantage * term.ratio;
    const float bounded = -advantage * clamp(term.ratio, 1.0f - low, 1.0f + high);
    const bool was_clipped = bounded > plain;  // at the edges the two are equal and the plain branch decides
    float loss = was_clipped ? bounded : plain;
    const float ceiling = -advantage * dual_clip;
    const bool was_dual = (dual_clip > 0.0f) & (advantage < 0.0f) & (loss > ceiling);
    loss = was_dual ? ceiling : loss;
    const bool outside = (u < -LOG_RATIO_LIMIT) | (u > LOG_RATIO_LIMIT);
    term.loss = loss;
    term.slope = was_clipped | was_dual | outside ? 0.0f : plain;
    term.clipped = was_clipped ? 1.0f : 0.0f;
    term.dual = was_dual ? 1.0f : 0.0f;
    return term;
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
