// `patch` on a CUDA device: one pass over both tensors finds the changes, a second compresses them; one pass scatters
// them.
//
// `compare`, one block of threads per block of 65,536 coordinates, writes change bits, their number per 2,048 and per
// block, and the digests. `plan` computes where the values and positions of each block begin; nothing is copied to the
// host. `compress` queues the changed coordinates by the change bits, as `step` queues the active ones, and writes
// positions and values consecutively.
//
// In the other direction, `plan` validates counts and lengths, `decode` validates the positions of a block and converts
// either form to change bits; `restore` reads these, the base and the values, and writes the trained tensor and its
// digests. `decode` does nothing if a length is wrong, and `restore` does nothing if a block is invalid, so no address
// is computed from unchecked data.
//
// Digests. XXH3 adds the 16 stripes of a unit of 1,024 bytes in any order, and scrambles its state between units. A
// warp sums a unit from the registers that hold it, two times 16 bytes per lane. At the end one warp combines the units
// in shared memory, one lane per word of the state, while another block of the multiprocessor loads.
#include "patch.h"
#include "../common/cuda/active.h"

#define OPD_PATCH_THREADS 512
#define OPD_PATCH_CHUNKS (OPD_PATCH_BLOCK / OPD_MASK_BLOCK)
#define OPD_PATCH_WORDS (OPD_PATCH_BLOCK / 32)  // change bits of a block
#define OPD_PATCH_VALID (1ll << 62)             // status if no block is invalid: larger than any block index

OPD_CONSTANT opd_u8 hash_secret[OPD_HASH_SECRET_BYTES] = {OPD_HASH_SECRET};
OPD_CONSTANT opd_u64 hash_start[8] = {OPD_HASH_START};

__device__ __forceinline__ opd_u64 secret_word(int at) {
  opd_u64 word = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) word |= (opd_u64)hash_secret[at + i] << 8 * i;
  return word;
}

template <class T>
OPD_FN T value_of(const Vector& x, int j) {
  if (sizeof(T) == 1) return (T)(x.word[j >> 2 & 3] >> 8 * (j & 3));
  if (sizeof(T) == 2) return (T)half_of(x, j);
  if (sizeof(T) == 4) return (T)x.word[j & 3];
  return (T)((opd_u64)x.word[(2 * j + 1) & 3] << 32 | x.word[2 * j & 3]);
}

template <class T>
OPD_FN void set_value(Vector& x, int j, T value) {
  if (sizeof(T) == 8) {
    x.word[2 * j & 3] = (opd_u32)value;
    x.word[(2 * j + 1) & 3] = (opd_u32)((opd_u64)value >> 32);
    return;
  }
  const int bits = 8 * (int)sizeof(T), place = bits * j, shift = place & 31;
  const opd_u32 all = bits == 32 ? ~0u : (1u << (bits & 31)) - 1;
  x.word[place >> 5 & 3] = (x.word[place >> 5 & 3] & ~(all << shift)) | (opd_u32)value << shift;
}

// Stores values [i, i + 16 / sizeof(T)) below n; one store if all are below n and the address is aligned.
template <class T>
__device__ __forceinline__ void store(T* out, opd_i64 i, opd_i64 n, const Vector& x) {
  const int V = 16 / (int)sizeof(T);
  if (i + V <= n && ((opd_u64)(out + i) & 15) == 0) {
    *(uint4*)(out + i) = {x.word[0], x.word[1], x.word[2], x.word[3]};
    return;
  }
#pragma unroll
  for (int j = 0; j < V; j++)
    if (i + j < n) out[i + j] = value_of<T>(x, j);
}

// The keys that a lane uses: those of its stripe in the first and the second half of a unit, and in the second half of
// the last unit of a block.
struct Keys { opd_u64 first[2], second[2], last[2]; };

__device__ __forceinline__ Keys load_keys() {
  const int stripe = threadIdx.x % OPD_WARP / 4, at = threadIdx.x % 4 * 16;
  Keys keys;
  for (int k = 0; k < 2; k++) {
    keys.first[k] = secret_word(8 * stripe + at + 8 * k);
    keys.second[k] = secret_word(8 * (stripe + 8) + at + 8 * k);
    keys.last[k] = secret_word((stripe == 7 ? OPD_HASH_LAST : 8 * (stripe + 8)) + at + 8 * k);
  }
  return keys;
}

// Stores what a unit adds to the eight words of the state. The data of each word is also added to the adjacent word.
__device__ __forceinline__ void sum_unit(const Vector half[2], const Keys& keys, bool last, opd_u64* sums) {
  const int lane = threadIdx.x % OPD_WARP;
  opd_u64 even = 0, odd = 0;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const opd_u64 a = value_of<opd_u64>(half[h], 0), b = value_of<opd_u64>(half[h], 1);
    even += hash_product(a, h == 0 ? keys.first[0] : last ? keys.last[0] : keys.second[0]) + b;
    odd += hash_product(b, h == 0 ? keys.first[1] : last ? keys.last[1] : keys.second[1]) + a;
  }
#pragma unroll
  for (int by = 4; by < OPD_WARP; by *= 2) {
    even += __shfl_xor_sync(OPD_ALL_LANES, even, by);
    odd += __shfl_xor_sync(OPD_ALL_LANES, odd, by);
  }
  if (lane < 4) {
    sums[2 * lane] = even;
    sums[2 * lane + 1] = odd;
  }
}

// The last step of XXH3: returns one word of the digest. Each of eight lanes holds one word of the state.
__device__ __forceinline__ opd_u64 merge(opd_u64 state, int key, opd_u64 start) {
  const opd_u64 mixed = state ^ secret_word(key + 8 * (threadIdx.x % 8));
  opd_u64 total = hash_fold(mixed, __shfl_xor_sync(OPD_ALL_LANES, mixed, 1));
  total += __shfl_xor_sync(OPD_ALL_LANES, total, 2);
  total += __shfl_xor_sync(OPD_ALL_LANES, total, 4);
  return hash_avalanche(start + total);
}

// Computes the digests of a block of one or two tensors (sides), at digests[2 * side * stride], from the sums of their
// units. Only the first warp works.
__device__ __forceinline__ void finish_digests(const opd_u64* sums, int units, int sides, opd_u64* digests,
                                               opd_i64 stride) {
  if (threadIdx.x >= OPD_WARP) return;
  const int word = threadIdx.x % 8, side = threadIdx.x / 8, bytes = units * OPD_HASH_UNIT;
  const opd_u64 scramble = secret_word(OPD_HASH_SCRAMBLE + 8 * word);
  const opd_u64* at = sums + (side < sides ? side : 0) * units * 8 + word;
  opd_u64 state = hash_start[word];
#pragma unroll 4
  for (int unit = 0; unit + 1 < units; unit++) state = hash_scramble(state + at[8 * unit], scramble);
  state += at[8 * (units - 1)];
  const opd_u64 low = merge(state, OPD_HASH_LOW, bytes * OPD_HASH_PRIME64_1);
  const opd_u64 high = merge(state, OPD_HASH_HIGH, ~(bytes * OPD_HASH_PRIME64_2));
  if (word == 0 && side < sides) {
    digests[2 * side * stride] = low;
    digests[2 * side * stride + 1] = high;
  }
}

// A block of coordinates and the units of its bytes. A warp processes 2,048 coordinates at a time.
template <class T>
struct Range {
  static const int V = 16 / (int)sizeof(T), UNIT = OPD_HASH_UNIT / (int)sizeof(T), UNITS = OPD_MASK_BLOCK / UNIT;
  opd_i64 first;
  int size, units;
  __device__ __forceinline__ explicit Range(opd_i64 n) {
    first = (opd_i64)blockIdx.x * OPD_PATCH_BLOCK;
    size = n - first < OPD_PATCH_BLOCK ? (int)(n - first) : OPD_PATCH_BLOCK;
    units = (size + UNIT - 1) / UNIT;
  }
  __device__ __forceinline__ int end_of(int chunk) const {
    return (chunk + 1) * UNITS < units ? (chunk + 1) * UNITS : units;
  }
  // Coordinate of the first value of a lane in a half of a unit.
  __device__ __forceinline__ opd_i64 place(int unit, int half) const {
    return first + (opd_i64)unit * UNIT + half * (UNIT / 2) + threadIdx.x % OPD_WARP * V;
  }
};

// Combines the V change bits of each of 32 / V lanes into one word, returned in all of these lanes.
template <int V>
__device__ __forceinline__ opd_u32 word_of_lanes(opd_u32 bits) {
  bits <<= V * (threadIdx.x % (32 / V));
#pragma unroll
  for (int by = 1; by < 32 / V; by *= 2) bits |= __shfl_xor_sync(OPD_ALL_LANES, bits, by);
  return bits;
}

// Changes in the chunks of a block before `chunk`; all lanes take part.
__device__ __forceinline__ opd_i64 changes_before(const opd_u32* chunk_counts, opd_i64 block, int chunk) {
  const int lane = threadIdx.x % OPD_WARP;
  return warp_sum(lane < chunk ? chunk_counts[block * OPD_PATCH_CHUNKS + lane] : 0);
}
static_assert(OPD_PATCH_CHUNKS == OPD_WARP, "one lane per chunk of a block");

template <class T>
__device__ __forceinline__ void compare(const T* base, const T* trained, opd_u32* mask, opd_u32* chunk_counts,
                                        int* counts, opd_u64* digests, opd_i64 n) {
  OPD_DYNAMIC_SHARED(shared);
  typedef Range<T> R;
  const R range(n);
  opd_u32& total = *(opd_u32*)shared;
  opd_u64* sums = (opd_u64*)shared + 1;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  const Keys keys = load_keys();
  const int lane = threadIdx.x % OPD_WARP;
  for (int chunk = threadIdx.x / OPD_WARP; chunk * OPD_MASK_BLOCK < range.size; chunk += blockDim.x / OPD_WARP) {
    opd_u32 changed = 0;
#pragma unroll 1
    for (int unit = chunk * R::UNITS; unit < range.end_of(chunk); unit++) {
      Vector w[2], v[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        w[h] = load<R::V>(base, sizeof(T), range.place(unit, h), n);
        v[h] = load<R::V>(trained, sizeof(T), range.place(unit, h), n);
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        opd_u32 differ = 0;
#pragma unroll
        for (int j = 0; j < R::V; j++)  // both are zero from coordinate n
          differ |= (opd_u32)(value_of<T>(w[h], j) != value_of<T>(v[h], j)) << j;
        changed += __popc(differ);
        const opd_u32 word = word_of_lanes<R::V>(differ);
        if (lane % (32 / R::V) == 0) mask[range.place(unit, h) / 32] = word;
      }
      sum_unit(w, keys, unit == range.units - 1, sums + 8 * unit);
      sum_unit(v, keys, unit == range.units - 1, sums + 8 * (range.units + unit));
    }
    changed = warp_sum(changed);
    if (lane == 0) {
      chunk_counts[(opd_i64)blockIdx.x * OPD_PATCH_CHUNKS + chunk] = changed;
      atomicAdd(&total, changed);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) counts[blockIdx.x] = (int)total;
  finish_digests(sums, range.units, 2, digests + 2 * (opd_i64)blockIdx.x, gridDim.x);
}

// Number of coordinates of a block.
OPD_FN int block_size(opd_i64 block, opd_i64 n) {
  return n - block * OPD_PATCH_BLOCK < OPD_PATCH_BLOCK ? (int)(n - block * OPD_PATCH_BLOCK) : OPD_PATCH_BLOCK;
}
// Whether the positions of a block are offsets.
OPD_FN bool listed(int count, int size) { return patch_position_bytes(count, size) < patch_mask_bytes(size); }

struct Plan {  // in shared memory
  opd_i64 warp_totals[2][OPD_PATCH_THREADS / OPD_WARP];
  opd_i64 first_bad;
};

// The sum of x over the threads before this one, and over all threads of a block. All threads take part. The next call
// takes other `warp_totals`: its barrier separates the reads of this one from later writes.
__device__ __forceinline__ opd_i64 sum_before(opd_i64 x, opd_i64* warp_totals, opd_i64& total) {
  const int lane = threadIdx.x % OPD_WARP, warp = threadIdx.x / OPD_WARP;
  const opd_i64 up_to = warp_scan(x);
  if (lane == OPD_WARP - 1) warp_totals[warp] = up_to;
  __syncthreads();
  opd_i64 before = 0;
  total = 0;
  for (int w = 0; w < (int)(blockDim.x / OPD_WARP); w++) {
    before += w < warp ? warp_totals[w] : 0;
    total += warp_totals[w];
  }
  return before + up_to - x;
}

__device__ __forceinline__ void plan(const int* counts, opd_i64* starts, opd_i64* value_starts, opd_i64* bad,
                                     opd_i64 n, opd_i64 blocks, opd_i64 positions, opd_i64 values) {
  OPD_DYNAMIC_SHARED(shared);
  Plan& all = *(Plan*)shared;
  if (threadIdx.x == 0) all.first_bad = OPD_PATCH_VALID;
  __syncthreads();
  opd_i64 bytes_before = 0, values_before = 0;
  for (opd_i64 first = 0; first < blocks; first += blockDim.x) {
    const opd_i64 block = first + threadIdx.x;
    const int size = block < blocks ? block_size(block, n) : 0, count = block < blocks ? counts[block] : 0;
    const bool possible = count >= 0 && count <= size;
    if (!possible) atomicMin(&all.first_bad, block);
    opd_i64 bytes, changed;
    const opd_i64 start = sum_before(possible ? patch_position_bytes(count, size) : 0, all.warp_totals[0], bytes);
    const opd_i64 value_start = sum_before(count, all.warp_totals[1], changed);
    if (block < blocks) {
      starts[block] = bytes_before + start;
      value_starts[block] = values_before + value_start;
    }
    bytes_before += bytes;
    values_before += changed;
  }
  if (threadIdx.x || !bad) return;  // the barriers of sum_before come after first_bad is lowered
  const opd_i64 lengths = bytes_before == positions && values_before == values ? OPD_PATCH_VALID : blocks;
  bad[0] = bad[1] = all.first_bad < lengths ? all.first_bad : lengths;
}

template <class T>
__device__ __forceinline__ void compress(const T* base, const T* trained, const opd_u8* mask,
                                         const opd_u32* chunk_counts, const int* counts, const opd_i64* starts,
                                         const opd_i64* value_starts, opd_u8* positions, T* values, opd_i64 n,
                                         bool difference) {
  OPD_DYNAMIC_SHARED(shared);
  const opd_i64 warps = blockDim.x / OPD_WARP, step = gridDim.x * warps;
  const int lane = threadIdx.x % OPD_WARP;
  opd_u16* queue = warp_queue(shared);
  for (opd_i64 chunk = blockIdx.x * warps + threadIdx.x / OPD_WARP; chunk * OPD_MASK_BLOCK < n; chunk += step) {
    const opd_i64 block = chunk / OPD_PATCH_CHUNKS;
    const opd_i64 before_in_block = changes_before(chunk_counts, block, (int)(chunk % OPD_PATCH_CHUNKS));
    const opd_i64 before = value_starts[block] + before_in_block;
    const int size = block_size(block, n), inside = (int)(chunk % OPD_PATCH_CHUNKS) * OPD_MASK_BLOCK;
    const bool offsets = listed(counts[block], size);
    opd_u8* to = positions + starts[block];
    const int chunk_end = (inside + OPD_MASK_BLOCK) / 8;
    for (int byte = inside / 8 + lane; !offsets && byte < chunk_end && byte < patch_mask_bytes(size); byte += OPD_WARP)
      to[byte] = mask[block * (OPD_PATCH_BLOCK / 8) + byte];
    if (!chunk_counts[chunk]) continue;
    to += 2 * before_in_block;
    const int count = queue_active(mask, chunk, n, queue);
    for (int k = lane; k < count; k += OPD_WARP) {
      const opd_i64 place = chunk * OPD_MASK_BLOCK + queue[k];
      values[before + k] = patch_stored(difference ? base[place] : (T)0, trained[place], (T)~(T)0);
      if (!offsets) continue;
      const int offset = inside + queue[k];
      to[2 * k] = (opd_u8)offset;
      to[2 * k + 1] = (opd_u8)(offset >> 8);
    }
    __syncwarp();  // the next queue overwrites what some lanes may still read
  }
}

// Sets the change bit of the k-th offset; false if the offset is not increasing or not within the block.
__device__ __forceinline__ bool add_offset(const opd_u8* positions, int k, int size, opd_u32* bits) {
  const int offset = positions[2 * k] | positions[2 * k + 1] << 8;
  const int previous = k ? positions[2 * k - 2] | positions[2 * k - 1] << 8 : -1;
  if (offset <= previous || offset >= size) return false;
  atomicOr(bits + offset / 32, 1u << offset % 32);
  return true;
}

struct Decoded {  // in shared memory
  opd_u32 bits[OPD_PATCH_WORDS];
  opd_u32 total, wrong;  // number of set bits; whether the positions are invalid
  opd_u32 is_last;       // whether this block of threads is the last one
};

__device__ __forceinline__ void decode(Decoded& decoded, const int* counts, const opd_i64* starts,
                                       const opd_u8* positions, opd_u32* mask, opd_u32* chunk_counts, opd_i64* bad,
                                       opd_i64 n) {
  const opd_i64 block = blockIdx.x;
  const int size = block_size(block, n), count = counts[block], lane = threadIdx.x % OPD_WARP;
  const bool offsets = listed(count, size);
  positions += starts[block];
  bool wrong = false;
  for (int w = threadIdx.x; w < OPD_PATCH_WORDS; w += blockDim.x) {
    const int left = size - 32 * w;
    const opd_u32 word = offsets ? 0 : mask_word(positions, w, 8 * patch_mask_bytes(size));
    wrong |= left > 0 && left < 32 && word >> left;
    decoded.bits[w] = word;
  }
  if (threadIdx.x == 0) decoded.total = decoded.wrong = 0;
  __syncthreads();
  for (int k = threadIdx.x; offsets && k < count; k += blockDim.x)
    wrong |= !add_offset(positions, k, size, decoded.bits);
  if (wrong) atomicOr(&decoded.wrong, 1u);
  __syncthreads();
  for (int chunk = threadIdx.x / OPD_WARP; chunk < OPD_PATCH_CHUNKS; chunk += blockDim.x / OPD_WARP) {
    opd_u32 chunk_total = 0;
    for (int w = OPD_MASK_WORDS * chunk + lane; w < OPD_MASK_WORDS * (chunk + 1); w += OPD_WARP) {
      mask[block * OPD_PATCH_WORDS + w] = decoded.bits[w];
      chunk_total += __popc(decoded.bits[w]);
    }
    chunk_total = warp_sum(chunk_total);
    if (lane == 0) {
      chunk_counts[block * OPD_PATCH_CHUNKS + chunk] = chunk_total;
      atomicAdd(&decoded.total, chunk_total);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && (decoded.wrong || decoded.total != (opd_u32)count)) atomicMin(bad, block);
}

// Arguments as `patch_decode`.
__device__ __forceinline__ void decode_all(const int* counts, const opd_i64* starts, const opd_u8* positions,
                                           opd_u32* mask, opd_u32* chunk_counts, opd_i64* bad, opd_i64* status,
                                           opd_u32* ticket, opd_i64 n) {
  OPD_DYNAMIC_SHARED(shared);
  Decoded& decoded = *(Decoded*)shared;
  if (n && bad[0] == OPD_PATCH_VALID) decode(decoded, counts, starts, positions, mask, chunk_counts, bad + 1, n);
  if (!is_last_block(ticket, &decoded.is_last) || threadIdx.x) return;
  const opd_i64 first_bad = __ldcg(bad + 1);
  *status = first_bad == OPD_PATCH_VALID ? -1 : first_bad;
  *ticket = 0;
}

// Restores the values of a lane in a unit. `slots` is the index of the first value of the unit, advanced to the next
// unit's.
template <class T>
__device__ __forceinline__ void restore_unit(Vector w[2], const opd_u32 chosen[2], const T* values, T difference,
                                             opd_i64& slots) {
  const opd_u32 lane_counts = __popc(chosen[0]) | __popc(chosen[1]) << 16;
  const opd_u32 reached = warp_scan(lane_counts);  // 16 bits for each half
  const opd_u32 all = __shfl_sync(OPD_ALL_LANES, reached, OPD_WARP - 1);
  const T* at[2] = {values + slots + ((reached - lane_counts) & 0xFFFFu),
                    values + slots + (all & 0xFFFFu) + ((reached - lane_counts) >> 16)};
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int j = 0; j < 16 / (int)sizeof(T); j++)
      if (chosen[h] >> j & 1) set_value<T>(w[h], j, patch_restored(value_of<T>(w[h], j), *at[h]++, difference));
  slots += (all & 0xFFFFu) + (all >> 16);
}

template <class T>
__device__ __forceinline__ void restore(const T* base, const opd_u32* mask, const opd_u32* chunk_counts,
                                        const opd_i64* value_starts, const T* values, const opd_i64* status, T* out,
                                        opd_u64* digests, opd_i64 n, T difference) {
  OPD_DYNAMIC_SHARED(shared);
  typedef Range<T> R;
  if (*status >= 0) return;
  const R range(n);
  opd_u64* sums = (opd_u64*)shared;
  const Keys keys = load_keys();
  for (int chunk = threadIdx.x / OPD_WARP; chunk * OPD_MASK_BLOCK < range.size; chunk += blockDim.x / OPD_WARP) {
    opd_i64 slots = value_starts[blockIdx.x] + changes_before(chunk_counts, blockIdx.x, chunk);
    const bool some = chunk_counts[(opd_i64)blockIdx.x * OPD_PATCH_CHUNKS + chunk] != 0;
#pragma unroll 1
    for (int unit = chunk * R::UNITS; unit < range.end_of(chunk); unit++) {
      Vector w[2];
      opd_u32 chosen[2] = {0, 0};
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const opd_i64 place = range.place(unit, h);
        w[h] = load<R::V>(base, sizeof(T), place, n);
        if (some) chosen[h] = mask[place / 32] >> place % 32 & ((1u << R::V) - 1);
      }
      if (some) restore_unit(w, chosen, values, difference, slots);
#pragma unroll
      for (int h = 0; h < 2; h++) store(out, range.place(unit, h), n, w[h]);
      sum_unit(w, keys, unit == range.units - 1, sums + 8 * unit);
    }
  }
  __syncthreads();
  finish_digests(sums, range.units, 1, digests + 2 * (opd_i64)blockIdx.x, 0);
}

// Digests of a tensor whose coordinates have `width` bytes.
__device__ __forceinline__ void digest(const opd_u8* values, opd_u64* digests, opd_i64 n, opd_i64 width) {
  OPD_DYNAMIC_SHARED(shared);
  opd_u64* sums = (opd_u64*)shared;
  const Keys keys = load_keys();
  const opd_i64 first = blockIdx.x * width * OPD_PATCH_BLOCK, bytes = n * width;
  const opd_i64 left = bytes - first, size = left < width * OPD_PATCH_BLOCK ? left : width * OPD_PATCH_BLOCK;
  const int units = (int)((size + OPD_HASH_UNIT - 1) / OPD_HASH_UNIT), lane = threadIdx.x % OPD_WARP;
#pragma unroll 2
  for (int unit = threadIdx.x / OPD_WARP; unit < units; unit += blockDim.x / OPD_WARP) {
    const opd_i64 at = first + (opd_i64)unit * OPD_HASH_UNIT + 16 * lane;
    const Vector half[2] = {load<16>(values, 1, at, bytes), load<16>(values, 1, at + OPD_HASH_UNIT / 2, bytes)};
    sum_unit(half, keys, unit == units - 1, sums + 8 * unit);
  }
  __syncthreads();
  finish_digests(sums, units, 1, digests + 2 * (opd_i64)blockIdx.x, 0);
}

// Prefix sums over the blocks of coordinates, and whether counts and lengths are possible; one block of threads.
// counts: [blocks]; starts, value_starts: int64 [blocks], the first byte of the positions and the first value of each
// block; bad: int64 [2] or null, both elements are the first block with an impossible count, else the number of blocks
// if `positions` bytes or `values` values are not what the counts give, else OPD_PATCH_VALID.
extern "C" __global__ void __launch_bounds__(OPD_PATCH_THREADS)
patch_plan(const int* counts, opd_i64* starts, opd_i64* value_starts, opd_i64* bad, opd_i64 n, opd_i64 blocks,
           opd_i64 positions, opd_i64 values) {
  plan(counts, starts, value_starts, bad, n, blocks, positions, values);
}
OPD_LAUNCHER(patch_plan)

// Validates the positions of one block per block of threads and writes its change bits and their number per 2,048.
// counts, starts and bad: as `patch_plan`; bad[1] is lowered to the first invalid block; mask:
// [blocks][OPD_PATCH_WORDS]; chunk_counts: [blocks][OPD_PATCH_CHUNKS]; status: int64 [1], set to -1 if everything is
// valid, else to bad[1]; ticket: zero, and zero again afterwards.
extern "C" __global__ void __launch_bounds__(OPD_PATCH_THREADS, 2)
patch_decode(const int* counts, const opd_i64* starts, const opd_u8* positions, opd_u32* mask, opd_u32* chunk_counts,
             opd_i64* bad, opd_i64* status, opd_u32* ticket, opd_i64 n) {
  decode_all(counts, starts, positions, mask, chunk_counts, bad, status, ticket, n);
}
OPD_LAUNCHER(patch_decode)

// values: bytes [n * width]; digests: [blocks][2].
extern "C" __global__ void __launch_bounds__(OPD_PATCH_THREADS, 2)
patch_digest(const opd_u8* values, opd_u64* digests, opd_i64 n, opd_i64 width) {
  digest(values, digests, n, width);
}
OPD_LAUNCHER(patch_digest)

// base, trained: [n]; mask: [blocks][OPD_PATCH_WORDS]; chunk_counts: [blocks][OPD_PATCH_CHUNKS], changes per 2,048
// coordinates, undefined for those from n on; counts: [blocks], changes per block; digests: [2][blocks][2].
#define OPD_PATCH_COMPARE(name, T)                                                                                    \
  extern "C" __global__ void __launch_bounds__(OPD_PATCH_THREADS, 2)                                                  \
  name(const T* base, const T* trained, opd_u32* mask, opd_u32* chunk_counts, int* counts, opd_u64* digests,          \
       opd_i64 n) {                                                                                                   \
    compare<T>(base, trained, mask, chunk_counts, counts, digests, n);                                                \
  }                                                                                                                   \
  OPD_LAUNCHER(name)

// Arguments as above and as `patch_plan`.
#define OPD_PATCH_COMPRESS(name, T)                                                                                   \
  extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)                                   \
  name(const T* base, const T* trained, const opd_u8* mask, const opd_u32* chunk_counts, const int* counts,           \
       const opd_i64* starts, const opd_i64* value_starts, opd_u8* positions, T* values, opd_i64 n,                   \
       opd_i64 difference) {                                                                                          \
    compress<T>(base, trained, mask, chunk_counts, counts, starts, value_starts, positions, values, n,                \
                difference != 0);                                                                                     \
  }                                                                                                                   \
  OPD_LAUNCHER(name)

// digests: [blocks][2]; the others as `patch_decode`. Does nothing if a block is invalid. `out` may be the base.
#define OPD_PATCH_RESTORE(name, T)                                                                                    \
  extern "C" __global__ void __launch_bounds__(OPD_PATCH_THREADS, 2)                                                  \
  name(const T* base, const opd_u32* mask, const opd_u32* chunk_counts, const opd_i64* value_starts, const T* values, \
       const opd_i64* status, T* out, opd_u64* digests, opd_i64 n, opd_i64 difference) {                              \
    restore<T>(base, mask, chunk_counts, value_starts, values, status, out, digests, n, (T)(difference ? ~0ull : 0)); \
  }                                                                                                                   \
  OPD_LAUNCHER(name)

#define OPD_PATCH_WIDTH(bytes, T)               \
  OPD_PATCH_COMPARE(patch_compare_##bytes, T)   \
  OPD_PATCH_COMPRESS(patch_compress_##bytes, T) \
  OPD_PATCH_RESTORE(patch_restore_##bytes, T)

OPD_PATCH_WIDTH(1, opd_u8)
OPD_PATCH_WIDTH(2, opd_u16)
OPD_PATCH_WIDTH(4, opd_u32)
OPD_PATCH_WIDTH(8, opd_u64)
