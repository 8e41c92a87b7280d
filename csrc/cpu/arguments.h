// What every entry point checks before it touches memory.
#pragma once

#include <stdint.h>

#include "../ppomax_kernels.h"
#include "vector_ops.h"

namespace ppomax {

inline bool known_dtype(int dtype) { return dtype == PPOMAX_FP32 || dtype == PPOMAX_BF16 || dtype == PPOMAX_FP16; }

inline bool known_estimator(int estimator) { return estimator >= PPOMAX_K1 && estimator <= PPOMAX_KABS; }

inline bool finite(double x) { return x - x == 0.0; }

inline int64_t bytes_of(int dtype) { return dtype == PPOMAX_FP32 ? 4 : 2; }

inline const void *element_at(const void *data, int dtype, int64_t at) {
    return static_cast<const char *>(data) + at * bytes_of(dtype);
}

// 1 / *normalizer, or 1 / norm_value, or 1 / tokens; 0 if there is nothing to divide by.
inline float scale_of(const float *normalizer, double norm_value, double tokens) {
    const float total = normalizer ? *normalizer : (float)(norm_value > 0.0 ? norm_value : tokens);
    return total > 0.0f ? 1.0f / total : 0.0f;
}

// 0 = cu_seqlens[0] < ... < cu_seqlens[sequences] = tokens
inline int check_seqlens(const int32_t *cu_seqlens, int64_t sequences, int64_t tokens) {
    if (cu_seqlens[0] != 0 || cu_seqlens[sequences] != tokens) return PPOMAX_BAD_SEQLENS;
    for (int64_t s = 0; s < sequences; ++s)
        if (cu_seqlens[s + 1] <= cu_seqlens[s]) return PPOMAX_BAD_SEQLENS;
    return PPOMAX_OK;
}

}  // namespace ppomax
