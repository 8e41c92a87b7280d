// One token of the clipped policy loss. w = e^u, u = clamp(logprob - old, +-20):
// max(-A*w, -A*clip(w, 1-low, 1+high)), for A < 0 and dual > 0 at most -A*dual. Sources: arXiv 1707.06347; dual clip
// arXiv 1912.09729.
#pragma once

#include <math.h>

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

PPOMAX_INLINE PpoTerm ppo_term(float logprob, float old_logprob, float advantage, float low, float high,
                               float dual_clip) {
    PpoTerm term;
    const float u = logprob - old_logprob;
    const float inner = clamp(u, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT);
    float growth;
    exp_pair(inner, &term.ratio, &growth);
    term.approx_kl = growth - inner;
    const float plain = -advantage * term.ratio;
    const float bounded = -advantage * clamp(term.ratio, 1.0f - low, 1.0f + high);
    // Selects one after another, not conditions joined by | and &: those leave the vector registers.
    float loss = plain, slope = plain;
    term.clipped = bounded > plain ? 1.0f : 0.0f;  // at the edges the two are equal and the plain branch decides
    slope = bounded > plain ? 0.0f : slope;
    loss = bounded > plain ? bounded : loss;
    float ceiling = -advantage * dual_clip;
    ceiling = advantage < 0.0f ? ceiling : INFINITY;
    ceiling = dual_clip > 0.0f ? ceiling : INFINITY;
    term.dual = loss > ceiling ? 1.0f : 0.0f;
    slope = loss > ceiling ? 0.0f : slope;
    loss = loss > ceiling ? ceiling : loss;
    slope = u < -LOG_RATIO_LIMIT ? 0.0f : slope;
    term.slope = u > LOG_RATIO_LIMIT ? 0.0f : slope;
    term.loss = loss;
    return term;
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
