// Philox4x32-10, a counter-based stream: the draw of a row depends on its seed and position alone.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include "portable.h"

namespace ppomax {
namespace PPOMAX_NS {

// First of the four words for key = seed, counter = (position, 0).
PPOMAX_INLINE uint32_t philox_word(uint64_t seed, uint64_t position) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)b;
        c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

// Uniform in (0, 1), 24 bits, never 0 or 1. Double, since 2^24 - 0.5 rounds to 2^24 in fp32.
PPOMAX_INLINE double philox_uniform(uint64_t seed, uint64_t position) {
    return ((double)(philox_word(seed, position) >> 8) + 0.5) * (1.0 / 16777216.0);
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
