// The Python edge: pointers and sizes in, counts out, the GIL released. The callers check devices, dtypes and contiguity.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "common/cpu/dispatch.h"
#include "common/cpu/mapped.h"

namespace py = pybind11;

namespace {
template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

DeltaOptions delta_options(const std::vector<int>& cuts, const std::vector<double>& thresholds) {
  if (cuts.size() > OPD_MAX_CUTS || thresholds.size() != OPD_THRESHOLDS) throw std::invalid_argument("at most 4 cuts, exactly 5 thresholds");
  DeltaOptions options;
  options.n_cuts = (int)cuts.size();
  for (int i = 0; i < OPD_MAX_CUTS; i++) options.cuts[i] = i < options.n_cuts ? cuts[i] : 0x7FFF;
  for (int i = 0; i < OPD_THRESHOLDS; i++) options.thresholds[i] = thresholds[i];
  return options;
}
}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled CPU kernels of opdkernels.";
  m.attr("sum_limbs") = OPD_SUM_LIMBS;
  m.attr("patch_block") = OPD_PATCH_BLOCK;
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
  m.def("delta", [](uintptr_t source, int source_dtype, uintptr_t trained, int trained_dtype, int64_t n, const std::vector<int>& cuts,
                    const std::vector<double>& thresholds, int threads, uintptr_t tables, uintptr_t counts, uintptr_t sums,
                    uintptr_t maximum, uintptr_t mask) {
    DeltaOptions options = delta_options(cuts, thresholds);
    py::gil_scoped_release release;
    delta(pointer<void>(source), source_dtype, pointer<void>(trained), trained_dtype, n, options, threads, pointer<int64_t>(tables),
          pointer<int64_t>(counts), pointer<int64_t>(sums), pointer<double>(maximum), pointer<unsigned char>(mask));
  });
  m.def("overlap", [](uintptr_t source, int source_dtype, const std::vector<uintptr_t>& trained, const std::vector<int>& trained_dtypes,
                      int64_t n, int cut, int threads, uintptr_t source_table, uintptr_t changed, uintptr_t both, uintptr_t exactly,
                      uintptr_t counts) {
    if (trained.empty() || trained.size() > OPD_MAX_RUNS || trained.size() != trained_dtypes.size()) throw std::invalid_argument("1 to 16 runs, each with its dtype");
    std::vector<const void*> runs;
    for (uintptr_t address : trained) runs.push_back(pointer<void>(address));
    py::gil_scoped_release release;
    overlap(pointer<void>(source), source_dtype, runs, trained_dtypes, n, cut, threads, pointer<int64_t>(source_table),
            pointer<int64_t>(changed), pointer<int64_t>(both), pointer<int64_t>(exactly), pointer<int64_t>(counts));
  });
  m.def("quantile", [](uintptr_t values, int dtype, int64_t n, const std::vector<int64_t>& k, bool largest, uintptr_t mask, int threads,
                       uintptr_t cuts, uintptr_t counts) {
    py::gil_scoped_release release;
    std::vector<QuantileResult> results(k.size());
    quantile(pointer<void>(values), dtype, n, k, largest, pointer<unsigned char>(mask), threads, results.data());
    for (size_t j = 0; j < k.size(); j++) {
      const QuantileResult& r = results[j];
      pointer<double>(cuts)[j] = r.cut;
      const int64_t row[5] = {r.above, r.tied, r.above_masked, r.tied_masked, r.nan};
      std::copy(row, row + 5, pointer<int64_t>(counts) + 5 * j);
    }
  });
  m.def("gram", [](uintptr_t source, int source_dtype, int64_t source_row, int64_t source_column, uintptr_t trained, int trained_dtype,
                   int64_t trained_row, int64_t trained_column, int64_t rows, int64_t n, int parts, bool visible, int block, int threads,
                   uintptr_t into) {
    const GramInput input{pointer<void>(source), pointer<void>(trained), source_dtype, trained_dtype, source_row, source_column, trained_row, trained_column};
    py::gil_scoped_release release;
    gram(input, rows, n, parts, visible, block, threads, pointer<double>(into));
  });
  // rows: [count] StepRow (opdkernels/ops/step/layout.py: STEP_ROW).
  m.def("masked_step", [](uintptr_t rows, int64_t count, uintptr_t scalars, uintptr_t grad_scale, uintptr_t clip, bool maximize,
                          int kind, bool nesterov, int precision, int64_t seed, int threads) {
    const StepOptions options{pointer<float>(scalars), pointer<float>(grad_scale), pointer<float>(clip),
                              maximize, precision, seed, nesterov, kind};
    py::gil_scoped_release release;
    masked_step(pointer<StepRow>(rows), count, options, threads);
  });
  m.def("patch_gather", [](uintptr_t source, uintptr_t trained, int bytes, int64_t n, bool difference, int threads, uintptr_t counts,
                           uintptr_t positions, uintptr_t values, uintptr_t digests) {
    py::gil_scoped_release release;
    patch_gather(pointer<void>(source), pointer<void>(trained), bytes, n, difference, threads, pointer<int32_t>(counts),
                 pointer<unsigned char>(positions), pointer<void>(values), pointer<uint64_t>(digests));
  });
  m.def("patch_check", [](uintptr_t counts, uintptr_t positions, int64_t position_bytes, int64_t n, int64_t n_values, int threads) {
    py::gil_scoped_release release;
    return patch_check(pointer<int32_t>(counts), pointer<unsigned char>(positions), position_bytes, n, n_values, threads);
  });
  m.def("patch_scatter", [](uintptr_t source, int bytes, int64_t n, bool difference, uintptr_t counts, uintptr_t positions,
                            int64_t position_bytes, uintptr_t values, int64_t n_values, int threads, uintptr_t out, uintptr_t digests) {
    py::gil_scoped_release release;
    return patch_scatter(pointer<void>(source), bytes, n, difference, pointer<int32_t>(counts), pointer<unsigned char>(positions),
                         position_bytes, pointer<void>(values), n_values, threads, pointer<void>(out), pointer<uint64_t>(digests));
  });
  m.def("patch_digest", [](uintptr_t data, int bytes, int64_t n, int threads, uintptr_t digests) {
    py::gil_scoped_release release;
    patch_digest(pointer<void>(data), bytes, n, threads, pointer<uint64_t>(digests));
  });
  m.def("guard_mapping", &guard_mapping);
  m.def("mapping_faults", &mapping_faults);
  m.def("unguard_mapping", &unguard_mapping);
}
