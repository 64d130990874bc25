// Gram matrices of packed panels. A panel holds OPD_GRAM_ROWS rows of three vectors of columns; a tile of the result is
// as many rows as registers allow by one panel, and stays in registers for all rows. Products are exact where the dtype
// allows it (opdkernels/ops/gram/__init__.py), so that fused and separate multiply-add round alike there, and every
// instruction set sums in the same order.
#include "cpu.h"

namespace OPD_ISA {
#if defined(OPD_AVX512)
#define OPD_GRAM_BYTES 64
#define OPD_GRAM_TILE 8
#elif defined(OPD_AVX2)
#define OPD_GRAM_BYTES 32
#define OPD_GRAM_TILE 4
#else
#define OPD_GRAM_BYTES 16
#define OPD_GRAM_TILE 3
#endif

template <class T> struct GramVector { typedef T type __attribute__((vector_size(OPD_GRAM_BYTES))); };
typedef GramVector<float>::type gram_float;
typedef GramVector<double>::type gram_double;
template <class T> constexpr int gram_width = 3 * OPD_GRAM_BYTES / (int)sizeof(T);
static_assert(gram_width<double> % OPD_GRAM_TILE == 0, "tiles fill a panel");

#if defined(OPD_AVX512)
static inline gram_float multiply_add(gram_float a, gram_float b, gram_float c) { return _mm512_fmadd_ps(a, b, c); }
static inline gram_double multiply_add(gram_double a, gram_double b, gram_double c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(OPD_AVX2)
static inline gram_float multiply_add(gram_float a, gram_float b, gram_float c) { return _mm256_fmadd_ps(a, b, c); }
static inline gram_double multiply_add(gram_double a, gram_double b, gram_double c) { return _mm256_fmadd_pd(a, b, c); }
#else
template <class V> static inline V multiply_add(V a, V b, V c) { return a * b + c; }
#endif

// One tile: sums over `rows` of x[.][i] * y[.][j], x and y in panels, added to the tile in fp64.
template <class T>
static inline void gram_sum(const T* x, const T* y, int rows, double* tile) {
  typedef typename GramVector<T>::type V;
  constexpr int width = gram_width<T>, lanes = width / 3;
  V sum[OPD_GRAM_TILE][3];
  for (int i = 0; i < OPD_GRAM_TILE; i++)
    for (int v = 0; v < 3; v++) sum[i][v] = V{};
  for (const T* end = x + (opd_i64)rows * width; x < end; x += width, y += width) {
    V right[3];
    for (int v = 0; v < 3; v++) right[v] = *(const V*)(y + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < OPD_GRAM_TILE; i++) {
      const V left = x[i] - V{};
#pragma GCC unroll 3
      for (int v = 0; v < 3; v++) sum[i][v] = multiply_add(left, right[v], sum[i][v]);
    }
  }
  for (int i = 0; i < OPD_GRAM_TILE; i++) {
    alignas(OPD_GRAM_BYTES) T row[width];  // through memory: vectors of T and of double differ in length
    for (int v = 0; v < 3; v++) *(V*)(row + v * lanes) = sum[i][v];
    OPD_SIMD()
    for (int l = 0; l < width; l++) tile[i * width + l] += (double)row[l];
  }
}

// Adds panel i times panel j, `rows` deep, to the result [n][n]; `block` rows are summed in T before they are added in
// fp64. Both panels of a block and the tile of all their columns fit the L1 cache.
template <class T>
static void gram_panels(const T* x, const T* y, int rows, int block, opd_i64 n, int i_panel, int j_panel, double* out) {
  constexpr int width = gram_width<T>;
  const opd_i64 top = (opd_i64)i_panel * width, left = (opd_i64)j_panel * width;
  const int height = n - top < width ? (int)(n - top) : width, columns = n - left < width ? (int)(n - left) : width;
  double tile[width * width] = {};
  for (int k = 0; k < rows; k += block)
    for (int i = 0; i < height; i += OPD_GRAM_TILE)
      gram_sum(x + k * width + i, y + k * width, rows - k < block ? rows - k : block, tile + i * width);
  for (int i = 0; i < height; i++) {
    double* row = out + (top + i) * n + left;
    if (columns == width) {  // a constant count: vectors
      OPD_SIMD()
      for (int j = 0; j < width; j++) row[j] += tile[i * width + j];
    } else {
      for (int j = 0; j < columns; j++) row[j] += tile[i * width + j];
    }
  }
}

// Adds column panel `panel` of one Gram matrix x^T y, or of its upper triangle.
template <class T>
static void gram_column(const void* x, const void* y, bool upper, int rows, int block, opd_i64 n, int panel,
                        double* out) {
  const opd_i64 size = (opd_i64)OPD_GRAM_ROWS * gram_width<T>;
  const int panels = (int)((n + gram_width<T> - 1) / gram_width<T>);
  for (int i = 0; i < (upper ? panel + 1 : panels); i++)
    gram_panels((const T*)x + i * size, (const T*)y + panel * size, rows, block, n, i, panel, out);
}

static void gram_columns(int fp64, const void* x, const void* y, int upper, int rows, int block, opd_i64 n, int panel,
                         double* out) {
  if (fp64) gram_column<double>(x, y, upper, rows, block, n, panel, out);
  else gram_column<float>(x, y, upper, rows, block, n, panel, out);
}

// Packing of w and of delta. Columns from n on are zero.
OPD_FN double gram_load(const void* p, int dtype, opd_i64 at) {
  return dtype == BF16 ? bf16_to_float(((const opd_u16*)p)[at]) : dtype == FP16 ? fp16_to_float(((const opd_u16*)p)[at])
       : dtype == FP32 ? ((const float*)p)[at] : ((const double*)p)[at];
}

template <class T, int BASE, int TRAINED>
OPD_FN void gram_value(const GramInput* in, int visible, opd_i64 base, opd_i64 trained, T* w, T* d) {
  const double s = gram_load(in->base, BASE, base), t = gram_load(in->trained, TRAINED, trained);
  if (visible) {
    const GramValue value = gram_visible((float)s, (float)t);
    *w = value.w, *d = value.d;
  } else if (BASE == FP64 || TRAINED == FP64) {
    const GramValue64 value = gram_stored(s, t);
    *w = (T)value.w, *d = (T)value.d;
  } else {
    const GramValue value = gram_stored((float)s, (float)t);
    *w = value.w, *d = value.d;
  }
}

template <class T, int BASE, int TRAINED>
static void gram_pack_as(const GramInput* in, int visible, int rows, opd_i64 n, int panel, T* w, T* d) {
  constexpr int width = gram_width<T>;
  const opd_i64 left = (opd_i64)panel * width;
  const int columns = n - left < width ? (int)(n - left) : width;
  if (columns < width) {
    __builtin_memset(w, 0, sizeof(T) * rows * width);
    __builtin_memset(d, 0, sizeof(T) * rows * width);
  }
  if (in->base_column == 1 && in->trained_column == 1) {
    for (int k = 0; k < rows; k++) {
      const opd_i64 base = k * in->base_row + left, trained = k * in->trained_row + left;
      if (columns == width) {  // a constant count: vectors
        OPD_SIMD()
        for (int c = 0; c < width; c++)
          gram_value<T, BASE, TRAINED>(in, visible, base + c, trained + c, w + k * width + c, d + k * width + c);
      } else {
        for (int c = 0; c < columns; c++)
          gram_value<T, BASE, TRAINED>(in, visible, base + c, trained + c, w + k * width + c, d + k * width + c);
      }
    }
    return;
  }
  for (int c = 0; c < columns; c++) {
    const opd_i64 base = (left + c) * in->base_column, trained = (left + c) * in->trained_column;
    for (int k = 0; k < rows; k++)
      gram_value<T, BASE, TRAINED>(in, visible, base + k * in->base_row, trained + k * in->trained_row,
                                   w + k * width + c, d + k * width + c);
  }
}

template <class T>
static void gram_pack_panel(const GramInput* in, int visible, int rows, opd_i64 n, int panel, void* w, void* d) {
  const opd_i64 at = (opd_i64)panel * OPD_GRAM_ROWS * gram_width<T>;
  T *to_w = (T*)w + at, *to_d = (T*)d + at;
  typedef void (*Pack)(const GramInput*, int, int, opd_i64, int, T*, T*);
  static const Pack packs[4][4] = {
      {gram_pack_as<T, BF16, BF16>, gram_pack_as<T, BF16, FP16>,
       gram_pack_as<T, BF16, FP32>, gram_pack_as<T, BF16, FP64>},
      {gram_pack_as<T, FP16, BF16>, gram_pack_as<T, FP16, FP16>,
       gram_pack_as<T, FP16, FP32>, gram_pack_as<T, FP16, FP64>},
      {gram_pack_as<T, FP32, BF16>, gram_pack_as<T, FP32, FP16>,
       gram_pack_as<T, FP32, FP32>, gram_pack_as<T, FP32, FP64>},
      {gram_pack_as<T, FP64, BF16>, gram_pack_as<T, FP64, FP16>,
       gram_pack_as<T, FP64, FP32>, gram_pack_as<T, FP64, FP64>}};
  packs[in->base_dtype][in->trained_dtype](in, visible, rows, n, panel, to_w, to_d);
}

static void gram_pack(const GramInput* in, int fp64, int visible, int rows, opd_i64 n, int panel, void* w, void* d) {
  if (fp64) gram_pack_panel<double>(in, visible, rows, n, panel, w, d);
  else gram_pack_panel<float>(in, visible, rows, n, panel, w, d);
}

const GramKernels gram_kernels = {gram_pack, gram_columns, 3 * OPD_GRAM_BYTES};
}  // namespace OPD_ISA
