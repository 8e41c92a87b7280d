// Whether the CUDA kernels are in this library, and if not, why: asked by `python -m ppomax_kernels`. Compiled in any
// case.
#include "../ppomax_kernels.h"

extern "C" int ppomax_cuda_built(void) { return PPOMAX_CUDA_BUILT; }

extern "C" const char *ppomax_cuda_note(void) { return PPOMAX_CUDA_NOTE; }
