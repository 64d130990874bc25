// `gram` over rows and threads: rows are packed a few hundred at a time, widened and differenced once. One thread
// computes each panel of columns of the result, so the number of threads changes neither what is summed nor the order.
#include <new>

#include "../common/cpu/boundary.h"
#include "../common/cpu/parallel.h"
#include "cpu.h"

namespace {
struct AlignedBuffer {
  void* data;
  explicit AlignedBuffer(size_t bytes) : data(::operator new(bytes, std::align_val_t(64))) {}
  ~AlignedBuffer() { ::operator delete(data, std::align_val_t(64)); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
};

template <class Body>
void each_panel(int panels, int threads, Body body) {
  parallel_tasks(panels, threads, [&](int p) { body(panels - 1 - p); });  // the longest columns first
}
}  // namespace

void gram(const GramInput& input, int64_t rows, int64_t n, int parts, bool visible, int block, int threads,
          double* out) {
  if (!rows || !n) return;
  const GramKernels& kernels = OPD_KERNELS(gram_kernels);
  const int width = kernels.panel_bytes / 8, panels = (int)((n + width - 1) / width);
  const int fp32_panels = block && parts & GRAM_PART_CROSS ? (panels + 1) / 2 : 0;
  threads = threads_for(rows * n, threads);
  const size_t panel = (size_t)OPD_GRAM_ROWS * kernels.panel_bytes;
  const bool fp64 = parts & (GRAM_PART_BASE | GRAM_PART_DELTA) || !block;  // anything in fp64
  double *base = out, *cross = base + (parts & GRAM_PART_BASE ? n * n : 0);
  double* delta = cross + (parts & GRAM_PART_CROSS ? n * n : 0);
  AlignedBuffer w(fp64 * panels * panel), d(fp64 * panels * panel), fp32_w(fp32_panels * panel),
      fp32_d(fp32_panels * panel);
  for (int64_t first = 0; first < rows; first += OPD_GRAM_ROWS) {
    const int count = (int)(rows - first < OPD_GRAM_ROWS ? rows - first : OPD_GRAM_ROWS);
    GramInput at = input;
    at.base = (const char*)input.base + first * input.base_row * element_bytes(input.base_dtype);
    at.trained = (const char*)input.trained + first * input.trained_row * element_bytes(input.trained_dtype);
    each_panel(panels, threads, [&](int p) {
      if (fp64) kernels.pack(&at, true, visible, count, n, p, w.data, d.data);
      if (p < fp32_panels) kernels.pack(&at, false, visible, count, n, p, fp32_w.data, fp32_d.data);
    });
    each_panel(panels, threads, [&](int p) {
      if (parts & GRAM_PART_BASE) kernels.columns(true, w.data, w.data, true, count, OPD_GRAM_BLOCK, n, p, base);
      if (parts & GRAM_PART_CROSS && !block)
        kernels.columns(true, w.data, d.data, false, count, OPD_GRAM_BLOCK, n, p, cross);
      if (p < fp32_panels) kernels.columns(false, fp32_w.data, fp32_d.data, false, count, block, n, p, cross);
      if (parts & GRAM_PART_DELTA) kernels.columns(true, d.data, d.data, true, count, OPD_GRAM_BLOCK, n, p, delta);
    });
  }
}

// base, trained: [rows][n] with strides *_row and *_column in elements; out: [number of parts][n][n], added to.
OPD_EXPORT int opd_gram(const void* base, int64_t base_dtype, int64_t base_row, int64_t base_column,
                        const void* trained, int64_t trained_dtype, int64_t trained_row, int64_t trained_column,
                        int64_t rows, int64_t n, int64_t parts, int64_t visible, int64_t block, int64_t threads,
                        double* out) {
  return guarded([&] {
    require_dtypes(base_dtype, trained_dtype);
    require_size(rows, n == 0 || (base && trained && out));
    require_aligned(base, element_bytes((int)base_dtype));
    require_aligned(trained, element_bytes((int)trained_dtype));
    require(n >= 0 && n <= INT32_MAX && parts > 0 && parts < 8 && block >= 0 && block <= OPD_GRAM_ROWS,
            "columns, parts or block out of range");
    const GramInput input{base, trained, (int)base_dtype, (int)trained_dtype,
                          base_row, base_column, trained_row, trained_column};
    gram(input, rows, n, (int)parts, visible != 0, (int)block, narrow(threads), out);
  });
}
