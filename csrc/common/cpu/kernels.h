// How a kernel family declares its CPU kernels, one table of functions per instruction set, and finds the one in use.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../numeric.h"

// The position of the instruction set in use: 0 baseline, 1 AVX2, 2 AVX-512.
int current_isa_index();

#if defined(__x86_64__) || defined(__i386__)
#define OPD_DECLARE_KERNELS(Type, name)         \
  namespace baseline { extern const Type name; } \
  namespace avx2 { extern const Type name; }     \
  namespace avx512 { extern const Type name; }
#define OPD_KERNELS(name) select_kernels({&baseline::name, &avx2::name, &avx512::name})
#else
#define OPD_DECLARE_KERNELS(Type, name) \
  namespace baseline { extern const Type name; }
#define OPD_KERNELS(name) select_kernels({&baseline::name})
#endif

template <class Table, int N>
const Table& select_kernels(const Table* const (&tables)[N]) { return *tables[current_isa_index()]; }
