// Which instruction set runs: the best one that machine and build share, looked up once, or one that the process asked
// for.
#include <atomic>

#include "../ppomax_kernels.h"
#include "vector_ops.h"

namespace ppomax {

extern const VectorOps base_ops;
#if defined(PPOMAX_X86)
extern const VectorOps v3_ops, v4_ops;
static const VectorOps *const TABLES[] = {&base_ops, &v3_ops, &v4_ops};
#else
static const VectorOps *const TABLES[] = {&base_ops};
#endif
static const int COUNT = (int)(sizeof TABLES / sizeof TABLES[0]);

static bool machine_has(int isa) {
#if defined(PPOMAX_X86)
    if (isa == PPOMAX_ISA_V3)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == PPOMAX_ISA_V4)
        return machine_has(PPOMAX_ISA_V3) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512cd");
#endif
    return isa == PPOMAX_ISA_BASE;
}

static int best_isa() {
    static const int best = [] {
        int isa = COUNT - 1;
        while (isa > PPOMAX_ISA_BASE && !machine_has(isa)) --isa;
        return isa;
    }();
    return best;
}

static std::atomic<int> forced{PPOMAX_ISA_AUTO};

static int isa_in_use() {
    const int isa = forced.load(std::memory_order_relaxed);
    return isa == PPOMAX_ISA_AUTO ? best_isa() : isa;
}

const VectorOps &vector_ops() { return *TABLES[isa_in_use()]; }

}  // namespace ppomax

extern "C" {

int ppomax_abi_version(void) { return PPOMAX_ABI_VERSION; }

int ppomax_isa(void) { return ppomax::isa_in_use(); }

int ppomax_best_isa(void) { return ppomax::best_isa(); }

const char *ppomax_isa_name(int isa) { return isa >= 0 && isa < ppomax::COUNT ? ppomax::TABLES[isa]->name : nullptr; }

int ppomax_force_isa(int isa) {
    if (isa != PPOMAX_ISA_AUTO && (isa < 0 || isa >= ppomax::COUNT || !ppomax::machine_has(isa))) return PPOMAX_BAD_ISA;
    ppomax::forced.store(isa, std::memory_order_relaxed);
    return PPOMAX_OK;
}

const char *ppomax_status_string(int status) {
    switch (status) {
        case PPOMAX_OK:
            return "success";
        case PPOMAX_BAD_POINTER:
            return "a needed pointer is NULL";
        case PPOMAX_BAD_SIZE:
            return "a size is negative, or a vocabulary is empty";
        case PPOMAX_BAD_DTYPE:
            return "a dtype code that the function does not take";
        case PPOMAX_BAD_SCALAR:
            return "a scalar outside its range";
        case PPOMAX_BAD_LABEL:
            return "a label outside [0, vocab) that is not ignore_index";
        case PPOMAX_BAD_SEQLENS:
            return "cu_seqlens does not run from 0 to the token count, strictly increasing";
        case PPOMAX_BAD_LOGITS:
            return "a row of logits holds NaN or +inf, or nothing but -inf";
        case PPOMAX_NO_MEMORY:
            return "scratch memory could not be allocated";
        case PPOMAX_BAD_ISA:
            return "an instruction set that this machine or build does not have";
        case PPOMAX_BAD_PAGE:
            return "a sequence, position or page outside the arrays";
        case PPOMAX_CUDA_ERROR:
            return "a CUDA call failed";
        default:
            return "unknown status";
    }
}

}  // extern "C"
