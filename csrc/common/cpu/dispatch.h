#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

// Instruction sets of this processor and this build, least capable first. The last one is used unless OPDKERNELS_ISA or
// use_isa names another.
std::vector<std::string> available_isas();
std::string current_isa();
void use_isa(const std::string& name);  // throws std::invalid_argument
const Kernels& kernels();

// Adds the counts of a pair to the outputs. base, trained: [n]; tables: int64 [HIST_BASE_OVER +
// n_thresholds][OPD_BINS]; counts: int64 [NUM_COUNTS]; sums: int64 [NUM_SUMS][OPD_SUM_LIMBS]; maximum: [1]; mask: [(n +
// 7) / 8], overwritten, or null.
void delta(const void* base, int base_dtype, const void* trained, int trained_dtype, int64_t n,
           const DeltaOptions& options,
           int threads, int64_t* tables, int64_t* counts, int64_t* sums, double* maximum, unsigned char* mask);

// Adds the counts of a base and its runs to the outputs, int64: hist_base [OPD_BINS], hist_changed [runs][OPD_BINS],
// both [runs][runs], hist_num_runs [runs + 1] (coordinates that exactly j runs changed), counts [OVERLAP_NUM_COUNTS].
void overlap(const void* base, int base_dtype, const std::vector<const void*>& trained,
             const std::vector<int>& trained_dtypes, int64_t n, int threshold_bits, int threads, int64_t* hist_base,
             int64_t* hist_changed, int64_t* both, int64_t* hist_num_runs, int64_t* counts);

// Adds W^T W, W^T delta and delta^T delta of row blocks [rows][n], those whose GramPart bit is set in `parts`, to out
// [number of parts][n][n]; of the symmetric ones only the upper triangles. `block` rows of W^T delta are summed in fp32
// before they are added in fp64; 0: everything in fp64.
void gram(const GramInput& input, int64_t rows, int64_t n, int parts, bool visible, int block, int threads,
          double* out);

// One masked step of all tensors, or a gather or a scatter of theirs (options.kind). row_bytes is the size of a row for
// the caller. Throws std::invalid_argument for a table that no kernel can serve; nothing has changed then.
void masked_step(const StepRow* rows, int64_t count, int64_t row_bytes, const StepOptions& options,
                 int64_t num_scalar_rows, int threads);

struct QuantileResult {
  double threshold;                                   // NaN if every value is
  int64_t above, tied, above_masked, tied_masked, nan;
};
// The k-th largest or smallest magnitude for each k, and the counts of values beyond it and tied with it. values: [n];
// mask: [(n + 7) / 8] or null; results: one for each k.
void quantile(const void* values, int dtype, int64_t n, const std::vector<int64_t>& k, bool largest,
              const unsigned char* mask, int threads, QuantileResult* results);

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
