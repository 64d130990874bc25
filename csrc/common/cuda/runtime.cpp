// What the library of CUDA kernels says of itself and of its errors.
#include <cuda_runtime.h>

extern "C" int opd_cuda_major() { return CUDART_VERSION / 1000; }
extern "C" const char* opd_cuda_error(int status) { return cudaGetErrorString((cudaError_t)status); }
extern "C" const char* opd_cuda_sources() { return OPD_SOURCES; }  // their digest, of the build: opdkernels/backends/cuda/sources.py
