// Products of bf16 pairs by Intel's tiles (AMX): 16 rows x 16 columns of fp32 sums, 32 inputs at a time. The
// instructions stand here by name, since this file is compiled for processors that lack them, and the system must have
// let the process use the tiles' registers.
#pragma once

#if defined(__AVX512F__) && defined(__x86_64__) && defined(__linux__)
#define PPOMAX_AMX 1

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "convert.h"

namespace ppomax {
namespace PPOMAX_NS {

constexpr int TILE_ROWS = 16, TILE_INPUTS = 32;

// Whether the processor has bf16 tiles and the system grants them, which is asked once.
static inline bool has_tiles() {
    static const bool granted = [] {
        constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
        const bool there = (d >> 22 & 1) && (d >> 24 & 1);
        return there && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }();
    return granted;
}

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3: the sums of up to two blocks of rows, two blocks of columns each. 4 and 5: the rows' inputs. 6 and 7:
// the columns' weights.
static inline void shape_tiles(int upper, int lower) {
    TileShapes shapes;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, TILE_ROWS, TILE_ROWS};
    for (int t = 0; t < 8; ++t) {
        shapes.rows[t] = (uint8_t)rows[t];
        shapes.bytes[t] = rows[t] ? 64 : 0;
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
}

// One step of TILE_INPUTS inputs. Strides in bytes.
template <bool BOTH>
PPOMAX_INLINE void multiply_tiles(const void *upper, const void *lower, int64_t stride, const void *left,
                                  const void *right, int64_t pair_stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm6" ::"r"(left), "r"(pair_stride) : "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(upper), "r"(stride) : "memory");
    asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0" ::: "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm7" ::"r"(right), "r"(pair_stride) : "memory");
    asm volatile("tdpbf16ps %%tmm7, %%tmm4, %%tmm1" ::: "memory");
    if constexpr (BOTH) {
        asm volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(lower), "r"(stride) : "memory");
        asm volatile("tdpbf16ps %%tmm6, %%tmm5, %%tmm2" ::: "memory");
        asm volatile("tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::: "memory");
    }
}

// Up to 32 rows against one panel [inputs / 2][2 TILE_ROWS columns][2]: sums (rows, 2 TILE_ROWS).
template <bool BOTH>
static void sum_by_tiles(const uint16_t *x, int64_t x_stride, int rows, int64_t inputs, const uint16_t *panel,
                         float *sums) {
    constexpr int64_t PAIRS = 2 * TILE_ROWS * 2 * sizeof(uint16_t);  // bytes of a pair of inputs in the panel
    const int upper = rows < TILE_ROWS ? rows : TILE_ROWS;
    asm volatile("tilezero %%tmm0\n tilezero %%tmm1" ::: "memory");
    if constexpr (BOTH) asm volatile("tilezero %%tmm2\n tilezero %%tmm3" ::: "memory");
    const int64_t whole = inputs / TILE_INPUTS * TILE_INPUTS;
    for (int64_t i = 0; i < whole; i += TILE_INPUTS) {
        const char *weights = (const char *)(panel + i * 2 * TILE_ROWS);
        multiply_tiles<BOTH>(x + i, x + upper * x_stride + i, x_stride * 2, weights, weights + 64, PAIRS);
    }
    if (const int64_t left = inputs - whole) {  // filled up with zeros, which add nothing
        alignas(64) uint16_t tail[2 * TILE_ROWS][TILE_INPUTS] = {}, weights[TILE_ROWS][2 * TILE_ROWS * 2] = {};
        for (int r = 0; r < rows; ++r) memcpy(tail[r], x + r * x_stride + whole, (size_t)left * 2);
        memcpy(weights, panel + whole * 2 * TILE_ROWS, (size_t)(left * 2 * TILE_ROWS) * 2);
        multiply_tiles<BOTH>(tail, tail + upper, 64, weights, (const char *)weights + 64, PAIRS);
    }
    const int64_t row = 2 * TILE_ROWS * sizeof(float);
    asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(sums), "r"(row) : "memory");
    asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(sums + TILE_ROWS), "r"(row) : "memory");
    if constexpr (BOTH) {
        asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(sums + 2 * TILE_ROWS * TILE_ROWS), "r"(row) : "memory");
        asm volatile("tilestored %%tmm3, (%0,%1,1)" ::"r"(sums + 2 * TILE_ROWS * TILE_ROWS + TILE_ROWS), "r"(row)
                     : "memory");
    }
}

// As linear_panel_bf16.
static void linear_panel_tiles(const uint16_t *x, int64_t x_stride, int64_t rows, int64_t inputs, const uint16_t *panel,
                               const uint16_t *bias, uint16_t *y, int64_t y_stride, int64_t columns) {
    alignas(64) float sums[2 * TILE_ROWS][2 * TILE_ROWS];
    int shaped = 0;
    for (int64_t first = 0; first < rows; first += 2 * TILE_ROWS) {
        const int count = (int)(rows - first < 2 * TILE_ROWS ? rows - first : 2 * TILE_ROWS);
        if (count != shaped)
            shape_tiles(count < TILE_ROWS ? count : TILE_ROWS, count > TILE_ROWS ? count - TILE_ROWS : 0);
        shaped = count;
        const uint16_t *from = x + first * x_stride;
        if (count > TILE_ROWS)
            sum_by_tiles<true>(from, x_stride, count, inputs, panel, sums[0]);
        else
            sum_by_tiles<false>(from, x_stride, count, inputs, panel, sums[0]);
        for (int r = 0; r < count; ++r) {
            uint16_t *to = y + (first + r) * y_stride;
            for (int64_t c = 0; c < columns; ++c) to[c] = to_bf16(bias ? sums[r][c] + from_bf16(bias[c]) : sums[r][c]);
        }
    }
    asm volatile("tilerelease");
}

}  // namespace PPOMAX_NS
}  // namespace ppomax
#endif
