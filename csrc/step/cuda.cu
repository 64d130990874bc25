// `step` on a CUDA device: one launch updates the active coordinates of all tensors of a group, of any dtypes and
// masks, through a table of their addresses. Warps take tiles in turn, blocks of 2,048 coordinates or as many
// indices, and advance along the table as they do. What differs between tensors is the same for all lanes of a warp,
// so that branches cost little.
//
// Nothing is copied back to the host: `found_inf`, `grad_scale` and `clip` are read on the device.
#include "step.h"
#include "../common/cuda/active.h"

static_assert(OPD_STEP_BLOCK == OPD_MASK_BLOCK, "a tile is one block of block_counts and one queue");

// The tensor of a tile, found from that of an earlier one by looking at the ends of 32 tensors at once.
__device__ __forceinline__ opd_i64 find_tensor(const opd_i64* end_tiles, opd_i64 i, opd_i64 tensors, opd_i64 tile) {
  for (;;) {
    const opd_i64 at = i + threadIdx.x % OPD_WARP;
    const int passed = __popc(__ballot_sync(OPD_ALL_LANES, at < tensors && tile >= end_tiles[at]));
    i += passed;
    if (passed < OPD_WARP) return i;
  }
}

// Where a warp collects the bits of a tile's changed weights, after the queues of all warps.
__device__ __forceinline__ opd_u32* warp_bits(opd_u8* shared) {
  return (opd_u32*)(shared + blockDim.x / OPD_WARP * OPD_QUEUE_BYTES) + threadIdx.x / OPD_WARP * OPD_MASK_WORDS;
}

// Sets the collected bits of a tile in `changed`.
__device__ __forceinline__ void set_changed(const StepRow& t, opd_i64 first, opd_u32* bits) {
  opd_u8* changed = t.changed + first / 8;
  const bool aligned = ((opd_u64)changed & 3) == 0;
  __syncwarp();
  for (int w = threadIdx.x % OPD_WARP; w < OPD_MASK_WORDS; w += OPD_WARP) {
    const opd_u32 word = bits[w];
    if (!word) continue;
    if (aligned && t.size - first >= 32 * (w + 1)) {
      opd_u32* to = (opd_u32*)changed + w;
      if (word & ~*to) *to |= word;
    } else {
      for (int byte = 0; byte < 4; byte++)
        if (word >> 8 * byte & 0xFF) changed[4 * w + byte] |= (opd_u8)(word >> 8 * byte);
    }
  }
}

// Calls body(index, slot, compares) for the active coordinates of a tile: the flat index, and the position in compact
// arrays. Where it compares, it returns whether the bf16 value changed. CHANGED: whether a row may have `changed`.
template <bool CHANGED, class Body>
__device__ __forceinline__ void for_active(const StepRow& t, opd_i64 tile, opd_u16* queue, opd_u32* bits, Body body) {
  const opd_i64 first = tile * OPD_STEP_BLOCK;
  opd_i64 first_slot = first, count = t.size - first < OPD_STEP_BLOCK ? t.size - first : OPD_STEP_BLOCK;
  if (!(t.flags & STEP_MASK_INDICES)) {
    first_slot = t.block_counts[tile];
    if (t.block_counts[tile + 1] == first_slot) return;
    count = queue_active((const opd_u8*)t.mask, tile, t.size, queue);
  }
  const bool compares = CHANGED && t.changed;
  if (compares) {
    for (int w = threadIdx.x % OPD_WARP; w < OPD_MASK_WORDS; w += OPD_WARP) bits[w] = 0;
    __syncwarp();
  }
  for (int k = threadIdx.x % OPD_WARP; k < (int)count; k += OPD_WARP) {
    const opd_i64 slot = first_slot + k;
    const bool differs =
        body(!(t.flags & STEP_MASK_INDICES) ? first + queue[k]
             : t.flags & STEP_MASK_INDICES_64 ? ((const opd_i64*)t.mask)[slot] : ((const int*)t.mask)[slot],
             slot, compares);
    if (compares && differs) {
      const int bit = t.flags & STEP_MASK_INDICES ? k : queue[k];
      atomicOr(bits + bit / 32, 1u << bit % 32);
    }
  }
  if (compares) set_changed(t, first, bits);
  __syncwarp();  // the next tile overwrites the queue, which some lanes may still read
}

// Calls body(row, index, slot, compares) for every active coordinate of all tensors. end_tiles_ptr: [count], that of
// each row.
template <bool CHANGED, class Body>
__device__ __forceinline__ void for_all_active(const StepRow* rows_ptr, const opd_i64* end_tiles_ptr, opd_i64 count,
                                               const float* found_inf_ptr, Body body) {
  OPD_DYNAMIC_SHARED(shared);
  if (found_inf_ptr && *found_inf_ptr != 0.0f) return;
  const opd_i64 warps = blockDim.x / OPD_WARP, step = gridDim.x * warps;
  opd_i64 i = 0;
  for (opd_i64 tile = blockIdx.x * warps + threadIdx.x / OPD_WARP; tile < end_tiles_ptr[count - 1]; tile += step) {
    i = find_tensor(end_tiles_ptr, i, count, tile);
    const StepRow& t = rows_ptr[i];
    for_active<CHANGED>(t, tile - (i ? end_tiles_ptr[i - 1] : 0), warp_queue(shared), warp_bits(shared),
                        [&](opd_i64 index, opd_i64 slot, bool compares) { return body(t, index, slot, compares); });
  }
}

__device__ __forceinline__ float load_dense(const void* values, bool bf16, opd_i64 index) {
  return bf16 ? bf16_to_float(((const opd_u16*)values)[index]) : ((const float*)values)[index];
}

__device__ __forceinline__ float load_grad(const StepRow& t, const StepOptions& o, opd_i64 index, opd_i64 slot) {
  float g = t.flags & STEP_GRAD_COMPACT ? ((const float*)t.grad)[slot]
                                        : load_dense(t.grad, t.flags & STEP_GRAD_BF16, index);
  if (o.grad_scale) g /= *o.grad_scale;
  if (o.clip) g *= *o.clip;
  return o.maximize ? -g : g;
}

// Writes bf16 of the weight to `before` where it compares.
__device__ __forceinline__ float load_weight(const StepRow& t, const StepOptions& o, opd_i64 index, opd_i64 slot,
                                             bool compares, opd_u16* before) {
  if (!(t.flags & STEP_PARAM_BF16)) {
    const float p = ((const float*)t.param)[index];
    if (compares) *before = float_to_bf16(p);
    return p;
  }
  const opd_u16 weight = ((const opd_u16*)t.param)[index];
  *before = weight;
  if (o.precision == STEP_SPLIT_MASTER) return step_master(weight, t.residual[slot]);
  return o.precision == STEP_KAHAN ? bf16_to_float(weight) + bf16_to_float(t.residual[slot]) : bf16_to_float(weight);
}

// Returns whether bf16 of the weight is not `before`, where it compares.
__device__ __forceinline__ bool store_weight(const StepRow& t, const StepOptions& o, opd_i64 index, opd_i64 slot,
                                             bool compares, opd_u16 before, float p) {
  if (!(t.flags & STEP_PARAM_BF16)) {
    ((float*)t.param)[index] = p;
    return compares && float_to_bf16(p) != before;
  }
  opd_u16 weight;
  if (o.precision == STEP_SPLIT_MASTER) {
    weight = step_weight(p, t.residual + slot);
  } else if (o.precision == STEP_STOCHASTIC) {
    const opd_u32 step = step_count(o.scalars + OPD_STEP_SCALARS * t.scalar_row);
    weight = step_stochastic(p, step_random(t.shard_offset + index, t.param_id, step, o.seed));
  } else {
    weight = float_to_bf16(p);
    if (o.precision == STEP_KAHAN) t.residual[slot] = float_to_bf16(p - bf16_to_float(weight));
  }
  ((opd_u16*)t.param)[index] = weight;
  return compares && weight != before;
}

// The scalars of a coordinate: those of its step group.
__device__ __forceinline__ const float* scalars_of(const StepRow& t, const StepOptions& o, opd_i64 slot) {
  return o.scalars + OPD_STEP_SCALARS * (t.scalar_row + (t.step_group ? t.step_group[slot] : 0));
}

// AdamW.
template <bool CHANGED>
__device__ __forceinline__ void adamw_all(const StepRow* rows_ptr, const opd_i64* end_tiles_ptr, opd_i64 count,
                                          const float* found_inf_ptr, const StepOptions& o) {
  for_all_active<CHANGED>(rows_ptr, end_tiles_ptr, count, found_inf_ptr,
                          [&](const StepRow& t, opd_i64 index, opd_i64 slot, bool compares) {
    const float g = load_grad(t, o, index, slot);
    opd_u16 before = 0;
    float p = load_weight(t, o, index, slot, compares, &before), m = t.exp_avg[slot], v = t.exp_avg_sq[slot];
    float v_max = t.max_exp_avg_sq ? t.max_exp_avg_sq[slot] : bits_float(0xFF800000u);  // without: -Inf, below every v
    AdamWScalars s = step_adamw_scalars(scalars_of(t, o, slot));
    if (t.init_value) {
      const float w0 = load_dense(t.init_value, t.flags & STEP_PARAM_BF16, slot);
      p = OPD_FMA(s.decay_factor, p - w0, w0);
      s.decay_factor = 1.0f;
    }
    p = step_adamw(p, g, &m, &v, &v_max, s);
    t.exp_avg[slot] = m;
    t.exp_avg_sq[slot] = v;
    if (t.max_exp_avg_sq) t.max_exp_avg_sq[slot] = v_max;
    return store_weight(t, o, index, slot, compares, before, p);
  });
}

#define OPD_STEP_ADAMW(name, CHANGED)                                                                                 \
  extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)                                   \
  name(const StepRow* rows_ptr,        /* [count] */                                                                  \
       const opd_i64* end_tiles_ptr,   /* [count], end_tile of each row */                                            \
       opd_i64 count,                                                                                                 \
       const float* scalars_ptr,       /* [scalar rows][OPD_STEP_SCALARS] */                                          \
       const float* grad_scale_ptr,    /* one element, or null */                                                     \
       const float* clip_ptr,          /* one element, or null */                                                     \
       const float* found_inf_ptr,     /* one element, or null */                                                     \
       opd_i64 maximize, opd_i64 precision, opd_i64 seed) {                                                           \
    const StepOptions o = {scalars_ptr, grad_scale_ptr, clip_ptr, maximize, precision, seed, 0, STEP_ADAMW};          \
    adamw_all<CHANGED>(rows_ptr, end_tiles_ptr, count, found_inf_ptr, o);                                             \
  }                                                                                                                   \
  OPD_LAUNCHER(name)
OPD_STEP_ADAMW(step_adamw, false)
OPD_STEP_ADAMW(step_adamw_changed, true)

// SGD. exp_avg of a row is its momentum buffer.
template <bool CHANGED>
__device__ __forceinline__ void sgd_all(const StepRow* rows_ptr, const opd_i64* end_tiles_ptr, opd_i64 count,
                                        const float* found_inf_ptr, const StepOptions& o) {
  for_all_active<CHANGED>(rows_ptr, end_tiles_ptr, count, found_inf_ptr,
                          [&](const StepRow& t, opd_i64 index, opd_i64 slot, bool compares) {
    opd_u16 before = 0;
    const float g = load_grad(t, o, index, slot), p = load_weight(t, o, index, slot, compares, &before);
    const float pull = t.init_value ? p - load_dense(t.init_value, t.flags & STEP_PARAM_BF16, slot) : p;
    const SgdScalars s = step_sgd_scalars(scalars_of(t, o, slot));
    if (!t.exp_avg) return store_weight(t, o, index, slot, compares, before, step_sgd(p, g, pull, 0, 0, s));
    float buffer = t.exp_avg[slot];
    const bool differs = store_weight(t, o, index, slot, compares, before,
                                      step_sgd(p, g, pull, &buffer, (int)o.nesterov, s));
    t.exp_avg[slot] = buffer;
    return differs;
  });
}

#define OPD_STEP_SGD(name, CHANGED)                                                                                   \
  extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)                                   \
  name(const StepRow* rows_ptr,        /* [count] */                                                                  \
       const opd_i64* end_tiles_ptr,   /* [count], end_tile of each row */                                            \
       opd_i64 count,                                                                                                 \
       const float* scalars_ptr,       /* [scalar rows][OPD_STEP_SCALARS] */                                          \
       const float* grad_scale_ptr,    /* one element, or null */                                                     \
       const float* clip_ptr,          /* one element, or null */                                                     \
       const float* found_inf_ptr,     /* one element, or null */                                                     \
       opd_i64 maximize, opd_i64 precision, opd_i64 seed, opd_i64 nesterov) {                                         \
    const StepOptions o = {scalars_ptr, grad_scale_ptr, clip_ptr, maximize, precision, seed, nesterov, STEP_SGD};     \
    sgd_all<CHANGED>(rows_ptr, end_tiles_ptr, count, found_inf_ptr, o);                                               \
  }                                                                                                                   \
  OPD_LAUNCHER(name)
OPD_STEP_SGD(step_sgd, false)
OPD_STEP_SGD(step_sgd_changed, true)

// Writes the active values of each param to its exp_avg, or adds them to it.
extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)
step_gather(const StepRow* rows_ptr, const opd_i64* end_tiles_ptr, opd_i64 count, opd_i64 add) {
  for_all_active<false>(rows_ptr, end_tiles_ptr, count, 0, [&](const StepRow& t, opd_i64 index, opd_i64 slot, bool) {
    const float value = load_dense(t.param, t.flags & STEP_PARAM_BF16, index);
    t.exp_avg[slot] = add ? t.exp_avg[slot] + value : value;
    return false;
  });
}
OPD_LAUNCHER(step_gather)

// Writes exp_avg of each row to the active values of its param, rounded to nearest.
extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)
step_scatter(const StepRow* rows_ptr, const opd_i64* end_tiles_ptr, opd_i64 count) {
  const StepOptions o = {0, 0, 0, 0, STEP_NEAREST, 0, 0, STEP_SCATTER};
  for_all_active<false>(rows_ptr, end_tiles_ptr, count, 0, [&](const StepRow& t, opd_i64 index, opd_i64 slot, bool) {
    return store_weight(t, o, index, slot, false, 0, t.exp_avg[slot]);
  });
}
OPD_LAUNCHER(step_scatter)
