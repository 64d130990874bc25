// `step` on a CUDA device: one launch steps the active coordinates of all tensors of a group, of whatever dtypes and masks,
// through a table of their addresses. A warp takes tiles, blocks of 2,048 coordinates or as many places, in turn, and goes along
// the table as it does. What differs between tensors is the same for all lanes of a warp, so that branches cost little.
//
// Nothing comes back to the host: `found_inf`, `grad_scale` and `clip` are read on the device.
#include "step.h"
#include "../common/cuda/active.h"

enum Kind { PARAM_BF16 = 1, GRAD_BF16 = 2, COMPACT = 4, PLACES = 8, WIDE_PLACES = 16 };

struct Tensor {  // a row of the table: opdkernels/backends/gpu.py
  void* param;
  const void* grad;
  const void* mask;  // bits, or places
  const opd_i64* offsets;
  float *first, *second, *most;  // moments; of SGD the momentum buffer; null where there is none
  opd_u16* extra;
  const void* init;
  const opd_u8* cohort;
  opd_i64 row, start, ordinal, size, kind, unused;
};

struct Options {
  const float *scalars, *grad_scale, *clip;
  opd_i64 maximize, precision, seed;
};

// The tensor of a tile, from that of an earlier one: the ends of 32 are looked at at once.
__device__ __forceinline__ opd_i64 find_tensor(const opd_i64* ends, opd_i64 i, opd_i64 tensors, opd_i64 tile) {
  for (;;) {
    const opd_i64 at = i + threadIdx.x % OPD_WARP;
    const int passed = __popc(__ballot_sync(OPD_ALL_LANES, at < tensors && tile >= ends[at]));
    i += passed;
    if (passed < OPD_WARP) return i;
  }
}

// Calls one(place, slot) for the active of a tile: where a coordinate is, and which of the compact it is.
template <class One>
__device__ __forceinline__ void each_active(const Tensor& t, opd_i64 tile, opd_u16* queue, One one) {
  const opd_i64 first = tile * OPD_MASK_BLOCK;
  opd_i64 slots = first, count = t.size - first < OPD_MASK_BLOCK ? t.size - first : OPD_MASK_BLOCK;
  if (!(t.kind & PLACES)) {
    slots = t.offsets[tile];
    if (t.offsets[tile + 1] == slots) return;
    count = queue_active((const opd_u8*)t.mask, tile, t.size, queue);
  }
  for (int k = threadIdx.x % OPD_WARP; k < (int)count; k += OPD_WARP) {
    const opd_i64 slot = slots + k;
    one(!(t.kind & PLACES) ? first + queue[k] : t.kind & WIDE_PLACES ? ((const opd_i64*)t.mask)[slot] : ((const int*)t.mask)[slot], slot);
  }
  __syncwarp();  // the next tile's queue goes where some lanes may still read
}

// Calls one(tensor, place, slot) for every active coordinate of all tensors. ends: [tensors], of their tiles among all.
template <class One>
__device__ __forceinline__ void each_of_all(const Tensor* tensors, const opd_i64* ends, opd_i64 count, const float* found_inf, One one) {
  OPD_DYNAMIC_SHARED(shared);
  if (found_inf && *found_inf != 0.0f) return;
  const opd_i64 warps = blockDim.x / OPD_WARP, step = gridDim.x * warps;
  opd_i64 i = 0;
  for (opd_i64 tile = blockIdx.x * warps + threadIdx.x / OPD_WARP; tile < ends[count - 1]; tile += step) {
    i = find_tensor(ends, i, count, tile);
    const Tensor& t = tensors[i];
    each_active(t, tile - (i ? ends[i - 1] : 0), warp_queue(shared), [&](opd_i64 place, opd_i64 slot) { one(t, place, slot); });
  }
}

__device__ __forceinline__ float load_dense(const void* values, bool bf16, opd_i64 place) {
  return bf16 ? bf16_to_float(((const opd_u16*)values)[place]) : ((const float*)values)[place];
}

__device__ __forceinline__ float load_grad(const Tensor& t, const Options& o, opd_i64 place, opd_i64 slot) {
  float g = t.kind & COMPACT ? ((const float*)t.grad)[slot] : load_dense(t.grad, t.kind & GRAD_BF16, place);
  if (o.grad_scale) g /= *o.grad_scale;
  if (o.clip) g *= *o.clip;
  return o.maximize ? -g : g;
}

__device__ __forceinline__ float load_weight(const Tensor& t, const Options& o, opd_i64 place, opd_i64 slot) {
  if (!(t.kind & PARAM_BF16)) return ((const float*)t.param)[place];
  const opd_u16 weight = ((const opd_u16*)t.param)[place];
  if (o.precision == STEP_EXACT) return step_master(weight, t.extra[slot]);
  return o.precision == STEP_KAHAN ? bf16_to_float(weight) + bf16_to_float(t.extra[slot]) : bf16_to_float(weight);
}

__device__ __forceinline__ void store_weight(const Tensor& t, const Options& o, opd_i64 place, opd_i64 slot, float p) {
  if (!(t.kind & PARAM_BF16)) {
    ((float*)t.param)[place] = p;
    return;
  }
  opd_u16 weight;
  if (o.precision == STEP_EXACT) {
    weight = step_weight(p, t.extra + slot);
  } else if (o.precision == STEP_STOCHASTIC) {
    const opd_u64 global = (opd_u64)(t.start + place);
    const opd_u32 step = (opd_u32)o.scalars[OPD_STEP_SCALARS * t.row + OPD_STEP_SCALARS - 1];
    weight = step_stochastic(p, step_philox((opd_u32)global, (opd_u32)(global >> 32), (opd_u32)t.ordinal, step, (opd_u32)o.seed, (opd_u32)(o.seed >> 32)));
  } else {
    weight = float_to_bf16(p);
    if (o.precision == STEP_KAHAN) t.extra[slot] = float_to_bf16(p - bf16_to_float(weight));
  }
  ((opd_u16*)t.param)[place] = weight;
}

__device__ __forceinline__ const float* scalars_of(const Tensor& t, const Options& o, opd_i64 slot) {
  return o.scalars + OPD_STEP_SCALARS * (t.row + (t.cohort ? t.cohort[slot] : 0));
}

// tensors: [count] rows; scalars: [steps][OPD_STEP_SCALARS]; grad_scale, clip, found_inf: one number each, or null.
extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)
step_adamw(const Tensor* tensors, const opd_i64* ends, opd_i64 count, const float* scalars, const float* grad_scale, const float* clip,
           const float* found_inf, opd_i64 maximize, opd_i64 precision, opd_i64 seed) {
  const Options o = {scalars, grad_scale, clip, maximize, precision, seed};
  each_of_all(tensors, ends, count, found_inf, [&](const Tensor& t, opd_i64 place, opd_i64 slot) {
    const float g = load_grad(t, o, place, slot);
    float p = load_weight(t, o, place, slot), m = t.first[slot], v = t.second[slot];
    float most = t.most ? t.most[slot] : bits_float(0xFF800000u);  // of none -Inf: every v is larger
    AdamWScalars s = step_adamw_scalars(scalars_of(t, o, slot));
    if (t.init) {
      const float w0 = load_dense(t.init, t.kind & PARAM_BF16, slot);
      p = OPD_FMA(s.decay, p - w0, w0);
      s.decay = 1.0f;
    }
    p = step_adamw(p, g, &m, &v, &most, s);
    t.first[slot] = m;
    t.second[slot] = v;
    if (t.most) t.most[slot] = most;
    store_weight(t, o, place, slot, p);
  });
}
OPD_LAUNCHER(step_adamw)

// As above; what is `first` of a tensor is its momentum buffer.
extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)
step_sgd(const Tensor* tensors, const opd_i64* ends, opd_i64 count, const float* scalars, const float* grad_scale, const float* clip,
         const float* found_inf, opd_i64 maximize, opd_i64 precision, opd_i64 seed, opd_i64 nesterov) {
  const Options o = {scalars, grad_scale, clip, maximize, precision, seed};
  each_of_all(tensors, ends, count, found_inf, [&](const Tensor& t, opd_i64 place, opd_i64 slot) {
    const float g = load_grad(t, o, place, slot), p = load_weight(t, o, place, slot);
    const float pull = t.init ? p - load_dense(t.init, t.kind & PARAM_BF16, slot) : p;
    const SgdScalars s = step_sgd_scalars(scalars_of(t, o, slot));
    if (!t.first) return store_weight(t, o, place, slot, step_sgd(p, g, pull, 0, 0, s));
    float buffer = t.first[slot];
    store_weight(t, o, place, slot, step_sgd(p, g, pull, &buffer, (int)nesterov, s));
    t.first[slot] = buffer;
  });
}
OPD_LAUNCHER(step_sgd)

// The active of a tensor's values to its `first`, added to what that holds where `add`.
extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)
step_take(const Tensor* tensors, const opd_i64* ends, opd_i64 count, opd_i64 add) {
  each_of_all(tensors, ends, count, 0, [&](const Tensor& t, opd_i64 place, opd_i64 slot) {
    const float taken = load_dense(t.param, t.kind & PARAM_BF16, place);
    t.first[slot] = add ? t.first[slot] + taken : taken;
  });
}
OPD_LAUNCHER(step_take)

// The active of a tensor's values from its `first`, rounded to nearest.
extern "C" __global__ void __launch_bounds__(OPD_QUEUE_THREADS, OPD_QUEUE_BLOCKS)
step_put(const Tensor* tensors, const opd_i64* ends, opd_i64 count) {
  const Options o = {0, 0, 0, 0, STEP_NEAREST, 0};
  each_of_all(tensors, ends, count, 0, [&](const Tensor& t, opd_i64 place, opd_i64 slot) { store_weight(t, o, place, slot, t.first[slot]); });
}
OPD_LAUNCHER(step_put)
