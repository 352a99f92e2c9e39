// What the kernels of several stages share on the device.
#pragma once

#include "stages.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace sedetect::cuda {

constexpr unsigned kAll = 0xFFFFFFFFu;

// Must agree with kernels/records.py.
constexpr int kNanBits = 0x7FC00000;
constexpr int kInfBits = 0x7F800000;

// A routing weight as float32.
inline __device__ float load_gate(const void* gates, Type type, int slot) {
  switch (type) {
    case Type::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(gates)[slot]);
    case Type::kFloat16: return __half2float(static_cast<const __half*>(gates)[slot]);
    default: return static_cast<const float*>(gates)[slot];
  }
}

// Reduces K values of every lane over the warp with K + 1 or so shuffles instead of 5 K: a lane gives away half of what it
// still has at every step. Returns the result of value lane / (32 / K).
template <int K, typename V, typename Join>
__device__ V reduce_warp(V (&values)[K], int lane, const Join& join) {
  int offset = 16;
#pragma unroll
  for (int half = K / 2; half >= 1; half /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const V given = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = join(kept, __shfl_xor_sync(kAll, given, offset));
    }
    offset /= 2;
  }
  for (; offset >= 1; offset /= 2) values[0] = join(values[0], __shfl_xor_sync(kAll, values[0], offset));
  return values[0];
}

}  // namespace sedetect::cuda
