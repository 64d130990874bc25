// The CPU kernels of `patch`: their functions for one thread, which each instruction set defines, and for callers.
#pragma once
#include "../common/cpu/kernels.h"
#include "patch.h"

struct PatchKernels {
  // Gathers one block of n coordinates of `bytes` bytes: its positions, stored values and the digests of base and
  // trained; values must have a capacity of n. Returns the number of changed coordinates.
  int (*gather)(const void* base, const void* trained, int bytes, int n, int difference, unsigned char* positions,
                void* values, opd_u64* base_digest, opd_u64* trained_digest);
  // Restores one block and computes its digest; `readable` values can be read. Returns 0 if the positions are invalid.
  int (*scatter)(const void* base, int bytes, int n, int difference, int count, const unsigned char* positions,
                 const void* values, opd_i64 readable, void* out, opd_u64* digest);
  // Whether the positions of a block are valid.
  int (*check)(const unsigned char* positions, int count, int n);
  // The digest of a block of so many bytes.
  void (*digest)(const void* data, int bytes, opd_u64* digest);
};
OPD_DECLARE_KERNELS(PatchKernels, patch_kernels)

// Gathers the changes of n coordinates of `bytes` bytes, block by block. counts: [blocks]; positions: capacity of
// (n + 7) / 8 bytes; values: capacity of n values; the first elements of both are used; digests: [2][blocks][2] of base
// and trained.
void patch_gather(const void* base, const void* trained, int bytes, int64_t n, bool difference, int threads,
                  int32_t* counts, unsigned char* positions, void* values, uint64_t* digests);
// Returns -1, the first block with an invalid count or position, or the number of blocks if the lengths do not match
// the counts.
int64_t patch_check(const int32_t* counts, const unsigned char* positions, int64_t position_bytes, int64_t n,
                    int64_t n_values, int threads);
// Combines base and changes in out, which may be base. Returns as patch_check; unless it is -1, out is undefined.
int64_t patch_scatter(const void* base, int bytes, int64_t n, bool difference, const int32_t* counts,
                      const unsigned char* positions, int64_t position_bytes, const void* values, int64_t n_values,
                      int threads, void* out, uint64_t* digests);
// digests: [blocks][2].
void patch_digest(const void* data, int bytes, int64_t n, int threads, uint64_t* digests);
