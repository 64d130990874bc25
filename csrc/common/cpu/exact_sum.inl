// Exact sum of non-negative doubles, vectorised. Each value is cut at fixed powers of two by adding and subtracting a
// large constant (the rounding of that addition makes the cut); the pieces of one level are multiples of one unit, so
// adding them is exact. Levels are 32 bits apart, as the limbs are. Most blocks need two or three levels.
#define OPD_EXACT_BLOCK 1024  // pieces below 2^40 units: 2^10 of them stay below 2^52, where doubles are exact

namespace OPD_ISA {
OPD_FN double power_of_two(int exponent) { return bits_double((opd_u64)(exponent + 1023) << 52); }

static void exact_sum(double* values, int n, opd_i64* limbs, int sign) {
  double largest = 0;
  OPD_SIMD(reduction(max : largest))
  for (int i = 0; i < n; i++) largest = values[i] > largest ? values[i] : largest;
  while (largest > 0) {
    // Lowest level whose 2^40 units exceed the largest value: exponent e of largest, unit 2^(32 level - 1074).
    opd_u64 bits = double_bits(largest);
    // biased; the bits of a subnormal are its units of level 0
    int exponent = (int)(bits >> 52);
    // bits of `largest` above 2^40 units of level 0
    int above = (exponent ? exponent + 52 : 64 - __builtin_clzll(bits)) - 40;
    int level = above <= 0 ? 0 : (above + 31) / 32;
    // 1.5 * 2^52 units: its last place is one unit.
    double cutter = bits_double((opd_u64)(32 * level - 1074 + 52 + 1023) << 52) * 1.5;
    double total = 0, remaining = 0;
    OPD_SIMD(reduction(+ : total) reduction(max : remaining))
    for (int i = 0; i < n; i++) {
      double piece = (values[i] + cutter) - cutter;
      double left = values[i] - piece;
      values[i] = left;
      total += piece;
      double magnitude = left < 0 ? -left : left;
      remaining = magnitude > remaining ? magnitude : remaining;
    }
    int scale = 1074 - 32 * level;                               // up to 1074: two factors, each a normal double
    opd_i64 integer = (opd_i64)(total * power_of_two(scale / 2) * power_of_two(scale - scale / 2));
    integer = sign < 0 ? -integer : integer;
    sum_add(limbs, integer, 32 * level);
    largest = remaining;
  }
}
}  // namespace OPD_ISA
