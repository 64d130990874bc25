// Every CPU loop, compiled with the flags of one instruction set (setup.py), in its own namespace: an inline function
// that the sets shared could be linked in its AVX-512 version and crash an older machine.
#if defined(__AVX512VBMI2__)
#define OPD_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__)
#define OPD_AVX2 1
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define OPD_PRAGMA(x) _Pragma(#x)
#define OPD_SIMD(...) OPD_PRAGMA(omp simd __VA_ARGS__)

#include "../../delta/cpu.inl"
#include "../../overlap/cpu.inl"
#include "../../quantile/cpu.inl"
#include "../../gram/cpu.inl"
#include "../../patch/cpu.inl"
#include "../../step/cpu.inl"
#include "../../null/cpu.inl"
