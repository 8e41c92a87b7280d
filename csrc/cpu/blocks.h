// Reductions over tokens that do not depend on the thread count: partial results of fixed blocks, combined in the order
// of the blocks.
#pragma once

#include <memory>
#include <new>

#include "parallel.h"

namespace ppomax {

constexpr int64_t REDUCTION_BLOCK = 1024;  // as BLOCK in convert.h: what the loops take at once

// compute(at, count, &part) for each block, on several threads; then combine(part) for each in order. False if out of
// memory.
template <class Part, class Compute, class Combine>
bool over_blocks(int threads, int64_t n, const Compute &compute, const Combine &combine) {
    constexpr int64_t ON_STACK = 64;
    const int64_t blocks = (n + REDUCTION_BLOCK - 1) / REDUCTION_BLOCK;
    Part few[ON_STACK];
    std::unique_ptr<Part[]> many(blocks > ON_STACK ? new (std::nothrow) Part[(size_t)blocks] : nullptr);
    if (blocks > ON_STACK && !many) return false;
    Part *parts = many ? many.get() : few;
    auto body = [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t at = b * REDUCTION_BLOCK;
            compute(at, n - at < REDUCTION_BLOCK ? n - at : REDUCTION_BLOCK, parts + b);
        }
    };
    parallel_for(threads, blocks, chunk_for(REDUCTION_BLOCK), body);
    for (int64_t b = 0; b < blocks; ++b) combine(parts[b]);
    return true;
}

}  // namespace ppomax
