// The Python interface: addresses and sizes in, counts out, the GIL released. The callers validate devices, dtypes and
// contiguity. Dtypes are codes of `enum Dtype`, strides are in elements.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <vector>

#include "common/cpu/dispatch.h"
#include "common/cpu/mapped.h"
#include "delta/cpu.h"
#include "gram/cpu.h"
#include "overlap/cpu.h"
#include "patch/cpu.h"
#include "quantile/cpu.h"
#include "step/cpu.h"

namespace py = pybind11;

namespace {
template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Python validates the tensors; these refuse what no kernel can serve, whoever calls.
void require(bool holds, const char* requirement) {
  if (!holds) throw std::invalid_argument(requirement);
}
void require_dtypes(int base, int trained) {
  require(base >= BF16 && base <= FP64 && trained >= BF16 && trained <= FP64, "dtypes must be codes of enum Dtype");
}
void require_aligned(uintptr_t address, int dtype) {
  require(address % element_bytes(dtype) == 0, "addresses must be multiples of the size of an element");
}
void require_size(int64_t n, bool has_inputs) {
  require(n >= 0 && (n == 0 || has_inputs), "sizes must not be negative, addresses not null");
}
void require_width(int bytes, int64_t n, std::initializer_list<uintptr_t> addresses) {
  require(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8, "coordinates must have 1, 2, 4 or 8 bytes");
  for (uintptr_t address : addresses) {
    require_size(n, address != 0);
    require(address % bytes == 0, "addresses must be multiples of the size of an element");
  }
}

DeltaOptions delta_options(const std::vector<int>& threshold_bits, const std::vector<double>& thresholds) {
  if (threshold_bits.size() > OPD_MAX_VISIBLE_THRESHOLDS || thresholds.size() != OPD_STORED_THRESHOLDS)
    throw std::invalid_argument("at most 4 threshold_bits, exactly 5 thresholds");
  DeltaOptions options;
  options.n_thresholds = (int)threshold_bits.size();
  for (int i = 0; i < OPD_MAX_VISIBLE_THRESHOLDS; i++)
    options.threshold_bits[i] = i < options.n_thresholds ? threshold_bits[i] : 0x7FFF;
  for (int i = 0; i < OPD_STORED_THRESHOLDS; i++) options.thresholds[i] = thresholds[i];
  return options;
}
}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of opdkernels.";
  m.attr("sum_limbs") = OPD_SUM_LIMBS;
#ifdef __VERSION__
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("available_isas", &available_isas);
  m.def("current_isa", &current_isa);
  m.def("use_isa", &use_isa);
  // base, trained: [n]; tables: int64 [HIST_BASE_OVER + thresholds][OPD_BINS]; counts: int64 [NUM_COUNTS]; sums: int64
  // [NUM_SUMS][OPD_SUM_LIMBS]; maximum: double [1]; mask: uint8 [(n + 7) / 8] or 0.
  m.def("delta", [](uintptr_t base, int base_dtype, uintptr_t trained, int trained_dtype, int64_t n,
                    const std::vector<int>& threshold_bits, const std::vector<double>& thresholds, int threads,
                    uintptr_t tables, uintptr_t counts, uintptr_t sums, uintptr_t maximum, uintptr_t mask) {
    DeltaOptions options = delta_options(threshold_bits, thresholds);
    require_dtypes(base_dtype, trained_dtype);
    require_size(n, base && trained);
    require_aligned(base, base_dtype);
    require_aligned(trained, trained_dtype);
    require(tables && counts && sums && maximum, "outputs must not be null");
    py::gil_scoped_release release;
    delta(pointer<void>(base), base_dtype, pointer<void>(trained), trained_dtype, n, options, threads,
          pointer<int64_t>(tables), pointer<int64_t>(counts), pointer<int64_t>(sums), pointer<double>(maximum),
          pointer<unsigned char>(mask));
  });
  // base, each of trained: [n]; hist_base: int64 [OPD_BINS]; hist_changed: int64 [runs][OPD_BINS]; both: int64
  // [runs][runs]; hist_num_runs: int64 [runs + 1]; counts: int64 [OVERLAP_NUM_COUNTS].
  m.def("overlap", [](uintptr_t base, int base_dtype, const std::vector<uintptr_t>& trained,
                      const std::vector<int>& trained_dtypes, int64_t n, int threshold_bits, int threads,
                      uintptr_t hist_base, uintptr_t hist_changed, uintptr_t both, uintptr_t hist_num_runs,
                      uintptr_t counts) {
    if (trained.empty() || trained.size() > OPD_MAX_RUNS || trained.size() != trained_dtypes.size())
      throw std::invalid_argument("1 to 16 runs, each with its dtype");
    require(threshold_bits >= 0 && threshold_bits < OPD_BINS, "threshold_bits must be a bf16 magnitude");
    require(hist_base && hist_changed && both && hist_num_runs && counts, "outputs must not be null");
    std::vector<const void*> runs;
    for (size_t r = 0; r < trained.size(); r++) {
      require_dtypes(base_dtype, trained_dtypes[r]);
      require_size(n, base && trained[r]);
      require_aligned(base, base_dtype);
      require_aligned(trained[r], trained_dtypes[r]);
      runs.push_back(pointer<void>(trained[r]));
    }
    py::gil_scoped_release release;
    overlap(pointer<void>(base), base_dtype, runs.data(), trained_dtypes.data(), (int)runs.size(), n, threshold_bits,
            threads, pointer<int64_t>(hist_base), pointer<int64_t>(hist_changed), pointer<int64_t>(both),
            pointer<int64_t>(hist_num_runs), pointer<int64_t>(counts));
  });
  // values: [n]; mask: uint8 [(n + 7) / 8] or 0; thresholds: double [K]; counts: int64 [K][QUANTILE_NUM_COUNTS].
  m.def("quantile", [](uintptr_t values, int dtype, int64_t n, const std::vector<int64_t>& k, bool largest,
                       uintptr_t mask, int threads, uintptr_t thresholds, uintptr_t counts) {
    require_dtypes(dtype, dtype);
    require_size(n, values != 0);
    require_aligned(values, dtype);
    for (int64_t rank : k) require(rank >= 1, "ranks begin at 1");
    require(k.empty() || (thresholds && counts), "outputs must not be null");
    py::gil_scoped_release release;
    std::vector<QuantileResult> results(k.size());
    quantile(pointer<void>(values), dtype, n, k.data(), (int)k.size(), largest, pointer<unsigned char>(mask), threads,
             results.data());
    for (size_t j = 0; j < k.size(); j++) {
      const QuantileResult& r = results[j];
      pointer<double>(thresholds)[j] = r.threshold;
      const int64_t row[QUANTILE_NUM_COUNTS] = {r.above, r.tied, r.above_masked, r.tied_masked, r.nan};
      std::copy(row, row + QUANTILE_NUM_COUNTS, pointer<int64_t>(counts) + QUANTILE_NUM_COUNTS * j);
    }
  });
  // base, trained: [rows][n] with strides *_row and *_column; out: double [number of parts][n][n], added to.
  m.def("gram", [](uintptr_t base, int base_dtype, int64_t base_row, int64_t base_column, uintptr_t trained,
                   int trained_dtype, int64_t trained_row, int64_t trained_column, int64_t rows, int64_t n, int parts,
                   bool visible, int block, int threads, uintptr_t out) {
    require_dtypes(base_dtype, trained_dtype);
    require_size(rows, rows == 0 || n == 0 || (base && trained && out));
    require_aligned(base, base_dtype);
    require_aligned(trained, trained_dtype);
    require(n >= 0 && n <= INT32_MAX && parts > 0 && parts < 8 && block >= 0 && block <= OPD_GRAM_ROWS,
            "columns, parts or block out of range");
    const GramInput input{pointer<void>(base), pointer<void>(trained), base_dtype, trained_dtype,
                          base_row, base_column, trained_row, trained_column};
    py::gil_scoped_release release;
    gram(input, rows, n, parts, visible, block, threads, pointer<double>(out));
  });
  // rows: [count] StepRow (opdkernels/ops/step/layout.py: STEP_ROW).
  m.def("masked_step", [](uintptr_t rows, int64_t count, int64_t row_bytes, uintptr_t scalars, int64_t num_scalar_rows,
                          uintptr_t grad_scale, uintptr_t clip, bool maximize, int kind, bool nesterov, int precision,
                          int64_t seed, int threads) {
    const StepOptions options{pointer<float>(scalars), pointer<float>(grad_scale), pointer<float>(clip),
                              maximize, precision, seed, nesterov, kind};
    py::gil_scoped_release release;
    masked_step(pointer<StepRow>(rows), count, row_bytes, options, num_scalar_rows, threads);
  });
  m.def("patch_gather", [](uintptr_t base, uintptr_t trained, int bytes, int64_t n, bool difference, int threads,
                           uintptr_t counts, uintptr_t positions, uintptr_t values, uintptr_t digests) {
    require_width(bytes, n, {base, trained, values});
    require(n == 0 || (counts && positions && digests), "outputs must not be null");
    py::gil_scoped_release release;
    patch_gather(pointer<void>(base), pointer<void>(trained), bytes, n, difference, threads, pointer<int32_t>(counts),
                 pointer<unsigned char>(positions), pointer<void>(values), pointer<uint64_t>(digests));
  });
  m.def("patch_check", [](uintptr_t counts, uintptr_t positions, int64_t position_bytes, int64_t n, int64_t n_values,
                          int threads) {
    require_size(n, counts != 0);
    require_size(position_bytes, positions != 0);
    require(n_values >= 0, "the number of values must not be negative");
    py::gil_scoped_release release;
    return patch_check(pointer<int32_t>(counts), pointer<unsigned char>(positions), position_bytes, n, n_values,
                       threads);
  });
  m.def("patch_scatter", [](uintptr_t base, int bytes, int64_t n, bool difference, uintptr_t counts,
                            uintptr_t positions, int64_t position_bytes, uintptr_t values, int64_t n_values,
                            int threads, uintptr_t out, uintptr_t digests) {
    require_width(bytes, n, {base, out});
    require_width(bytes, n_values, {values});
    require_size(position_bytes, positions != 0);
    require(n == 0 || (counts && digests), "counts and digests must not be null");
    py::gil_scoped_release release;
    return patch_scatter(pointer<void>(base), bytes, n, difference, pointer<int32_t>(counts),
                         pointer<unsigned char>(positions), position_bytes, pointer<void>(values), n_values, threads,
                         pointer<void>(out), pointer<uint64_t>(digests));
  });
  m.def("patch_digest", [](uintptr_t data, int bytes, int64_t n, int threads, uintptr_t digests) {
    require_width(bytes, n, {data});
    require(n == 0 || digests, "digests must not be null");
    py::gil_scoped_release release;
    patch_digest(pointer<void>(data), bytes, n, threads, pointer<uint64_t>(digests));
  });
  m.def("guard_mapping", &guard_mapping);
  m.def("mapping_faults", &mapping_faults);
  m.def("unguard_mapping", &unguard_mapping);
}
