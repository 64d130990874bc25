// What the library of CUDA kernels reports: its CUDA version, the text of errors, the digest of its sources.
#include <cuda_runtime.h>

extern "C" int opd_cuda_major() { return CUDART_VERSION / 1000; }
extern "C" const char* opd_cuda_error(int status) { return cudaGetErrorString((cudaError_t)status); }
// The build defines OPD_SOURCES (opdkernels/backends/cuda/sources.py).
extern "C" const char* opd_cuda_sources() { return OPD_SOURCES; }
