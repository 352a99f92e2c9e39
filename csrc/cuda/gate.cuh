// Pairs of 16-bit elements, and the gate between them: what the epilogues of the GEMMs are made of.
#pragma once

#include "grouped_gemm.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sedetect::cuda {

template <typename T>
struct Pair;  // two elements in a register; of max, a NaN is the largest and always 0x7FFF

template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    const __nv_bfloat162 pair = __hmax2_nan(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

template <>
struct Pair<__half> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return __half22float2(reinterpret_cast<__half2&>(pair));
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    const __half2 pair = __hmax2_nan(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b));
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

// Comparisons, not fminf: a NaN stays one.
template <Activation kActivation>
__device__ __forceinline__ float activate(float g, float slope) {
  switch (kActivation) {
    case Activation::kSilu:
      return __fdividef(g, 1 + __expf(-g * slope));
    case Activation::kGelu:
      return 0.5f * g * (1 + erff(g * 0.7071067811865476f));
    case Activation::kGeluTanh:
      // 0.5 (1 + tanh(a)) = sigmoid(2 a), without the cancellation.
      return __fdividef(g, 1 + __expf(-1.5957691216057308f * (g + 0.044715f * g * g * g)));
    case Activation::kRelu2:
      g = g < 0 ? 0 : g;
      return g * g;
    default:
      return g;
  }
}

template <Activation kActivation>
__device__ __forceinline__ float apply_gate(const Gate& gate, float g, float u) {
  g = g > gate.limit ? gate.limit : g;
  u = u > gate.limit ? gate.limit : u;
  u = u < -gate.limit ? -gate.limit : u;
  return activate<kActivation>(g, gate.slope) * (u + gate.shift);
}

}  // namespace sedetect::cuda
