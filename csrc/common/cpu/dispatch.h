#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

// Instruction sets this processor and this build offer, least first; the one in use is the last unless OPDKERNELS_ISA or use_isa says otherwise.
std::vector<std::string> available_isas();
std::string current_isa();
void use_isa(const std::string& name);  // throws std::invalid_argument
const Kernels& kernels();
int element_bytes(int dtype);

// Adds a pair's counts to the output. tables: int64 [5 + n_cuts][32768] source, delta, trained, moved, stored, changed by cut.
// counts: numel, nonfinite, bit_equal, eta_unchanged, lt[5], le[5], ulp[35]. sums: int64 [4][OPD_SUM_LIMBS].
void delta(const void* source, int source_dtype, const void* trained, int trained_dtype, int64_t n, const DeltaOptions& options,
           int threads, int64_t* tables, int64_t* counts, int64_t* sums, double* maximum, unsigned char* mask);

// Adds a source's and its runs' counts to the output, int64: source [32768], changed [runs][32768], both [runs][runs],
// exactly [runs + 1] (coordinates changed in exactly j runs), counts [2] numel and nonfinite.
void overlap(const void* source, int source_dtype, const std::vector<const void*>& trained, const std::vector<int>& trained_dtypes,
             int64_t n, int cut, int threads, int64_t* source_table, int64_t* changed, int64_t* both, int64_t* exactly, int64_t* counts);

// Adds W^T W, W^T delta and delta^T delta of row blocks [rows, n], those whose bit 1, 2, 4 `parts` has, to into [parts][n][n], of
// the symmetric ones the upper triangles;
// `block` rows of W^T delta are summed in fp32 before they are in fp64, 0: all in fp64.
void gram(const GramInput& input, int64_t rows, int64_t n, int parts, bool visible, int block, int threads, double* into);

// One masked step of all tensors, or a gather or a scatter of theirs (options.kind).
void masked_step(const StepRow* rows, int64_t count, const StepOptions& options, int threads);

struct QuantileResult {
  double cut;                                         // NaN where every value is
  int64_t above, tied, above_masked, tied_masked, nan;
};
// The k-th largest or smallest magnitude for each k, and what lies beyond and at it. results: one for each k.
void quantile(const void* values, int dtype, int64_t n, const std::vector<int64_t>& k, bool largest, const unsigned char* mask, int threads,
              QuantileResult* results);

// Gathers what changed in n coordinates of `bytes` bytes, block by block. counts: [blocks]; positions and values: room for (n + 7) / 8
// bytes and for n values, of which the first are used; digests: [2][blocks][2] of source and trained.
void patch_gather(const void* source, const void* trained, int bytes, int64_t n, bool difference, int threads, int32_t* counts,
                  unsigned char* positions, void* values, uint64_t* digests);
// -1, or the first block whose count or positions are not valid, or the number of blocks where the lengths are not what the counts say.
int64_t patch_check(const int32_t* counts, const unsigned char* positions, int64_t position_bytes, int64_t n, int64_t n_values, int threads);
// Puts source and changes together in out, which may be source. Returns as patch_check; unless -1, out holds nothing of use.
int64_t patch_scatter(const void* source, int bytes, int64_t n, bool difference, const int32_t* counts, const unsigned char* positions,
                      int64_t position_bytes, const void* values, int64_t n_values, int threads, void* out, uint64_t* digests);
// digests: [blocks][2].
void patch_digest(const void* data, int bytes, int64_t n, int threads, uint64_t* digests);
