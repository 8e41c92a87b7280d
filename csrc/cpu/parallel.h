// Loops over independent items on a few threads that sleep between calls.
#pragma once

#include <stdint.h>

namespace ppomax {

// body(context, begin, end) over [0, items) in chunks of `chunk`, on at most `threads` threads, the calling one
// included. Returns when all is done. One chunk, one thread, or a pool that serves another caller: the calling thread
// does everything. `body` must not throw.
void parallel_chunks(int threads, int64_t items, int64_t chunk, void (*body)(void *, int64_t, int64_t), void *context);

template <class Body>
void parallel_for(int threads, int64_t items, int64_t chunk, Body &body) {
    parallel_chunks(
        threads, items, chunk,
        [](void *context, int64_t begin, int64_t end) { (*static_cast<Body *>(context))(begin, end); }, &body);
}

// Chunk of items that each cost `cost` (about nanoseconds), so that a chunk is worth waking a thread for: waking costs
// some 10 us, and on a busy machine a thread that was woken may lose its core for milliseconds with the chunk in its
// hands. Calls that come densely, as those of a decoding loop do, find the threads awake: DENSE is worth a chunk there.
constexpr int64_t ALONE = 100000, DENSE = 12000;

inline int64_t chunk_for(int64_t cost, int64_t worth = ALONE) {
    return cost >= worth ? 1 : worth / (cost < 1 ? 1 : cost);
}

}  // namespace ppomax
