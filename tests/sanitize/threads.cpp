// Every threaded kernel, on inputs large enough for several threads, for every instruction set: run by `make sanitize`
// under ThreadSanitizer. The results for one thread and for four must be equal.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/common/cpu/dispatch.h"
#include "../../csrc/common/cpu/parallel.h"
#include "../../csrc/delta/cpu.h"
#include "../../csrc/gram/cpu.h"
#include "../../csrc/null/cpu.h"
#include "../../csrc/overlap/cpu.h"
#include "../../csrc/patch/cpu.h"
#include "../../csrc/quantile/cpu.h"
#include "../../csrc/step/cpu.h"

namespace {
constexpr int64_t N = 300007;  // above the number below which kernels are serial; no multiple of a block
uint64_t seed = 1;
uint32_t next_random() { return (uint32_t)((seed = seed * 6364136223846793005ull + 1442695040888963407ull) >> 33); }

std::vector<uint16_t> bf16_values(int64_t n) {
  std::vector<uint16_t> values(n);
  for (uint16_t& value : values) value = (uint16_t)(0x3000 + next_random() % 0x0F00 + (next_random() & 1) * 0x8000);
  return values;
}
std::vector<float> fp32_values(int64_t n) {
  std::vector<float> values(n);
  for (float& value : values) value = (float)(int32_t)(next_random() << 1) / (1u << 30);
  return values;
}

void require_equal(const char* name, const std::vector<std::vector<char>>& a, const std::vector<std::vector<char>>& b) {
  if (a == b) return;
  std::printf("%s: one thread and four differ on %s\n", name, current_isa().c_str());
  std::exit(1);
}
template <class T> std::vector<char> bytes(const std::vector<T>& values) {
  const char* data = reinterpret_cast<const char*>(values.data());
  return std::vector<char>(data, data + values.size() * sizeof(T));
}
using Outputs = std::vector<std::vector<char>>;

Outputs run_delta(int threads) {
  seed = 2;
  const int64_t n = 4 * (1 << 18) + 7;  // each thread counts by steps (csrc/delta/steps.inl)
  std::vector<uint16_t> base = bf16_values(n), trained = base;
  for (int64_t i = 0; i < n; i += 3) trained[i] = (uint16_t)(trained[i] + 1);
  const std::vector<float> wide = fp32_values(N), wide_trained = fp32_values(N);
  DeltaOptions options = {{0, 0x7FFF, 0x7FFF, 0x7FFF}, 1, {1e-8, 1e-7, 1e-6, 1e-5, 1e-4}};
  std::vector<int64_t> tables((HIST_BASE_OVER + 1) * OPD_BINS), counts(NUM_COUNTS), sums(NUM_SUMS * OPD_SUM_LIMBS);
  std::vector<double> maximum(1);
  std::vector<unsigned char> mask((n + 7) / 8);
  delta(base.data(), BF16, trained.data(), BF16, n, options, threads, tables.data(), counts.data(), sums.data(),
        maximum.data(), mask.data());
  delta(wide.data(), FP32, wide_trained.data(), FP32, N, options, threads, tables.data(), counts.data(), sums.data(),
        maximum.data(), nullptr);
  return {bytes(tables), bytes(counts), bytes(sums), bytes(maximum), bytes(mask)};
}

Outputs run_overlap(int threads) {
  seed = 3;
  const std::vector<uint16_t> base = bf16_values(N), a = bf16_values(N), b = bf16_values(N), c = bf16_values(N);
  std::vector<int64_t> hist(OPD_BINS), changed(3 * OPD_BINS), both(9), runs(4), counts(OVERLAP_NUM_COUNTS);
  const void* trained[] = {a.data(), b.data(), c.data()};
  const int dtypes[] = {BF16, BF16, BF16};
  overlap(base.data(), BF16, trained, dtypes, 3, N, 0x3728, threads, hist.data(), changed.data(), both.data(),
          runs.data(), counts.data());
  return {bytes(hist), bytes(changed), bytes(both), bytes(runs), bytes(counts)};
}

Outputs run_quantile(int threads) {
  seed = 4;
  const std::vector<float> values = fp32_values(N);
  std::vector<unsigned char> mask((N + 7) / 8);
  for (unsigned char& byte : mask) byte = (unsigned char)next_random();
  const int64_t ranks[] = {N / 10, N / 2};
  Outputs outputs;
  for (bool largest : {true, false}) {
    std::vector<QuantileResult> results(2);
    quantile(values.data(), FP32, N, ranks, 2, largest, mask.data(), threads, results.data());
    for (const QuantileResult& r : results)
      outputs.push_back(bytes(std::vector<double>{r.threshold, (double)r.above, (double)r.tied, (double)r.above_masked,
                                                  (double)r.tied_masked, (double)r.nan}));
  }
  return outputs;
}

Outputs run_gram(int threads) {
  seed = 5;
  const int64_t rows = 700, n = 300;
  const std::vector<float> base = fp32_values(rows * n), trained = fp32_values(rows * n);
  std::vector<double> out(3 * n * n);
  const GramInput input{base.data(), trained.data(), FP32, FP32, n, 1, n, 1};
  gram(input, rows, n, 7, false, 32, threads, out.data());
  return {bytes(out)};
}

Outputs run_step(int threads) {
  seed = 6;
  std::vector<float> param = fp32_values(N), grad = fp32_values(N), exp_avg(N), exp_avg_sq(N);
  const int64_t blocks = (N + OPD_STEP_BLOCK - 1) / OPD_STEP_BLOCK;
  std::vector<unsigned char> mask((N + 7) / 8);
  std::vector<opd_i64> counts(blocks + 1);
  for (int64_t i = 0; i < N; i++) {
    if (next_random() % 3 == 0) mask[i / 8] |= (unsigned char)(1 << i % 8), counts[i / OPD_STEP_BLOCK + 1]++;
  }
  for (int64_t b = 0; b < blocks; b++) counts[b + 1] += counts[b];
  const std::vector<float> scalars{0.999f, 0.1f, 0.99f, 0.01f, 0.1f, 1e-8f, -1e-2f, 1.0f};
  StepRow row{};
  row.param = param.data(), row.grad = grad.data(), row.mask = mask.data(), row.block_counts = counts.data();
  row.exp_avg = exp_avg.data(), row.exp_avg_sq = exp_avg_sq.data(), row.size = row.numel = N;
  const StepOptions options{scalars.data(), nullptr, nullptr, 0, STEP_NEAREST, 0, 0, STEP_ADAMW};
  masked_step(&row, 1, sizeof(StepRow), options, 1, threads);
  return {bytes(param), bytes(exp_avg), bytes(exp_avg_sq)};
}

Outputs run_null(int threads) {
  const int64_t tensors = 40, bins = 300;
  std::vector<opd_i64> bits(bins), base(tensors * bins), delta(tensors * bins), chosen(tensors);
  for (int64_t i = 0; i < bins; i++) bits[i] = i ? 0x3900 + 5 * i : 0;
  seed = 8;
  for (int64_t i = 0; i < tensors * bins; i++) {  // as many changes as weights
    const opd_i64 n = next_random() % 1000;
    base[i] += n;
    delta[i % bins ? i - next_random() % (i % bins) : i] += n;
  }
  const double ratio = 0.1, fraction = 0.01;
  const opd_i64 limit = 0x3A00;
  const NullOptions options = {&ratio, &fraction, &limit, 1, 1, 1};
  std::vector<double> fits(tensors * NULL_NUM_KINDS * NULL_NUM_FITS), near_zero(tensors * NULL_NUM_KINDS * 2),
      top(tensors * 2), below(tensors);
  std::vector<NullTensor> all;
  std::vector<NullOutputs> outputs;
  for (int64_t t = 0; t < tensors; t++) {
    all.push_back({bits.data(), &base[t * bins], &delta[t * bins], bins, t % 2 == 1});
    outputs.push_back({&fits[t * NULL_NUM_KINDS * NULL_NUM_FITS], &near_zero[t * NULL_NUM_KINDS * 2], &top[t * 2],
                       &below[t], nullptr, nullptr, 0, &chosen[t]});
  }
  fit_nulls(all.data(), tensors, options, threads, outputs.data());
  return {bytes(fits), bytes(near_zero), bytes(top), bytes(below), bytes(chosen)};
}

Outputs run_patch(int threads) {
  seed = 7;
  const std::vector<uint16_t> base = bf16_values(N);
  std::vector<uint16_t> trained = base, values(N), restored(N);
  for (int64_t i = 0; i < N; i += 1 + next_random() % 50) trained[i] ^= 1;
  const int64_t blocks = (N + OPD_PATCH_BLOCK - 1) / OPD_PATCH_BLOCK;
  std::vector<int32_t> counts(blocks);
  std::vector<unsigned char> positions((N + 7) / 8);
  std::vector<uint64_t> digests(4 * blocks), digest(2 * blocks), again(2 * blocks);
  patch_gather(base.data(), trained.data(), 2, N, false, threads, counts.data(), positions.data(), values.data(),
               digests.data());
  int64_t n_values = 0, position_bytes = 0;
  for (int64_t b = 0; b < blocks; b++) {
    const int64_t size = N - b * OPD_PATCH_BLOCK < OPD_PATCH_BLOCK ? N - b * OPD_PATCH_BLOCK : OPD_PATCH_BLOCK;
    n_values += counts[b];
    position_bytes += 2 * counts[b] < (size + 7) / 8 ? 2 * counts[b] : (size + 7) / 8;
  }
  if (patch_check(counts.data(), positions.data(), position_bytes, N, n_values, threads) != -1 ||
      patch_scatter(base.data(), 2, N, false, counts.data(), positions.data(), position_bytes, values.data(), n_values,
                    threads, restored.data(), digest.data()) != -1 ||
      restored != trained) {
    std::printf("patch: the restored tensor is not the trained one\n");
    std::exit(1);
  }
  patch_digest(restored.data(), 2, N, threads, again.data());
  values.resize(n_values), positions.resize(position_bytes);
  return {bytes(counts), bytes(positions), bytes(values), bytes(digests), bytes(digest), bytes(again)};
}
}  // namespace

// A race, to show that races are reported. Each task waits for the other one, so that two threads write.
int race() {
  int count = 0;
  std::atomic<int> started{0};
  parallel_tasks(2, 2, [&](int) {
    started.fetch_add(1, std::memory_order_relaxed);
    while (started.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
    count++;
  });
  return count;
}

int main(int argc, char**) {
  if (argc > 1) return race() < 0;
  const struct { const char* name; Outputs (*run)(int); } kernels[] = {
      {"delta", run_delta}, {"overlap", run_overlap}, {"quantile", run_quantile},
      {"gram", run_gram},   {"step", run_step},       {"patch", run_patch},       {"null", run_null}};
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    for (const auto& kernel : kernels) require_equal(kernel.name, kernel.run(1), kernel.run(4));
    std::printf("threads: %s clean\n", isa.c_str());
  }
}
