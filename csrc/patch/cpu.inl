// CPU loops of `patch`. Included once per instruction set.
//
// Bits are compared, 64 coordinates per mask word; the changed values are compressed, or expanded back. The digests are
// computed on one KiB at a time while it is in the L1 cache, so memory is read once.
#include "cpu.h"

namespace OPD_ISA {
#define OPD_PATCH_WORDS (OPD_PATCH_BLOCK / 64)

alignas(64) static const unsigned char hash_secret[OPD_HASH_SECRET_BYTES] = {OPD_HASH_SECRET};

OPD_FN opd_u64 read_word(const unsigned char* at) {
  opd_u64 word;
  __builtin_memcpy(&word, at, 8);
  return word;
}

// The widest vectors of words, with the one multiplication the digest needs.
#if defined(OPD_AVX512)
typedef __m512i HashVector;
OPD_FN HashVector hash_load(const unsigned char* at) { return _mm512_loadu_si512(at); }
OPD_FN void hash_store(opd_u64* at, HashVector x) { _mm512_storeu_si512(at, x); }
OPD_FN HashVector hash_zero() { return _mm512_setzero_si512(); }
OPD_FN HashVector hash_add(HashVector a, HashVector b) { return _mm512_add_epi64(a, b); }
OPD_FN HashVector hash_mix(HashVector word, HashVector key) {
  HashVector mixed = _mm512_xor_si512(word, key);
  // Masked, because GCC 12 warns in its own header for the unmasked intrinsics.
  return _mm512_maskz_mul_epu32(0xFF, mixed, _mm512_maskz_srli_epi64(0xFF, mixed, 32));
}
#elif defined(OPD_AVX2)
typedef __m256i HashVector;
OPD_FN HashVector hash_load(const unsigned char* at) { return _mm256_loadu_si256((const __m256i*)at); }
OPD_FN void hash_store(opd_u64* at, HashVector x) { _mm256_storeu_si256((__m256i*)at, x); }
OPD_FN HashVector hash_zero() { return _mm256_setzero_si256(); }
OPD_FN HashVector hash_add(HashVector a, HashVector b) { return _mm256_add_epi64(a, b); }
OPD_FN HashVector hash_mix(HashVector word, HashVector key) {
  HashVector mixed = _mm256_xor_si256(word, key);
  return _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
}
#elif defined(__SSE2__)
typedef __m128i HashVector;
OPD_FN HashVector hash_load(const unsigned char* at) { return _mm_loadu_si128((const __m128i*)at); }
OPD_FN void hash_store(opd_u64* at, HashVector x) { _mm_storeu_si128((__m128i*)at, x); }
OPD_FN HashVector hash_zero() { return _mm_setzero_si128(); }
OPD_FN HashVector hash_add(HashVector a, HashVector b) { return _mm_add_epi64(a, b); }
OPD_FN HashVector hash_mix(HashVector word, HashVector key) {
  HashVector mixed = _mm_xor_si128(word, key);
  return _mm_mul_epu32(mixed, _mm_srli_epi64(mixed, 32));
}
#else
typedef opd_u64 HashVector;
OPD_FN HashVector hash_load(const unsigned char* at) { return read_word(at); }
OPD_FN void hash_store(opd_u64* at, HashVector x) { *at = x; }
OPD_FN HashVector hash_zero() { return 0; }
OPD_FN HashVector hash_add(HashVector a, HashVector b) { return a + b; }
OPD_FN HashVector hash_mix(HashVector word, HashVector key) { return hash_product(word, key); }
#endif

struct Hash {
  opd_u64 state[8];
};

static void hash_begin(Hash& hash) {
  const opd_u64 start[8] = {OPD_HASH_START};
  __builtin_memcpy(hash.state, start, sizeof start);
}

// Adds one unit to the state. Products and plain words are summed separately: words are added to the adjacent word of
// the state, and exchanging them once per unit is cheaper than once per stripe. The last unit of an input has a
// different key in its last stripe, and no scramble.
static void hash_unit(Hash& hash, const unsigned char* unit, bool last) {
  constexpr int LANES = (int)sizeof(HashVector) / 8, VECTORS = 8 / LANES;
  HashVector products[VECTORS], words[VECTORS];
  for (int j = 0; j < VECTORS; j++) products[j] = words[j] = hash_zero();
  auto stripe = [&](int s, const unsigned char* key) {
    for (int j = 0; j < VECTORS; j++) {
      HashVector word = hash_load(unit + 64 * s + 8 * LANES * j);
      products[j] = hash_add(products[j], hash_mix(word, hash_load(key + 8 * LANES * j)));
      words[j] = hash_add(words[j], word);
    }
  };
  for (int s = 0; s < 15; s++) stripe(s, hash_secret + 8 * s);
  stripe(15, hash_secret + (last ? OPD_HASH_LAST : 8 * 15));
  opd_u64 product[8], word[8];
  for (int j = 0; j < VECTORS; j++) {
    hash_store(product + LANES * j, products[j]);
    hash_store(word + LANES * j, words[j]);
  }
  for (int i = 0; i < 8; i++) {
    hash.state[i] += product[i] + word[i ^ 1];
    if (!last) hash.state[i] = hash_scramble(hash.state[i], read_word(hash_secret + OPD_HASH_SCRAMBLE + 8 * i));
  }
}

static opd_u64 hash_merge(const Hash& hash, const unsigned char* key, opd_u64 start) {
  for (int i = 0; i < 4; i++) {
    const opd_u64 a = hash.state[2 * i] ^ read_word(key + 16 * i);
    const opd_u64 b = hash.state[2 * i + 1] ^ read_word(key + 16 * i + 8);
    start += hash_fold(a, b);
  }
  return hash_avalanche(start);
}

static void hash_end(const Hash& hash, opd_u64 bytes, opd_u64* digest) {
  digest[0] = hash_merge(hash, hash_secret + OPD_HASH_LOW, bytes * OPD_HASH_PRIME64_1);
  digest[1] = hash_merge(hash, hash_secret + OPD_HASH_HIGH, ~(bytes * OPD_HASH_PRIME64_2));
}

// The digest of a block, added unit by unit; a partial unit is padded with zeros.
struct BlockHash {
  Hash hash;
  int bytes, done = 0;
  explicit BlockHash(int block_bytes) : bytes(block_bytes) { hash_begin(hash); }
  void add(const void* unit, int unit_bytes) {
    done += OPD_HASH_UNIT;
    alignas(64) unsigned char padded[OPD_HASH_UNIT];
    if (unit_bytes < OPD_HASH_UNIT) {
      __builtin_memset(padded, 0, OPD_HASH_UNIT);
      __builtin_memcpy(padded, unit, (opd_u64)unit_bytes);
      unit = padded;
    }
    hash_unit(hash, (const unsigned char*)unit, done >= bytes);
  }
  void end(opd_u64* digest) const { hash_end(hash, (opd_u64)done, digest); }
};

static void patch_digest(const void* data, int bytes, opd_u64* digest) {
  BlockHash hash(bytes);
  for (int at = 0; at < bytes; at += OPD_HASH_UNIT)
    hash.add((const unsigned char*)data + at, bytes - at < OPD_HASH_UNIT ? bytes - at : OPD_HASH_UNIT);
  hash.end(digest);
}

// One bit for each of 64 bytes, which are 0 or 0xFF.
OPD_FN opd_u64 bits_of_bytes(const unsigned char* flags) {
#if defined(OPD_AVX512)
  return _mm512_movepi8_mask(_mm512_loadu_si512(flags));
#elif defined(OPD_AVX2)
  opd_u64 low = (opd_u32)_mm256_movemask_epi8(_mm256_loadu_si256((const __m256i*)flags));
  return low | (opd_u64)(opd_u32)_mm256_movemask_epi8(_mm256_loadu_si256((const __m256i*)(flags + 32))) << 32;
#else
  opd_u64 bits = 0;
  for (int i = 0; i < 8; i++)
    bits |= ((read_word(flags + 8 * i) & 0x0101010101010101ull) * 0x0102040810204080ull >> 56) << 8 * i;
  return bits;
#endif
}

// One bit for each of 64 coordinates that differs.
template <class T>
OPD_FN opd_u64 differing(const T* w, const T* v) {
  alignas(64) unsigned char flags[64];
  OPD_SIMD()
  for (int i = 0; i < 64; i++) flags[i] = w[i] != v[i] ? 0xFF : 0;
  return bits_of_bytes(flags);
}

// As `differing`, for n < 64 coordinates.
template <class T>
static opd_u64 differing_some(const T* w, const T* v, int n) {
  opd_u64 bits = 0;
  for (int i = 0; i < n; i++) bits |= (opd_u64)(w[i] != v[i]) << i;
  return bits;
}

// Writes the stored values of the chosen of 64 coordinates to `out` and returns their number; the vector versions may
// write 64.
template <class T>
OPD_FN int compress_chosen(const T* w, const T* v, opd_u64 chosen, T difference, T* out) {
  int k = 0;
  for (; chosen; chosen &= chosen - 1) {
    int i = __builtin_ctzll(chosen);
    out[k++] = patch_stored(w[i], v[i], difference);
  }
  return k;
}

// Restores the chosen of n coordinates and copies the others from the base. Returns the number of values used.
template <class T>
OPD_FN int expand_chosen(const T* w, opd_u64 chosen, const T* values, T difference, int n, T* out) {
  if (out != w) __builtin_memcpy(out, w, (opd_u64)n * sizeof(T));
  int k = 0;
  for (; chosen; chosen &= chosen - 1) {
    int i = __builtin_ctzll(chosen);
    out[i] = patch_restored(w[i], values[k++], difference);
  }
  return k;
}

// As above for 64 coordinates, with vectors where these are faster; at least 64 values must be readable.
template <class T>
OPD_FN int compress_word(const T* w, const T* v, opd_u64 chosen, T difference, T* out) {
  return compress_chosen(w, v, chosen, difference, out);
}
template <class T>
OPD_FN int expand_word(const T* w, opd_u64 chosen, const T* values, T difference, T* out) {
  return expand_chosen(w, chosen, values, difference, 64, out);
}

#if defined(OPD_AVX512)
// Compression and expansion use registers: with a memory operand the instructions are microcoded on Zen 4.
#define OPD_PATCH_WORD(T, BITS, LANES, MASK)                                                                          \
  OPD_FN int compress_word(const T* w, const T* v, opd_u64 chosen, T difference, T* out) {                            \
    const __m512i keep = _mm512_set1_epi##BITS((int)difference);                                                      \
    int k = 0;                                                                                                        \
    for (int i = 0; i < 64; i += LANES) {                                                                             \
      MASK bits = (MASK)(chosen >> i);                                                                                \
      __m512i old = _mm512_and_si512(_mm512_loadu_si512(w + i), keep);                                                \
      __m512i stored = _mm512_sub_epi##BITS(_mm512_loadu_si512(v + i), old);                                          \
      _mm512_storeu_si512(out + k, _mm512_maskz_compress_epi##BITS(bits, stored));                                    \
      k += __builtin_popcountll(bits);                                                                                \
    }                                                                                                                 \
    return k;                                                                                                         \
  }                                                                                                                   \
  OPD_FN int expand_word(const T* w, opd_u64 chosen, const T* values, T difference, T* out) {                         \
    const __m512i keep = _mm512_set1_epi##BITS((int)difference);                                                      \
    int k = 0;                                                                                                        \
    for (int i = 0; i < 64; i += LANES) {                                                                             \
      MASK bits = (MASK)(chosen >> i);                                                                                \
      __m512i old = _mm512_loadu_si512(w + i);                                                                        \
      __m512i spread = _mm512_maskz_expand_epi##BITS(bits, _mm512_loadu_si512(values + k));                           \
      spread = _mm512_add_epi##BITS(spread, _mm512_and_si512(old, keep));                                             \
      _mm512_storeu_si512(out + i, _mm512_mask_blend_epi##BITS(bits, old, spread));                                   \
      k += __builtin_popcountll(bits);                                                                                \
    }                                                                                                                 \
    return k;                                                                                                         \
  }
OPD_PATCH_WORD(unsigned char, 8, 64, opd_u64)
OPD_PATCH_WORD(opd_u16, 16, 32, opd_u32)
OPD_PATCH_WORD(opd_u32, 32, 16, opd_u16)
#undef OPD_PATCH_WORD
#elif defined(OPD_AVX2)
// Byte shuffles that move 16-bit lanes from the front to the chosen of eight lanes; 0x80 (zero the byte) elsewhere.
struct ExpandTable {
  unsigned char shuffle[256][16];
  ExpandTable() {
    for (int mask = 0; mask < 256; mask++)
      for (int lane = 0, k = 0; lane < 8; lane++) {
        const bool chosen = mask >> lane & 1;
        shuffle[mask][2 * lane] = (unsigned char)(chosen ? 2 * k : 0x80);
        shuffle[mask][2 * lane + 1] = (unsigned char)(chosen ? 2 * k + 1 : 0x80);
        k += chosen;
      }
  }
};
static const ExpandTable expand_table;

OPD_FN int compress_word(const opd_u16* w, const opd_u16* v, opd_u64 chosen, opd_u16 difference, opd_u16* out) {
  const __m128i keep = _mm_set1_epi16((short)difference);
  int k = 0;
  for (int i = 0; i < 64; i += 8, chosen >>= 8) {
    __m128i old = _mm_loadu_si128((const __m128i*)(w + i)), changed = _mm_loadu_si128((const __m128i*)(v + i));
    __m128i pick = _mm_loadu_si128((const __m128i*)compress_table.shuffle[chosen & 0xFF]);
    __m128i stored = _mm_sub_epi16(changed, _mm_and_si128(old, keep));
    _mm_storeu_si128((__m128i*)(out + k), _mm_shuffle_epi8(stored, pick));
    k += __builtin_popcount((unsigned)chosen & 0xFF);
  }
  return k;
}

OPD_FN int expand_word(const opd_u16* w, opd_u64 chosen, const opd_u16* values, opd_u16 difference, opd_u16* out) {
  const __m128i keep = _mm_set1_epi16((short)difference);
  int k = 0;
  for (int i = 0; i < 64; i += 8, chosen >>= 8) {
    __m128i old = _mm_loadu_si128((const __m128i*)(w + i));
    __m128i pick = _mm_loadu_si128((const __m128i*)expand_table.shuffle[chosen & 0xFF]);
    __m128i spread = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(values + k)), pick);
    spread = _mm_add_epi16(spread, _mm_and_si128(old, keep));
    _mm_storeu_si128((__m128i*)(out + i), _mm_blendv_epi8(spread, old, pick));
    k += __builtin_popcount((unsigned)chosen & 0xFF);
  }
  return k;
}
#endif

// Writes the offsets of the set bits of a mask of n bits, in increasing order, two bytes each.
static void offsets_of(const opd_u64* mask, int n, unsigned char* offsets) {
  for (int i = 0; 64 * i < n; i++)
    for (opd_u64 word = mask[i]; word; word &= word - 1) {
      opd_u16 offset = (opd_u16)(64 * i + __builtin_ctzll(word));
      __builtin_memcpy(offsets, &offset, 2);
      offsets += 2;
    }
}

// Converts the positions of a block to a mask, zero from bit n. Returns false unless they are `count` increasing
// offsets below n, or a mask with `count` set bits, all below n.
static bool mask_of(const unsigned char* positions, int count, int n, opd_u64* mask) {
  const int bytes = patch_position_bytes(count, n), words = (n + 63) / 64;
  __builtin_memset(mask, 0, 8 * (opd_u64)words);
  if (bytes < patch_mask_bytes(n)) {
    int before = -1;
    for (int i = 0; i < count; i++) {
      opd_u16 offset;
      __builtin_memcpy(&offset, positions + 2 * i, 2);
      if ((int)offset <= before || (int)offset >= n) return false;
      before = offset;
      mask[offset >> 6] |= 1ull << (offset & 63);
    }
    return true;
  }
  __builtin_memcpy(mask, positions, (opd_u64)bytes);
  int total = 0;
  for (int i = 0; i < words; i++) total += __builtin_popcountll(mask[i]);
  return total == count && (n % 64 == 0 || mask[words - 1] >> n % 64 == 0);
}

static int patch_check(const unsigned char* positions, int count, int n) {
  static thread_local opd_u64 mask[OPD_PATCH_WORDS];
  return mask_of(positions, count, n, mask);
}

template <class T>
static int gather_block(const T* w, const T* v, int n, T difference, unsigned char* positions, T* values,
                        opd_u64* digest_w, opd_u64* digest_v) {
  constexpr int UNIT = OPD_HASH_UNIT / (int)sizeof(T);
  static thread_local opd_u64 mask[OPD_PATCH_WORDS];
  BlockHash hash_w(n * (int)sizeof(T)), hash_v(n * (int)sizeof(T));
  int count = 0;
  for (int start = 0; start < n; start += UNIT) {
    const int stop = n - start < UNIT ? n : start + UNIT;
    int i = start;
    for (; i + 64 <= stop; i += 64) {
      opd_u64 differ = mask[i >> 6] = differing(w + i, v + i);
      if (differ) count += compress_word(w + i, v + i, differ, difference, values + count);
    }
    if (i < stop) {
      opd_u64 differ = mask[i >> 6] = differing_some(w + i, v + i, stop - i);
      count += compress_chosen(w + i, v + i, differ, difference, values + count);
    }
    hash_w.add(w + start, (stop - start) * (int)sizeof(T));
    hash_v.add(v + start, (stop - start) * (int)sizeof(T));
  }
  hash_w.end(digest_w);
  hash_v.end(digest_v);
  const int bytes = patch_position_bytes(count, n);
  if (bytes < patch_mask_bytes(n)) offsets_of(mask, n, positions);
  else __builtin_memcpy(positions, mask, (opd_u64)bytes);
  return count;
}

template <class T>
static int scatter_block(const T* w, int n, T difference, int count, const unsigned char* positions, const T* values,
                         opd_i64 readable, T* out, opd_u64* digest) {
  constexpr int UNIT = OPD_HASH_UNIT / (int)sizeof(T);
  static thread_local opd_u64 mask[OPD_PATCH_WORDS];
  if (!mask_of(positions, count, n, mask)) return 0;
  BlockHash hash(n * (int)sizeof(T));
  opd_i64 used = 0;
  for (int start = 0; start < n; start += UNIT) {
    const int stop = n - start < UNIT ? n : start + UNIT;
    int i = start;
    for (; i + 64 <= stop; i += 64) {
      const opd_u64 chosen = mask[i >> 6];
      // A vector reads beyond the values that it uses: near the end of all values they are read one by one.
      if (chosen && readable - used >= 128) used += expand_word(w + i, chosen, values + used, difference, out + i);
      else used += expand_chosen(w + i, chosen, values + used, difference, 64, out + i);
    }
    if (i < stop) used += expand_chosen(w + i, mask[i >> 6], values + used, difference, stop - i, out + i);
    hash.add(out + start, (stop - start) * (int)sizeof(T));
  }
  hash.end(digest);
  return 1;
}

// `bytes` is the width of a coordinate. Returns the number of changed coordinates.
static int patch_gather(const void* w, const void* v, int bytes, int n, int difference, unsigned char* positions,
                        void* values, opd_u64* digest_w, opd_u64* digest_v) {
  const opd_u64 keep = difference ? ~0ull : 0;
  if (bytes == 1)
    return gather_block((const unsigned char*)w, (const unsigned char*)v, n, (unsigned char)keep, positions,
                        (unsigned char*)values, digest_w, digest_v);
  if (bytes == 2)
    return gather_block((const opd_u16*)w, (const opd_u16*)v, n, (opd_u16)keep, positions, (opd_u16*)values,
                        digest_w, digest_v);
  if (bytes == 4)
    return gather_block((const opd_u32*)w, (const opd_u32*)v, n, (opd_u32)keep, positions, (opd_u32*)values,
                        digest_w, digest_v);
  return gather_block((const opd_u64*)w, (const opd_u64*)v, n, keep, positions, (opd_u64*)values,
                      digest_w, digest_v);
}

// `readable` is the number of values from `values` to the end of all values. Returns 0 if the positions are invalid.
static int patch_scatter(const void* w, int bytes, int n, int difference, int count, const unsigned char* positions,
                         const void* values, opd_i64 readable, void* out, opd_u64* digest) {
  const opd_u64 keep = difference ? ~0ull : 0;
  if (bytes == 1)
    return scatter_block((const unsigned char*)w, n, (unsigned char)keep, count, positions,
                         (const unsigned char*)values, readable, (unsigned char*)out, digest);
  if (bytes == 2)
    return scatter_block((const opd_u16*)w, n, (opd_u16)keep, count, positions, (const opd_u16*)values,
                         readable, (opd_u16*)out, digest);
  if (bytes == 4)
    return scatter_block((const opd_u32*)w, n, (opd_u32)keep, count, positions, (const opd_u32*)values,
                         readable, (opd_u32*)out, digest);
  return scatter_block((const opd_u64*)w, n, keep, count, positions, (const opd_u64*)values,
                       readable, (opd_u64*)out, digest);
}

const PatchKernels patch_kernels = {patch_gather, patch_scatter, patch_check, patch_digest};
}  // namespace OPD_ISA
