// `gram` over rows and threads: rows are packed a few hundred at a time, widened and differenced once, and every panel of
// columns of the result is one thread's, so that threads change neither what is summed nor its order.
#include <new>

#include "../common/cpu/dispatch.h"
#include "../common/cpu/parallel.h"

namespace {
struct Aligned {
  void* data;
  explicit Aligned(size_t bytes) : data(::operator new(bytes, std::align_val_t(64))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
};

template <class Body>
void each_panel(int panels, int threads, Body body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int p = panels - 1; p >= 0; p--) {  // the longest columns first
      KeepSubnormals keep;
      body(p);
    }
    return;
  }
#endif
  KeepSubnormals keep;
  for (int p = 0; p < panels; p++) body(p);
}
}  // namespace

void gram(const GramInput& input, int64_t rows, int64_t n, int parts, bool visible, int block, int threads, double* into) {
  if (!rows || !n) return;
  const Kernels& kernel = kernels();
  const int width = kernel.gram_panel_bytes / 8, panels = (int)((n + width - 1) / width), narrow = block && parts & 2 ? (panels + 1) / 2 : 0;
  threads = threads_for(rows * n, threads);
  const size_t panel = (size_t)OPD_GRAM_ROWS * kernel.gram_panel_bytes;
  const bool wide = parts & 5 || !block;  // anything in fp64
  double *source = into, *cross = source + (parts & 1 ? n * n : 0), *change = cross + (parts & 2 ? n * n : 0);
  Aligned w(wide * panels * panel), d(wide * panels * panel), narrow_w(narrow * panel), narrow_d(narrow * panel);
  for (int64_t first = 0; first < rows; first += OPD_GRAM_ROWS) {
    const int count = (int)(rows - first < OPD_GRAM_ROWS ? rows - first : OPD_GRAM_ROWS);
    GramInput at = input;
    at.source = (const char*)input.source + first * input.source_row * element_bytes(input.source_dtype);
    at.trained = (const char*)input.trained + first * input.trained_row * element_bytes(input.trained_dtype);
    each_panel(panels, threads, [&](int p) {
      if (wide) kernel.gram_pack(&at, true, visible, count, n, p, w.data, d.data);
      if (p < narrow) kernel.gram_pack(&at, false, visible, count, n, p, narrow_w.data, narrow_d.data);
    });
    each_panel(panels, threads, [&](int p) {
      if (parts & 1) kernel.gram_columns(true, w.data, w.data, true, count, OPD_GRAM_BLOCK, n, p, source);
      if (parts & 2 && !block) kernel.gram_columns(true, w.data, d.data, false, count, OPD_GRAM_BLOCK, n, p, cross);
      if (p < narrow) kernel.gram_columns(false, narrow_w.data, narrow_d.data, false, count, block, n, p, cross);
      if (parts & 4) kernel.gram_columns(true, d.data, d.data, true, count, OPD_GRAM_BLOCK, n, p, change);
    });
  }
}
