// The last CUDA error of this thread, and what the library was built for.
#include "../ppomax_kernels.h"
#include "device.cuh"

namespace ppomax {
namespace {
thread_local cudaError_t last_error = cudaSuccess;
}

int launched() {
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return PPOMAX_OK;
    last_error = error;
    return PPOMAX_CUDA_ERROR;
}
}  // namespace ppomax

extern "C" const char *ppomax_cuda_error(void) { return cudaGetErrorString(ppomax::last_error); }
