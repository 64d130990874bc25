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
#include "kernels.h"

#define OPD_PRAGMA(x) _Pragma(#x)
#define OPD_SIMD(...) OPD_PRAGMA(omp simd __VA_ARGS__)
#define OPD_JOIN_(a, b) a##b
#define OPD_JOIN(a, b) OPD_JOIN_(a, b)

namespace OPD_ISA {
#include "exact_sum.inl"
#include "../../delta/cpu.inl"
#include "../../overlap/cpu.inl"
#include "../../quantile/cpu.inl"
#include "../../gram/cpu.inl"
#include "../../patch/cpu.inl"
#include "../../step/cpu.inl"
static const Kernels table = {delta, overlap, quantile_scan, quantile_narrow, quantile_table,
                              gram_pack, gram_columns, 3 * OPD_GRAM_BYTES, step_block, step_check,
                              patch_gather, patch_scatter, patch_check, patch_digest};
}  // namespace OPD_ISA

const Kernels* OPD_JOIN(kernels_, OPD_ISA)() { return &OPD_ISA::table; }
