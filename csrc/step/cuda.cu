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

// Calls body(index, slot) for the active coordinates of a tile: the flat index, and the position in compact arrays.
template <class Body>
__device__ __forceinline__ void for_active(const StepRow& t, opd_i64 tile, opd_u16* queue, Body body) {
  const opd_i64 first = tile * OPD_STEP_BLOCK;
  opd_i64 first_slot = first, count = t.size - first < OPD_STEP_BLOCK ? t.size - first : OPD_STEP_BLOCK;
  if (!(t.flags & STEP_MASK_INDICES)) {
    first_slot = t.block_counts[tile];
    if (t.block_counts[tile + 1] == first_slot) return;
    count = queue_active((const opd_u8*)t.mask, tile, t.size, queue);
  }
  for (int k = threadIdx.x % OPD_WARP; k < (int)count; k += OPD_WARP) {
    const opd_i64 slot = first_slot + k;
    body(!(t.flags & STEP_MASK_INDICES) ? first + queue[k]
         : t.flags & STEP_MASK_INDICES_64 ? ((const opd_i64*)t.mask)[slot] : ((const int*)t.mask)[slot], slot);
  }
  __syncwarp();  // the next tile overwrites the queue, which some lanes may still read
}

// Calls body(row, index, slot) for every active coordinate of all tensors. end_tiles_ptr: [count], that of each row.
template <class Body>
__device__ __forceinline__ void for_all_active(const StepRow* rows_ptr, const opd_i64* end_tiles_ptr, opd_i64 count,
                                               const float* found_inf_ptr, Body body) {
  OPD_DYNAMIC_SHARED(shared);
  if (found_inf_ptr && *found_inf_ptr != 0.0f) return;
  const opd_i64 warps = blockDim.x / OPD_WARP, step = gridDim.x * warps;
  opd_i64 i = 0;
  for (opd_i64 tile = blockIdx.x * warps + threadIdx.x / OPD_WARP; tile < end_tiles_ptr[count - 1]; tile += step) {
    i = find_tensor(end_tiles_ptr, i, count, tile);
    const StepRow& t = rows_ptr[i];
    for_active(t, tile - (i ? end_tiles_ptr[i - 1] : 0), warp_queue(shared),
               [&](opd_i64 index, opd_i64 slot) { body(t, index, slot); });
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

__device__ __forceinline__ float load_weight(const StepRow& t, const StepOptions& o, opd_i64 index, opd_i64 slot) {
  if (!(t.flags & STEP_PARAM_BF16)) return ((const float*)t.param)[index];
  const opd_u16 weight = ((const opd_u16*)t.param)[index];
  if (o.precision == STEP_SPLIT_MASTER) return step_master(weight, t.residual[slot]);
  return o.precision == STEP_KAHAN ? bf16_to_float(weight) + bf16_to_float(t.residual[slot]) : bf16_to_float(weight);
}

__device__ __forceinline__ void store_weight(const StepRow& t, const StepOptions& o, opd_i64 index, opd_i64 slot,
                                             float p) {
  if (!(t.flags & STEP_PARAM_BF16)) {
    ((float*)t.param)[index] = p;
    return;
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
}

// The scalars of a coordinate: those of its step group.
__device__ __forceinline__ const float* scalars_of(const StepRow& t, const StepOptions& o, opd_i64 slot) {
  return o.scalars + OPD_STEP_SCALARS * (t.scalar_row + (t.step_group ? t.step_group[slot] : 0));
}

// AdamW.
extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)
step_adamw(const StepRow* rows_ptr,           // [count]
           const opd_i64* end_tiles_ptr,      // [count], end_tile of each row
           opd_i64 count,
           const float* scalars_ptr,          // [scalar rows][OPD_STEP_SCALARS]
           const float* grad_scale_ptr,       // one element, or null
           const float* clip_ptr,             // one element, or null
           const float* found_inf_ptr,        // one element, or null
           opd_i64 maximize, opd_i64 precision, opd_i64 seed) {
  const StepOptions o = {scalars_ptr, grad_scale_ptr, clip_ptr, maximize, precision, seed, 0, STEP_ADAMW};
  for_all_active(rows_ptr, end_tiles_ptr, count, found_inf_ptr, [&](const StepRow& t, opd_i64 index, opd_i64 slot) {
    const float g = load_grad(t, o, index, slot);
    float p = load_weight(t, o, index, slot), m = t.exp_avg[slot], v = t.exp_avg_sq[slot];
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
    store_weight(t, o, index, slot, p);
  });
}
OPD_LAUNCHER(step_adamw)

// SGD; arguments as for step_adamw. exp_avg of a row is its momentum buffer.
extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)
step_sgd(const StepRow* rows_ptr, const opd_i64* end_tiles_ptr, opd_i64 count, const float* scalars_ptr,
         const float* grad_scale_ptr, const float* clip_ptr, const float* found_inf_ptr, opd_i64 maximize,
         opd_i64 precision, opd_i64 seed, opd_i64 nesterov) {
  const StepOptions o = {scalars_ptr, grad_scale_ptr, clip_ptr, maximize, precision, seed, nesterov, STEP_SGD};
  for_all_active(rows_ptr, end_tiles_ptr, count, found_inf_ptr, [&](const StepRow& t, opd_i64 index, opd_i64 slot) {
    const float g = load_grad(t, o, index, slot), p = load_weight(t, o, index, slot);
    const float pull = t.init_value ? p - load_dense(t.init_value, t.flags & STEP_PARAM_BF16, slot) : p;
    const SgdScalars s = step_sgd_scalars(scalars_of(t, o, slot));
    if (!t.exp_avg) return store_weight(t, o, index, slot, step_sgd(p, g, pull, 0, 0, s));
    float buffer = t.exp_avg[slot];
    store_weight(t, o, index, slot, step_sgd(p, g, pull, &buffer, (int)nesterov, s));
    t.exp_avg[slot] = buffer;
  });
}
OPD_LAUNCHER(step_sgd)

// Writes the active values of each param to its exp_avg, or adds them to it.
extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)
step_gather(const StepRow* rows_ptr, const opd_i64* end_tiles_ptr, opd_i64 count, opd_i64 add) {
  for_all_active(rows_ptr, end_tiles_ptr, count, 0, [&](const StepRow& t, opd_i64 index, opd_i64 slot) {
    const float value = load_dense(t.param, t.flags & STEP_PARAM_BF16, index);
    t.exp_avg[slot] = add ? t.exp_avg[slot] + value : value;
  });
}
OPD_LAUNCHER(step_gather)

// Writes exp_avg of each row to the active values of its param, rounded to nearest.
extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)
step_scatter(const StepRow* rows_ptr, const opd_i64* end_tiles_ptr, opd_i64 count) {
  const StepOptions o = {0, 0, 0, 0, STEP_NEAREST, 0, 0, STEP_SCATTER};
  for_all_active(rows_ptr, end_tiles_ptr, count, 0, [&](const StepRow& t, opd_i64 index, opd_i64 slot) {
    store_weight(t, o, index, slot, t.exp_avg[slot]);
  });
}
OPD_LAUNCHER(step_scatter)
