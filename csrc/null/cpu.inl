// The fit of the nulls of one tensor, as opdkernels/ops/null/ defines it. Included once per instruction set.
#include "cpu.h"

namespace OPD_ISA {
// Probabilities of rounding on a lattice of octaves, for a distribution of |update|. Row r is the octave before row r
// of the window. steps[r][2^o + j] is the probability of being rounded to the (j + 1)-th or a lower one of the 2^o
// multiples of a spacing 2^-o of the octave; hidden[r] that of being rounded to 0 where the octave begins at the spacing.
struct NullLattice {
  int first, rows;               // octave of the window's first row, as an exponent field, and octaves
  double unmoved;                // P(update = 0)
  double hidden[NULL_ROWS + 1];
  double steps[NULL_ROWS + 1][256];
};

struct NullScratch {
  NullLattice lattice;
  double spacing[NULL_SPACINGS];             // coordinates by exponent field of the spacing of |W|
  double padded[16 + NULL_SPACINGS + 16];    // the same, with rows that hold no weights
  double finer[16 + NULL_SPACINGS + 16];     // sums of `padded` up to each
  double values[NULL_NUM_KINDS][NULL_WIDTH];  // expected coordinates by bf16 bits of |visible delta|, from first_bits on
  int first_bits[NULL_NUM_KINDS], width[NULL_NUM_KINDS];
  double visible[OPD_BINS];                  // P(visible) by position of the bin
  double observed[NULL_WIDTH];               // then prefix sums
  double mass[NULL_SPACINGS][NULL_DENSITY_BINS];
  double cumulative[NULL_SPACINGS * NULL_DENSITY_BINS + 3];
  double prefix[3][NULL_WIDTH + 1];
};

// What the fits of one tensor have in common.
struct NullFitting {
  const NullTensor& tensor;
  const NormalTables& tables;
  NullScratch& s;
  double numel, unchanged, energy;
  int lowest, highest;           // exponent fields of the spacings in use; none if highest < 0

  double rms() const { return __builtin_sqrt((energy > 0 ? energy : 1) / (numel > 1 ? numel : 1)); }
  double widest() const { return highest < 0 ? 0 : bits_double((opd_u64)(highest - 134 + 1023) << 52); }
};

OPD_FN double two_to(int exponent) { return __builtin_ldexp(1.0, exponent); }
OPD_FN double larger(double a, double b) { return a > b ? a : b; }
OPD_FN int clipped(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

static NullFitting null_prepare(const NullTensor& tensor, const NormalTables& tables, NullScratch& s) {
  NullFitting f = {tensor, tables, s, 0, 0, 0, NULL_SPACINGS, -1};
  __builtin_memset(s.spacing, 0, sizeof s.spacing);
  __builtin_memset(s.padded, 0, sizeof s.padded);
  opd_i64 numel = 0, moved = 0;
  for (opd_i64 i = 0; i < tensor.bins; i++) {
    const opd_i64 bits = tensor.bin_bits[i], n = tensor.base[i], changes = tensor.delta[i];
    if (n) {
      const int exponent = spacing_exponent(bits);
      const double below = half_spacing(bits, tensor.uniform);
      numel += n;
      s.spacing[exponent] += (double)n * (1 - below);
      s.spacing[exponent - 1] += (double)n * below;
    }
    if (changes && bits) {
      // A difference of finite weights can overflow; it counts as the largest finite value.
      const double magnitude = bits_magnitude(bits < OPD_INFINITY_BITS ? bits : OPD_INFINITY_BITS - 1);
      moved += changes;
      f.energy += (double)changes * (magnitude * magnitude);
    }
  }
  f.numel = (double)numel;
  f.unchanged = (double)(numel - moved);
  double sum = 0;
  for (int e = 0; e < NULL_SPACINGS; e++) {
    if (s.spacing[e] > 0) {
      if (e < f.lowest) f.lowest = e;
      f.highest = e;
    }
    s.padded[16 + e] = s.spacing[e];
  }
  for (int e = 0; e < 16 + NULL_SPACINGS + 16; e++) s.finer[e] = sum += s.padded[e];
  return f;
}

// The size in (low, high) whose energy is nearest to the target; the energy grows with size, perhaps in jumps.
template <class Energy>
static double null_solve(double target, double low, double high, int halvings, Energy energy) {
  double log_low = __builtin_log2(low), log_high = __builtin_log2(high);
  for (int i = 0; i < halvings; i++) {
    const double middle = (log_low + log_high) / 2;
    if (energy(__builtin_exp2(middle)) < target) log_low = middle;
    else log_high = middle;
  }
  low = __builtin_exp2(log_low);
  high = __builtin_exp2(log_high);
  return target - energy(low) < energy(high) - target ? low : high;
}

// The size of a kind whose E[k^2] depends on its size in spacings: square(x).
template <class Square>
static double null_size(const NullFitting& f, double low, double high, int halvings, Square square) {
  return null_solve(f.energy, low, high, halvings, [&](double size) {
    double sum = 0;
    for (int e = f.lowest; e <= f.highest; e++) {
      if (f.s.spacing[e] == 0) continue;
      const double spacing = two_to(e - 134);
      sum += square(size / spacing) * f.s.spacing[e] * (spacing * spacing);
    }
    return sum;
  });
}
template <class Square>
static double null_size(const NullFitting& f, Square square) {
  const double rms = f.rms(), widest = larger(f.widest(), rms);
  // Visible steps are at most twice the update, so 0.4 rms is too small, unless there is a remainder; the upper end is
  // far too large.
  return null_size(f, f.tensor.uniform ? rms * rms / widest / 8 : rms * 0.4, 4 * widest, 34, square);
}

// E[k^2] for a normal update with standard deviation `size` in spacings.
static double normal_square(const NormalTables& tables, double size, bool uniform) {
  // From two spacings on, rounding adds its own variance and nothing else (Sheppard; the error is below 1e-30).
  if (size >= 2) return size * size + (uniform ? 1.0 / 6 : 1.0 / 12);
  if (size < 1.0 / 32) return uniform ? NULL_ROOT_TWO_OVER_PI * size : 0.0;
  const double at = (__builtin_log2(size) + 5) * NULL_SIZE_STEPS;
  const int i = clipped((int)at, 0, NULL_SIZES - 2);
  const double* log_energy = tables.log_energy[uniform];
  return __builtin_exp2(log_energy[i] + (at - i) * (log_energy[i + 1] - log_energy[i]));
}

OPD_FN double table_erf(const NormalTables& tables, double x) {
  if (x >= 6.5) return 1;
  const int node = (int)(x * 64 + 0.5);
  const double d = x - node / 64.0, *c = tables.erf[node];
  return c[0] + d * (c[1] + d * (c[2] + d * (c[3] + d * (c[4] + d * (c[5] + d * c[6])))));
}

// Sets the window that contains the octaves from bottom to top.
static void null_window(const NullFitting& f, int bottom, int top, NullLattice& lattice) {
  // However small the update, a remainder near the edge changes the value by one spacing.
  if (f.tensor.uniform && f.highest - 7 > top) top = f.highest - 7;
  top = clipped(top, NULL_LOWEST_ROW, 254);
  if (bottom < NULL_LOWEST_ROW) bottom = NULL_LOWEST_ROW;
  const int most = 254 - NULL_LOWEST_ROW, rows = top - bottom + 1;
  lattice.rows = clipped(rows, 1, most);
  lattice.first = clipped(top - lattice.rows + 1, NULL_LOWEST_ROW, 255 - lattice.rows);
}

// Fills a lattice from the means of P(x <= y) over bf16 steps, in steps[r][128 ..], and that below them.
static void lattice_from_means(NullLattice& lattice, double bottom) {
  lattice.hidden[0] = bottom;
  for (int r = 0; r <= lattice.rows; r++) {
    double* steps = lattice.steps[r];
    for (int i = 127; i >= 1; i--) steps[i] = (steps[2 * i] + steps[2 * i + 1]) / 2;
    if (r < lattice.rows) lattice.hidden[r + 1] = (lattice.hidden[r] + steps[1]) / 2;
  }
}

// Fills a lattice from P(x <= y): cumulative(r, y) writes that of row r, y = 1, 1 + 1/256, ... times the row's octave.
template <class Cumulative>
static void lattice_from_cumulative(NullLattice& lattice, bool uniform, Cumulative cumulative) {
  double rows[2][256], *below = rows[0], *following = rows[1];
  cumulative(0, below);
  const double bottom = (lattice.unmoved + below[0]) / 2;
  lattice.hidden[0] = bottom;
  for (int r = 0; r <= lattice.rows; r++) {
    double* steps = lattice.steps[r];
    if (r < lattice.rows) cumulative(r + 1, following);
    if (uniform) {  // Simpson over a 128th of an octave
      const double last = r < lattice.rows ? following[0] : below[255];
      for (int j = 0; j < 128; j++)
        steps[128 + j] = (below[2 * j] + 4 * below[2 * j + 1] + (j < 127 ? below[2 * j + 2] : last)) / 6;
    } else {
      for (int o = 0; o < 8; o++)
        for (int j = 0; j < 1 << o; j++) steps[(1 << o) + j] = below[(2 * j + 1) << (7 - o)];
      if (r < lattice.rows) lattice.hidden[r + 1] = below[0];
    }
    double* done = below;
    below = following;
    following = done;
  }
  if (uniform) lattice_from_means(lattice, bottom);
}

// The expected coordinates by bf16 bits of |visible delta| of a window, and P(visible) of each bin of |W|.
static void expected_values(const NullFitting& f, int kind, const NullLattice& lattice) {
  NullScratch& s = f.s;
  const int rows = lattice.rows, first = lattice.first;
  double* values = s.values[kind];
  __builtin_memset(values, 0, sizeof(double) * 128 * (size_t)rows);
  for (int r = 0; r < rows; r++) {
    const int at = first + r + 16;  // in `padded`
    const double *now = lattice.steps[r + 1], *before = lattice.steps[r];
    double* row = values + 128 * r;
    for (int o = 0; o < 7; o++) {  // spacing u, 2^o of its multiples in the row
      const double weight = s.padded[at + 7 - o];
      if (weight == 0) continue;
      // Half of the coordinates move towards zero, and q = x / (128 u) of those pass a power of two, below which odd
      // multiples of u/2 are as likely as even ones: q/4 goes there. Below exponent 2 there is no finer spacing.
      const double finer = o >= 2 && at + 7 - o > 17 ? two_to(o - 9) : 0.0, part = two_to(-o);
      const double* upper = now + (1 << o);
      for (int j = 0; j < 1 << o; j++) {
        const double lower = j ? upper[j - 1] : o ? before[(1 << o) - 1] : lattice.hidden[r + 1];
        double mass = (upper[j] - lower) * weight;
        const double crossed = mass * ((1 + j * part) * finer);
        row[j << (7 - o)] += mass - crossed;
        if (finer != 0) row[(1 << (6 - o)) + (j << (7 - o))] += crossed;
      }
    }
    const double same = s.padded[at], smaller = s.finer[at - 1], both = same + smaller;
    const double* upper = now + 128;
    row[0] += same * (upper[0] - before[127]) + smaller * (upper[0] - before[255]);
    OPD_SIMD()
    for (int j = 1; j < 128; j++) row[j] += both * (upper[j] - upper[j - 1]);
  }
  // P(visible) by exponent. Below the window P(0 < x <= y) goes down with y.
  double visible_at[NULL_SPACINGS], expected = 0, in_window = 0;
  for (int e = 0; e < NULL_SPACINGS; e++) {
    const int above = e - 7 - (first - 1);
    const double hidden = lattice.hidden[clipped(above, 0, rows)] - lattice.unmoved;
    visible_at[e] = above > rows ? 0 : 1 - (lattice.unmoved + (above < 0 ? hidden * two_to(above) : hidden));
    expected += s.spacing[e] * visible_at[e];
  }
  for (opd_i64 i = 0; i < f.tensor.bins; i++) {
    const opd_i64 bits = f.tensor.bin_bits[i];
    const int exponent = spacing_exponent(bits);
    const double below = half_spacing(bits, f.tensor.uniform);
    s.visible[i] = (1 - below) * visible_at[exponent] + below * visible_at[exponent - 1];
  }
  // The small count that is visible below the window is added to its first value.
  for (int i = 0; i < 128 * rows; i++) in_window += values[i];
  values[0] += larger(expected - in_window, 0.0);
  s.first_bits[kind] = first > 0 ? first * 128 : 0;
  s.width[kind] = 128 * rows;
  if (first >= 1) return;
  // Octaves below 1 share the subnormals.
  __builtin_memset(s.observed, 0, sizeof(double) * 128 * (size_t)rows);
  for (int i = 0; i < 128 * rows; i++) {
    const int row = first + (i >> 7), slot = i & 127;
    s.observed[row < 1 ? (128 + slot) >> (1 - row) : row * 128 + slot] += values[i];
  }
  __builtin_memcpy(values, s.observed, sizeof(double) * 128 * (size_t)rows);
}

// Updates of one size on a bf16 grid: both results of every |W|, computed as training would compute them.
static double fit_sign_on_grid(const NullFitting& f) {
  NullScratch& s = f.s;
  double size = null_size(f, [](double x) { return rounded_square(x, false); });
  size = null_size(f, size * 0.9, size * 1.1, 14, [](double x) { return rounded_square_with_carry(x); });
  NullLattice& window = s.lattice;  // only its octaves
  null_window(f, octave(size) - 2, octave(size) + 1, window);
  const int first = window.first > 0 ? window.first * 128 : 0, width = 128 * window.rows;
  double* values = s.values[NULL_KIND_SIGN];
  __builtin_memset(values, 0, sizeof(double) * (size_t)width);
  s.first_bits[NULL_KIND_SIGN] = first;
  s.width[NULL_KIND_SIGN] = width;
  for (opd_i64 i = 0; i < f.tensor.bins; i++) {
    const double weight = bits_magnitude(f.tensor.bin_bits[i]), n = (double)f.tensor.base[i];
    s.visible[i] = 0;
    if (n == 0) continue;
    for (int sign = 1; sign >= -1; sign -= 2) {
      const double target = weight + sign * size;
      const double moved = __builtin_copysign(round_magnitude(__builtin_fabs(target)), target) - weight;
      const int bits = (int)(float_bits((float)round_magnitude(__builtin_fabs(moved))) >> 16);
      if (!bits) continue;
      s.visible[i] += 0.5;
      // A step that ends at the largest finite value may be shorter than the window: counted at its first value.
      const int at = bits > first ? bits - first : 0;
      if (at < width) values[at] += n / 2;
    }
  }
  return size;
}

// Updates of one size, with a remainder.
static double fit_sign(const NullFitting& f) {
  NullLattice& lattice = f.s.lattice;
  const double size = null_size(f, [](double x) { return rounded_square(x, true); });
  null_window(f, octave(size) - 2, octave(size) + 1, lattice);
  lattice.unmoved = 0;
  for (int r = 0; r <= lattice.rows; r++) {
    const double start = two_to(lattice.first - 1 + r - 127), step = start / 128;
    for (int j = 0; j < 128; j++) {
      const double mean = (start * (1 + j / 128.0) + step - size) / step;
      lattice.steps[r][128 + j] = mean < 0 ? 0 : mean > 1 ? 1 : mean;
    }
  }
  const double bottom = 1 - size / two_to(lattice.first - 1 - 127);
  lattice_from_means(lattice, larger(bottom, 0.0));
  expected_values(f, NULL_KIND_SIGN, lattice);
  return size;
}

static double fit_normal(const NullFitting& f) {
  NullLattice& lattice = f.s.lattice;
  const bool uniform = f.tensor.uniform;
  const double size = null_size(f, [&](double x) { return normal_square(f.tables, x, uniform); });
  null_window(f, octave(size) - 12, octave(size * 6.5) + 1, lattice);
  lattice.unmoved = 0;
  const double scale = size * __builtin_sqrt(2.0);
  lattice_from_cumulative(lattice, uniform, [&](int r, double* below) {
    const double start = two_to(lattice.first - 1 + r - 127) / scale;
    for (int i = 0; i < 256; i++) below[i] = table_erf(f.tables, start * (1 + i / 256.0));
  });
  expected_values(f, NULL_KIND_NORMAL, lattice);
  return size;
}

// The distribution of |update| where rounding hides least, in s.mass by octave and an eighth of it: from the visible
// deltas whose lowest set bit bounds their |W| (`density` in opdkernels/ops/null/kinds.py). Returns its octaves, or 0
// where there are too few changes.
static int null_density(const NullFitting& f, int* first_row) {
  NullScratch& s = f.s;
  int low = NULL_SPACINGS, high = 0;
  const auto usable = [&](opd_i64 i, int* row, int* slot) {
    if (!f.tensor.delta[i]) return false;
    const opd_i64 bits = f.tensor.bin_bits[i] < OPD_INFINITY_BITS ? f.tensor.bin_bits[i] : OPD_INFINITY_BITS - 1;
    *row = (int)(bits >> 7);
    *slot = (int)(bits & 127);
    return *row > 0 && ((*slot & 15) > 0 || (*slot & 31) == 16);
  };
  int row, slot;
  for (opd_i64 i = 0; i < f.tensor.bins; i++)
    if (usable(i, &row, &slot)) {
      if (row < low) low = row;
      if (row > high) high = row;
    }
  if (!high) return 0;
  const int rows = high - low + 1;
  __builtin_memset(s.mass, 0, sizeof s.mass[0] * (size_t)rows);
  for (opd_i64 i = 0; i < f.tensor.bins; i++)
    if (usable(i, &row, &slot)) s.mass[row - low][slot / (128 / NULL_DENSITY_BINS)] += (double)f.tensor.delta[i];
  // Cell widths in units of the row's own spacing. Steps across a power of two add halves (see `expected_values`).
  const double *padded = s.padded + 16, *finer = s.finer + 16;
  double count = 0;
  for (int r = 0; r < rows; r++)
    for (int b = 0; b < NULL_DENSITY_BINS; b++) {
      const double middle = (1 + (b + 0.5) / NULL_DENSITY_BINS) / 4;
      const auto half_step = [&](int e) { return e < 2 ? 0.0 : padded[e] * middle; };
      double width = finer[low + r], exposure = 0;
      for (int t = 0; t < 5; t++) {  // patterns of t trailing zeros: in each bin 8, 4, 2, 1, in every other one more
        if (t) width += padded[low + r + t] * (1 << t) - half_step(low + r + t);
        exposure += (t == 4 ? b % 2 : 8 >> t) * (width + half_step(low + r + t + 1));
      }
      exposure /= 128 / NULL_DENSITY_BINS;
      double& mass = s.mass[r][b];
      if (exposure < NULL_MIN_EXPOSURE) mass = 0;
      count += mass;
      mass /= larger(exposure, 1.0);
    }
  if (count < NULL_MIN_COUNT) return 0;
  double sum = 0;
  for (int r = 0; r < rows; r++)
    for (double mass : s.mass[r]) sum += mass;
  for (int r = 0; r < rows; r++)
    for (double& mass : s.mass[r]) mass /= larger(sum, 1.0);
  *first_row = low;
  return rows;
}

// The energy of the density times a factor. E[k^2] depends on the update over the spacing only, so coordinates are first
// summed by row less exponent. For factors of 1/8 to 8, everything below a difference of -12 is hidden (except through
// a remainder), and above 3 rounding is negligible.
struct DensityEnergy {
  static constexpr int LOWEST = -12, DIFFERENCES = 16;
  double counts[DIFFERENCES][NULL_DENSITY_BINS] = {};
  bool any[DIFFERENCES] = {};
  double square = 0, linear = 0, mean_square = 0;
  bool uniform;

  DensityEnergy(const NullFitting& f, int first_row, int rows) : uniform(f.tensor.uniform) {
    const double* spacing = f.s.spacing;
    double coarser[NULL_SPACINGS + 16] = {};
    for (int e = NULL_SPACINGS - 1; e >= 0; e--) coarser[e] = coarser[e + 1] + spacing[e] * two_to(e - 134);
    for (int r = 0; r < rows; r++) {
      const int row = first_row + r;
      const double scale = two_to(row - 127), far = row >= 4 ? f.s.finer[16 + row - 4] : 0.0;
      const double wide = coarser[row + 13 < NULL_SPACINGS + 15 ? row + 13 : NULL_SPACINGS + 15];
      for (int b = 0; b < NULL_DENSITY_BINS; b++) {
        const double mass = f.s.mass[r][b], lower = 1 + b / (double)NULL_DENSITY_BINS;
        const double mean = lower + 0.5 / NULL_DENSITY_BINS;
        const double second = lower * lower + lower / NULL_DENSITY_BINS + 1.0 / (3 * NULL_DENSITY_BINS * NULL_DENSITY_BINS);
        if (mass == 0) continue;
        mean_square += mass * (scale * scale) * second;
        square += mass * far * (scale * scale) * second;
        if (uniform) linear += mass * wide * scale * mean;
        for (int d = 0; d < DIFFERENCES; d++) {
          const int exponent = row - (d + LOWEST);
          if (exponent < 0 || exponent >= NULL_SPACINGS || spacing[exponent] == 0) continue;
          counts[d][b] += mass * spacing[exponent] * two_to(2 * (exponent - 134));
          any[d] = true;
        }
      }
    }
  }

  double operator()(double factor) const {
    double sum = square * factor * factor + linear * factor;
    for (int d = 0; d < DIFFERENCES; d++) {
      if (!any[d]) continue;
      const double unit = factor * two_to(d + LOWEST + 7);
      double before = rounded_square_integral(unit, uniform);
      for (int b = 0; b < NULL_DENSITY_BINS; b++) {
        const double edge = unit * (1 + (b + 1) / (double)NULL_DENSITY_BINS);
        const double until = rounded_square_integral(edge, uniform);
        sum += counts[d][b] * ((until - before) / (unit / NULL_DENSITY_BINS));
        before = until;
      }
    }
    return sum;
  }
};

// The observed distribution times a factor of 1/8 to 8. What small weights leave unchanged stays unchanged; if that is
// more than 1 - NULL_MIN_MOVED of them, the update is not dense. Returns NaN where there is no such null.
static double fit_empirical(const NullFitting& f) {
  NullScratch& s = f.s;
  NullLattice& lattice = s.lattice;
  int first_row = 0;
  const int rows = null_density(f, &first_row);
  if (!rows) return __builtin_nan("");
  const DensityEnergy energy(f, first_row, rows);
  const double factor = null_solve(f.energy, 1.0 / 8, 8, 34, energy);
  double probability = 0;
  int low = rows, high = 0, edges = 0;
  s.cumulative[0] = s.cumulative[1] = 0;
  for (int r = 0; r < rows; r++)
    for (int b = 0; b < NULL_DENSITY_BINS; b++) {
      probability += s.mass[r][b];
      s.cumulative[2 + edges++] = probability;
      if (s.mass[r][b] == 0) continue;
      if (r < low) low = r;
      high = r;
    }
  if (!(__builtin_fabs(__builtin_log2(factor)) < 2.99 && probability >= NULL_MIN_MOVED)) return __builtin_nan("");
  // One edge more on both sides, of the same probability.
  s.cumulative[2 + edges] = probability;
  for (int i = 0; i < edges + 3; i++) s.cumulative[i] += 1 - probability;
  const int shift = octave(factor) - 127, top = first_row + high + shift + 2, bottom = first_row + low + shift;
  null_window(f, bottom > top - NULL_MAX_ROWS ? bottom : top - NULL_MAX_ROWS, top, lattice);
  lattice.unmoved = 1 - probability;
  // A point over the factor is in the same place of its octave in every row.
  int bin[256];
  double part[256];
  for (int i = 0; i < 256; i++) {
    int exponent;
    const double place = (2 * __builtin_frexp((1 + i / 256.0) / factor, &exponent) - 1) * NULL_DENSITY_BINS;
    bin[i] = (int)place + NULL_DENSITY_BINS * (exponent + lattice.first - 1 - first_row - 1) + 1;
    part[i] = place - (int)place;
  }
  lattice_from_cumulative(lattice, f.tensor.uniform, [&](int r, double* below) {
    for (int i = 0; i < 256; i++) {
      const int at = clipped(bin[i] + NULL_DENSITY_BINS * r, 0, edges + 1);
      below[i] = (s.cumulative[at + 1] - s.cumulative[at]) * part[i] + s.cumulative[at];
    }
  });
  expected_values(f, NULL_KIND_EMPIRICAL, lattice);
  return __builtin_sqrt(energy.mean_square) * factor;
}

// Distance, changes and near-zero changes of a kind, from its values and P(visible).
static void null_outputs(const NullFitting& f, int kind, const NullOptions& options, double* fit, double* near_zero) {
  NullScratch& s = f.s;
  const NullTensor& tensor = f.tensor;
  const double* values = s.values[kind];
  const int first = s.first_bits[kind], width = s.width[kind];
  double changed = 0, variance = 0, outside = 0, difference = 0;
  __builtin_memset(s.observed, 0, sizeof(double) * (size_t)width);
  for (opd_i64 i = 0; i < tensor.bins; i++) {
    const double n = (double)tensor.base[i], p = s.visible[i];
    changed += n * p;
    variance += n * larger(p * (1 - p), 0.0);  // P(visible) may exceed 1 by its rounding
    if (!tensor.delta[i] || !tensor.bin_bits[i]) continue;
    const opd_i64 bits = tensor.bin_bits[i] < OPD_INFINITY_BITS ? tensor.bin_bits[i] : OPD_INFINITY_BITS - 1;
    if (bits >= first && bits < first + width) s.observed[bits - first] += (double)tensor.delta[i];
    else outside += (double)tensor.delta[i];
  }
  for (int i = 0; i < width; i++) difference += __builtin_fabs(s.observed[i] - values[i]);
  const double unchanged = f.numel - changed, denominator = changed > 0 ? changed : 1;
  difference += __builtin_fabs(unchanged - f.unchanged) + outside;
  fit[NULL_FIT_DISTANCE] = difference / 2 / larger(f.numel, 1.0);
  fit[NULL_FIT_CHANGED] = changed;
  fit[NULL_FIT_CHANGED_SD] = __builtin_sqrt(variance);
  fit[NULL_FIT_UNCHANGED] = unchanged;
  // Changes are independent: their number has variance sum p (1 - p), and by the delta method a fraction c of them in a
  // mask has variance (sum over the mask of p (1 - p) (1 - 2 c) + c^2 sum of p (1 - p)) / (sum of p)^2.
  for (int k = 0; k < options.n_ratios; k++) {
    double left = __builtin_ceil(options.ratios[k] * f.numel), inside = 0, inside_variance = 0;
    if (left > f.numel) left = f.numel;
    for (opd_i64 i = 0; i < tensor.bins && left > 0; i++) {
      const double n = (double)tensor.base[i], taken = n < left ? n : left, p = s.visible[i];
      inside += taken * p;
      inside_variance += taken * larger(p * (1 - p), 0.0);
      left -= taken;
    }
    const double fraction = inside / denominator;
    const double total = inside_variance * (1 - 2 * fraction) + fraction * fraction * variance;
    near_zero[2 * k] = inside;
    near_zero[2 * k + 1] = __builtin_sqrt(larger(total, 0.0)) / denominator;
  }
}

// Fraction of the energy in the largest |visible delta| of a kind: mean, and deviation by the delta method.
static void null_top_energy(const NullFitting& f, int kind, const double* fit, const NullOptions& options,
                            double* top_energy) {
  NullScratch& s = f.s;
  const double* values = s.values[kind];
  const int first = s.first_bits[kind], width = s.width[kind];
  double changes = 0, mean_square = 0, (&prefix)[3][NULL_WIDTH + 1] = s.prefix;
  for (int i = 0; i < width; i++) {
    const double n = larger(values[i], 0.0), x = bits_magnitude(first + i);  // differences may round below 0
    changes += n;
    mean_square += n * (x * x);
  }
  mean_square /= changes;
  // From the largest |delta| down. Counts are divided by their sum, squares by their mean.
  const auto square = [&](int i) { const double x = bits_magnitude(first + width - 1 - i); return x * x / mean_square; };
  prefix[0][0] = prefix[1][0] = prefix[2][0] = 0;
  for (int i = 0; i < width; i++) {
    const double n = larger(values[width - 1 - i], 0.0) / changes, x = square(i);
    prefix[0][i + 1] = prefix[0][i] + n;
    prefix[1][i + 1] = prefix[1][i] + n * x;
    prefix[2][i + 1] = prefix[2][i] + n * (x * x);
  }
  const double numel = __builtin_rint(fit[NULL_FIT_CHANGED] + fit[NULL_FIT_UNCHANGED]);
  for (int k = 0; k < options.n_fractions; k++) {
    const double taken = larger(1.0, __builtin_ceil(options.fractions[k] * numel)) / changes;
    if (taken >= prefix[0][width]) {  // every change
      top_energy[2 * k] = 1;
      top_energy[2 * k + 1] = 0;
      continue;
    }
    int low = 0, high = width;  // the first prefix that reaches `taken`
    while (low < high) {
      const int middle = (low + high) / 2;
      if (prefix[0][middle] < taken) low = middle + 1;
      else high = middle;
    }
    const int last = low - 1;  // the bin of the smallest |delta| of which coordinates are taken; taken > 0
    const double above = prefix[0][last], above_1 = prefix[1][last], above_2 = prefix[2][last], threshold = square(last);
    const double top = above_1 + (taken - above) * threshold;
    // Sums of the influence of coordinates, max(square - threshold, 0) - top square, and of its square.
    const double influence = above_1 - threshold * above - top;
    double influence_sq = above_2 - 2 * threshold * above_1 + threshold * threshold * above;
    influence_sq += -2 * top * (above_2 - threshold * above_1) + top * top * prefix[2][width];
    const double variance = influence_sq - influence * influence * changes / numel;
    top_energy[2 * k] = top;
    top_energy[2 * k + 1] = __builtin_sqrt(larger(variance, 0.0) / changes);
  }
}

static void null_fit(const NullTensor& tensor, const NullOptions& options, const NormalTables& tables, void* scratch,
                     const NullOutputs& out) {
  NullScratch& s = *(NullScratch*)scratch;
  const NullFitting f = null_prepare(tensor, tables, s);
  const double nan = __builtin_nan("");
  int chosen = NULL_KIND_SIGN;
  for (int kind = 0; kind < NULL_NUM_KINDS; kind++) {
    double *fit = out.fits + kind * NULL_NUM_FITS, *near_zero = out.near_zero + (opd_i64)kind * options.n_ratios * 2;
    double size = 0;
    if (f.energy > 0)
      size = kind == NULL_KIND_NORMAL ? fit_normal(f)
             : kind == NULL_KIND_EMPIRICAL ? fit_empirical(f)
             : tensor.uniform ? fit_sign(f) : fit_sign_on_grid(f);
    const bool known = size == size;
    if (size > 0) {
      null_outputs(f, kind, options, fit, near_zero);
    } else {  // no change is expected, or there is no such null
      s.first_bits[kind] = s.width[kind] = 0;
      for (int i = 0; i < NULL_NUM_FITS; i++) fit[i] = known ? 0 : nan;
      for (int i = 0; i < 2 * options.n_ratios; i++) near_zero[i] = known ? 0 : nan;
      if (known) fit[NULL_FIT_UNCHANGED] = f.numel;
    }
    fit[NULL_FIT_SIZE] = size;
    if (known && fit[NULL_FIT_DISTANCE] < out.fits[chosen * NULL_NUM_FITS + NULL_FIT_DISTANCE]) chosen = kind;
    if (out.visible)
      for (opd_i64 i = 0; i < tensor.bins; i++)
        out.visible[kind * out.visible_stride + i] = !tensor.base[i] ? 0 : !known ? nan : size > 0 ? s.visible[i] : 0;
    if (out.expected) {
      double* expected = out.expected + (opd_i64)kind * OPD_BINS;
      for (int i = 0; i < OPD_BINS; i++) expected[i] = known ? 0 : nan;
      for (int i = 0; i < s.width[kind]; i++) expected[s.first_bits[kind] + i] = s.values[kind][i];
      expected[0] += fit[NULL_FIT_UNCHANGED];
    }
  }
  *out.chosen = chosen;
  const double* fit = out.fits + chosen * NULL_NUM_FITS;
  if (fit[NULL_FIT_CHANGED] > 0)
    null_top_energy(f, chosen, fit, options, out.top_energy);
  else
    for (int i = 0; i < 2 * options.n_fractions; i++) out.top_energy[i] = nan;
  for (int k = 0; k < options.n_limits; k++) {
    const opd_i64 inside = options.limits[k] + 1 - s.first_bits[chosen];
    double sum = fit[NULL_FIT_UNCHANGED];
    for (opd_i64 i = 0; i < inside && i < s.width[chosen]; i++) sum += s.values[chosen][i];
    out.below[k] = sum;
  }
}

const NullKernels null_kernels = {sizeof(NullScratch), null_fit};
}  // namespace OPD_ISA
