// `null` on the CPU: the tables of a normal update, and tensors for threads.
#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <vector>

#include "../common/cpu/boundary.h"

namespace {
NormalTables* fill_tables() {
  static NormalTables tables;
  for (int i = 0; i < NULL_ERF_NODES; i++) {
    const double x = i / 64.0, density = 2 / std::sqrt(M_PI) * std::exp(-x * x), square = x * x;
    // Derivatives of erf are Hermite polynomials times its density.
    const double terms[NULL_ERF_TERMS] = {std::erf(x),
                                          density,
                                          -x * density,
                                          (4 * square - 2) * density / 6,
                                          -x * (8 * square - 12) * density / 24,
                                          (16 * square * square - 48 * square + 12) * density / 120,
                                          -x * (32 * square * square - 160 * square + 120) * density / 720};
    for (int term = 0; term < NULL_ERF_TERMS; term++) tables.erf[i][term] = terms[term];
  }
  for (int i = 0; i < NULL_SIZES; i++) {
    const double size = std::exp2(i / (double)NULL_SIZE_STEPS - 5);
    double grid = 0, uniform = 0;
    for (int k = 0; k < 20; k++) {
      grid += (2 * k + 1) * std::erfc((k + 0.5) / size / std::sqrt(2.0));
      // Sum over k of (2k + 1) times the integral of P(x > y) over (k, k + 1), summed by parts.
      const double tail = size * NULL_ROOT_TWO_OVER_PI * std::exp(-(k / size) * (k / size) / 2) -
                          k * std::erfc(k / size / std::sqrt(2.0));
      uniform += k ? 2 * tail : tail;
    }
    tables.log_energy[0][i] = std::log2(grid);
    tables.log_energy[1][i] = std::log2(uniform);
  }
  return &tables;
}

const NormalTables& normal_tables() {
  static const NormalTables* const tables = fill_tables();
  return *tables;
}

constexpr int64_t MAX_NUMEL = (int64_t)1 << 53;  // doubles count coordinates

void require_fraction(double x) { require(x >= 0 && x <= 1, "ratios and fractions are between 0 and 1"); }

// Refuses histograms that no tensor has.
void require_histograms(const NullTensor& tensor) {
  int64_t numel = 0, changes = 0;
  for (int64_t i = 0; i < tensor.bins; i++) {
    const int64_t bits = tensor.bin_bits[i];
    require(bits >= 0 && bits < OPD_BINS && (i == 0 || tensor.bin_bits[i - 1] < bits),
            "bf16 bits must be magnitudes, 0 to 32767, unique and ascending");
    require(tensor.base[i] >= 0 && tensor.delta[i] >= 0, "counts must not be negative");
    require(bits < OPD_INFINITY_BITS || tensor.base[i] == 0,
            "the histogram of |W| contains infinities or NaN; pass finite coordinates only");
    require(tensor.base[i] < MAX_NUMEL - numel && tensor.delta[i] < MAX_NUMEL - changes,
            "a tensor has 2^53 or more coordinates");
    numel += tensor.base[i];
    changes += tensor.delta[i];
  }
  require(numel == changes, "the histograms of |W| and delta have different numbers of coordinates");
}
}  // namespace

void fit_nulls(const NullTensor* tensors, int64_t count, const NullOptions& options, int threads,
               const NullOutputs* outputs) {
  const NullKernels& kernels = OPD_KERNELS(null_kernels);
  const NormalTables& tables = normal_tables();
  const int workers = (int)std::min<int64_t>(count, std::max(1, threads));
  std::vector<std::unique_ptr<char[]>> scratch;
  for (int w = 0; w < workers; w++) scratch.emplace_back(new char[kernels.scratch_bytes]);
  std::atomic<int64_t> next{0};
  parallel_tasks(workers, workers, [&](int w) {
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    for (int64_t t = take(); t < count; t = take())
      kernels.fit(tensors[t], options, tables, scratch[(size_t)w].get(), outputs[t]);
  });
}

// Fits the nulls of tensors to histograms whose used bins are given one after another. starts: [tensors + 1], of the
// bins of each; bin_bits, base, delta: [bins]; uniform: [tensors], whether W is stored wider than bf16; ratios:
// [n_ratios]; fractions: [n_fractions]; limits: [n_limits]. All outputs are overwritten. fits:
// [tensors][NULL_NUM_KINDS][NULL_NUM_FITS], NaN where there is no null of a kind; near_zero:
// [tensors][NULL_NUM_KINDS][n_ratios][2], expected changes among the smallest |W| and the deviation of their fraction;
// chosen: [tensors]; top_energy: [tensors][n_fractions][2] of the chosen kind, mean and deviation; below:
// [tensors][n_limits], its expected coordinates with at most these bits; expected: [tensors][NULL_NUM_KINDS][OPD_BINS]
// or null; visible: [NULL_NUM_KINDS][bins] or null.
OPD_EXPORT int opd_null(const int64_t* starts, const int64_t* bin_bits, const int64_t* base, const int64_t* delta,
                        int64_t bins, int64_t tensors, const unsigned char* uniform, const double* ratios,
                        int64_t n_ratios, const double* fractions, int64_t n_fractions, const int64_t* limits,
                        int64_t n_limits, int64_t threads, double* fits, double* near_zero, int64_t* chosen,
                        double* top_energy, double* below, double* expected, double* visible) {
  return guarded([&] {
    require_size(tensors, uniform && fits && chosen);
    require_size(bins, bin_bits && base && delta);
    require_size(n_ratios * tensors, ratios && near_zero);
    require_size(n_fractions * tensors, fractions && top_energy);
    require_size(n_limits * tensors, limits && below);
    for (int64_t k = 0; k < n_ratios; k++) require_fraction(ratios[k]);
    for (int64_t k = 0; k < n_fractions; k++) require_fraction(fractions[k]);
    for (int64_t k = 0; k < n_limits; k++)
      require(limits[k] >= 0 && limits[k] < OPD_BINS, "limits are bf16 bits of magnitudes, 0 to 32767");
    static const char* const STARTS = "starts must not descend, from 0 to the number of bins";
    require(starts && starts[0] == 0 && starts[tensors] == bins, STARTS);
    std::vector<NullTensor> all;
    std::vector<NullOutputs> outputs;
    for (int64_t t = 0; t < tensors; t++) {
      const int64_t at = starts[t];
      require(at <= starts[t + 1] && starts[t + 1] <= bins, STARTS);
      all.push_back({(const opd_i64*)bin_bits + at, (const opd_i64*)base + at, (const opd_i64*)delta + at,
                     starts[t + 1] - at, uniform[t] != 0});
      require_histograms(all.back());
      outputs.push_back({fits + t * NULL_NUM_KINDS * NULL_NUM_FITS, near_zero + t * NULL_NUM_KINDS * n_ratios * 2,
                         top_energy + t * n_fractions * 2, below + t * n_limits,
                         expected ? expected + t * NULL_NUM_KINDS * OPD_BINS : nullptr,
                         visible ? visible + at : nullptr, bins, (opd_i64*)chosen + t});
    }
    fit_nulls(all.data(), tensors, {ratios, fractions, (const opd_i64*)limits, narrow(n_ratios), narrow(n_fractions),
                                    narrow(n_limits)}, narrow(threads), outputs.data());
  });
}
