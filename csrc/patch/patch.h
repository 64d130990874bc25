// The arithmetic of `patch` for one coordinate w -> v, as bits, and the steps of the digest.
// opdkernels/ops/patch/layout.py repeats the constants (tests/ops/test_layout.py compares).
#pragma once
#include "../common/numeric.h"

#define OPD_PATCH_BLOCK 65536  // coordinates of one count, one list of positions and one digest: an offset has 16 bits
#define OPD_HASH_UNIT 1024     // bytes between two scrambles of XXH3: 16 stripes of 8 words

// `difference` is all ones if differences modulo 2^bits are stored, zero if the trained bits are stored.
template <class T> OPD_FN T patch_stored(T w, T v, T difference) { return (T)(v - (w & difference)); }
template <class T> OPD_FN T patch_restored(T w, T stored, T difference) { return (T)(stored + (w & difference)); }

// The positions of a block of n coordinates are 16-bit offsets if these are shorter than a bit mask, else a bit mask.
OPD_FN int patch_mask_bytes(int n) { return (n + 7) / 8; }
OPD_FN int patch_position_bytes(int count, int n) {
  return 2 * count < patch_mask_bytes(n) ? 2 * count : patch_mask_bytes(n);
}

// XXH3, 128 bits, seed 0, of inputs whose length is a multiple of OPD_HASH_UNIT (Collet, xxHash specification 0.8).
#define OPD_HASH_SECRET_BYTES 192
#define OPD_HASH_SECRET                                                                             \
  0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,   \
  0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,   \
  0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,   \
  0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,   \
  0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,   \
  0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,   \
  0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,   \
  0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,   \
  0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,   \
  0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,   \
  0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,   \
  0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e

#define OPD_HASH_PRIME32_1 0x9E3779B1ull
#define OPD_HASH_PRIME32_2 0x85EBCA77ull
#define OPD_HASH_PRIME32_3 0xC2B2AE3Dull
#define OPD_HASH_PRIME64_1 0x9E3779B185EBCA87ull
#define OPD_HASH_PRIME64_2 0xC2B2AE3D27D4EB4Full
#define OPD_HASH_PRIME64_3 0x165667B19E3779F9ull
#define OPD_HASH_PRIME64_4 0x85EBCA77C2B2AE63ull
#define OPD_HASH_PRIME64_5 0x27D4EB2F165667C5ull
#define OPD_HASH_AVALANCHE 0x165667919E3779F9ull

// The initial state, eight words.
#define OPD_HASH_START                                                                              \
  OPD_HASH_PRIME32_3, OPD_HASH_PRIME64_1, OPD_HASH_PRIME64_2, OPD_HASH_PRIME64_3,                   \
  OPD_HASH_PRIME64_4, OPD_HASH_PRIME32_2, OPD_HASH_PRIME64_5, OPD_HASH_PRIME32_1

// Offsets in the secret: the keys of the last stripe of a block, of the scramble, and of the low and the high word of
// the digest. The keys of the other stripes are at 0, 8, 16, ...
#define OPD_HASH_LAST (OPD_HASH_SECRET_BYTES - 71)
#define OPD_HASH_SCRAMBLE (OPD_HASH_SECRET_BYTES - 64)
#define OPD_HASH_LOW 11
#define OPD_HASH_HIGH (OPD_HASH_SECRET_BYTES - 75)

OPD_FN opd_u64 hash_product(opd_u64 word, opd_u64 key) {
  opd_u64 mixed = word ^ key;
  return (mixed & 0xFFFFFFFFu) * (mixed >> 32);
}
OPD_FN opd_u64 hash_scramble(opd_u64 state, opd_u64 key) { return (state ^ state >> 47 ^ key) * OPD_HASH_PRIME32_1; }

// XOR of the two halves of the 128-bit product a * b.
OPD_FN opd_u64 hash_fold(opd_u64 a, opd_u64 b) {
  opd_u64 a0 = a & 0xFFFFFFFFu, a1 = a >> 32, b0 = b & 0xFFFFFFFFu, b1 = b >> 32;
  opd_u64 middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (middle & 0xFFFFFFFFu);
  return (a1 * b1 + (middle >> 32) + (other >> 32)) ^ (a * b);
}
OPD_FN opd_u64 hash_avalanche(opd_u64 h) {
  h = (h ^ h >> 37) * OPD_HASH_AVALANCHE;
  return h ^ h >> 32;
}
