// A read of a whole buffer and nothing else: what memory gives, to hold the ops against.
#include <string.h>

#include <atomic>

#include "../ppomax_kernels.h"
#include "parallel.h"

namespace {

constexpr int64_t PART = 1 << 18;  // bytes of one piece of work
constexpr int WORDS = 16;          // read in one step, each into a sum of its own

uint64_t sum_of(const char *data, int64_t bytes) {
    uint64_t sum[WORDS] = {}, words[WORDS];
    for (int64_t at = 0; at + int64_t(sizeof words) <= bytes; at += sizeof words) {
        memcpy(words, data + at, sizeof words);
        for (int j = 0; j < WORDS; ++j) sum[j] += words[j];
    }
    for (int j = 1; j < WORDS; ++j) sum[0] += sum[j];
    return sum[0];
}

}  // namespace

extern "C" uint64_t ppomax_stream_read(const void *data, int64_t bytes, int threads) {
    const char *from = static_cast<const char *>(data);
    std::atomic<uint64_t> total{0};
    auto body = [&](int64_t begin, int64_t end) {
        total += sum_of(from + begin * PART, (end == bytes / PART ? bytes : end * PART) - begin * PART);
    };
    ppomax::parallel_for(threads, bytes / PART, 1, body);
    return total;
}
