// Combine: the routing-weighted sum of a token's rows, in the order of its slots, and the statistics of every row on its
// way through. The kernel waits for memory, so each element may cost a few instructions and no more: a row's largest
// element is first known only by its magnitude and its vector of 8; the channel, the sign and the counts of elements that
// a narrower type could not hold are looked up afterwards, where they are.
//
// A block takes one token after another. Its threads share the vectors of a row, and load all rows of the next token
// before they reduce those of this one. The same kernel, without a sum, scans rows for their statistics alone.
#include "check.h"
#include "stages.h"
#include "warp.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>

namespace sedetect::cuda {
namespace {

constexpr int kThreads = 256;  // at most
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 3;  // of so many threads on a multiprocessor
constexpr int kVector = 8;

// The 16-bit types: their values, and magnitudes (bits without the sign) that the statistics ask for.
template <typename T>
struct Format;

template <>
struct Format<__nv_bfloat16> {
  static constexpr uint32_t kInf = 0x7F80, kFp8Max = 0x43E0, kFp16Max = 0x477F;
  static __device__ float2 pair(uint32_t bits) { return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u)}; }
  static __device__ uint32_t round(float low, float high) {
    const __nv_bfloat162 value = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(value);
  }
};

template <>
struct Format<__half> {
  static constexpr uint32_t kInf = 0x7C00, kFp8Max = 0x5F00, kFp16Max = 0x7BFF;
  static __device__ float2 pair(uint32_t bits) { return __half22float2(reinterpret_cast<const __half2&>(bits)); }
  static __device__ uint32_t round(float low, float high) {
    const __half2 value = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(value);
  }
};

// A vector of a row; zeros beyond its end.
template <bool ALIGNED>
__device__ uint4 load_vector(const uint16_t* row, int vector, int width) {
  if constexpr (ALIGNED) {
    return __ldg(reinterpret_cast<const uint4*>(row) + vector);
  } else {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int column = vector * kVector + i;
      if (column < width) words[i / 2] |= uint32_t(row[column]) << 16 * (i % 2);
    }
    return {words[0], words[1], words[2], words[3]};
  }
}

template <typename T, bool ALIGNED>
__device__ void store_vector(void* out, Type type, int64_t row, int vector, int width, const float (&values)[kVector]) {
  const int64_t at = row * width + vector * kVector;
  if (type == Type::kFloat32) {
    float* to = static_cast<float*>(out) + at;
    if constexpr (ALIGNED) {
      reinterpret_cast<float4*>(to)[0] = {values[0], values[1], values[2], values[3]};
      reinterpret_cast<float4*>(to)[1] = {values[4], values[5], values[6], values[7]};
    } else {
      for (int i = 0; i < kVector && vector * kVector + i < width; ++i) to[i] = values[i];
    }
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = Format<T>::round(values[2 * i], values[2 * i + 1]);
    uint16_t* to = static_cast<uint16_t*>(out) + at;
    if constexpr (ALIGNED) {
      *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (vector * kVector + i < width) to[i] = uint16_t(words[i / 2] >> 16 * (i % 2));
      }
    }
  }
}

struct Counts {
  int nonfinite, over_fp16, over_fp8;
  int first_nan;  // its channel
};

// The rare second look at a row, by one warp.
template <typename T>
__device__ Counts count_row(const uint16_t* row, int width, int lane) {
  Counts counts{0, 0, 0, INT_MAX};
  for (int channel = lane; channel < width; channel += 32) {
    const uint32_t magnitude = row[channel] & 0x7FFF;
    const bool finite = magnitude < Format<T>::kInf;
    counts.nonfinite += !finite;
    counts.over_fp16 += finite && magnitude > Format<T>::kFp16Max;
    counts.over_fp8 += finite && magnitude > Format<T>::kFp8Max;
    if (magnitude > Format<T>::kInf) counts.first_nan = min(counts.first_nan, channel);
  }
  counts.nonfinite = __reduce_add_sync(kAll, counts.nonfinite);
  counts.over_fp16 = __reduce_add_sync(kAll, counts.over_fp16);
  counts.over_fp8 = __reduce_add_sync(kAll, counts.over_fp8);
  counts.first_nan = __reduce_min_sync(kAll, counts.first_nan);
  return counts;
}

template <typename T>
__device__ float value_of(uint32_t bits) {
  return (bits & 0x7FFF) > Format<T>::kInf ? __int_as_float(kNanBits) : Format<T>::pair(bits).x;
}

struct Peak {
  uint32_t bits;  // of the element
  int channel;
};

// The element that a key speaks of (magnitude above, 0xFFFF - vector below): the first such one of the vector; by one warp.
template <typename T>
__device__ Peak find_peak(const uint16_t* row, int width, uint32_t key, int lane) {
  const uint32_t magnitude = key >> 16;
  const int channel = (0xFFFF - int(key & 0xFFFF)) * kVector + lane;
  const bool inside = lane < kVector && channel < width;
  const uint32_t bits = inside ? row[channel] : 0, mine = bits & 0x7FFF;
  const bool is_nan = mine > Format<T>::kInf && magnitude > Format<T>::kInf;
  const int place = __ffs(__ballot_sync(kAll, inside && (mine == magnitude || is_nan))) - 1;
  return {__shfl_sync(kAll, bits, place), __shfl_sync(kAll, channel, place)};
}

// The statistics of a row of y from its key, by one warp.
template <typename T>
__device__ void write_stats(const Combine& a, int64_t row, uint32_t key, float squares, int lane) {
  const uint16_t* y = static_cast<const uint16_t*>(a.y) + row * a.hidden;
  Peak peak = find_peak<T>(y, a.hidden, key, lane);
  Counts counts{};
  if (key >> 16 > Format<T>::kFp8Max) {
    counts = count_row<T>(y, a.hidden, lane);
    // The key is of the NaN with the largest bits.
    if (key >> 16 > Format<T>::kInf) peak.channel = counts.first_nan;
  }
  if (lane == 0) {
    a.stats.peak[row] = value_of<T>(peak.bits);
    a.stats.channel[row] = peak.channel;
    if (a.stats.sqnorm != nullptr) {
      a.stats.sqnorm[row] = squares;
      a.stats.nonfinite[row] = counts.nonfinite;
      a.stats.over_fp16[row] = counts.over_fp16;
      a.stats.over_fp8[row] = counts.over_fp8;
    }
  }
  if (a.keys == nullptr) return;
  uint32_t in_key = 0;
  for (int tile = lane; tile < a.key_tiles; tile += 32) in_key = max(in_key, a.keys[int64_t(tile) * a.slots + row]);
  in_key = __reduce_max_sync(kAll, in_key);
  const uint16_t* h = static_cast<const uint16_t*>(a.h) + row * a.intermediate;
  const Peak in_peak = find_peak<T>(h, a.intermediate, in_key, lane);
  if (lane == 0) {
    a.stats.in_peak[row] = value_of<T>(in_peak.bits);
    a.stats.in_channel[row] = in_peak.channel;
  }
}

// Without a.row, slots are rows; without a.gates or a.out, nothing is summed.
template <typename T, int K, bool STATISTICS, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocks) combine_kernel(const Combine a) {
  // Of the last units: one unit is up to K of a token's slots.
  __shared__ int ring_rows[4][K];
  __shared__ float ring_gates[4][K];
  __shared__ uint32_t warp_keys[2][kWarps][K];
  __shared__ float warp_squares[2][kWarps][K];
  extern __shared__ float sums[];  // of a token so far, where it takes several units
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int vectors = (a.hidden + kVector - 1) / kVector;
  const int groups = (a.top_k + K - 1) / K;
  const int units = (a.tokens - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x) * groups;
  const int routed = a.routed == nullptr ? a.slots : int(*a.routed);
  const uint16_t* y = static_cast<const uint16_t*>(a.y);

  const auto token_of = [&](int unit) { return int(blockIdx.x) + unit / groups * int(gridDim.x); };
  // Row and gate of the thread's slot of a unit; row -1 for what is no slot, or of no expert.
  const auto fetch = [&](int unit, int& row, float& gate) {
    row = -1, gate = 0;
    const int j = unit % groups * K + threadIdx.x;
    const int slot = token_of(unit) * a.top_k + j;
    if (unit >= units || j >= a.top_k || slot >= a.slots) return;
    const int found = a.row == nullptr ? slot : a.row[slot];
    if (found >= routed) return;
    row = found;
    if (a.gates != nullptr) gate = load_gate(a.gates, a.gates_type, slot);
  };
  uint4 data[K];
  const auto load = [&](int unit, int vector) {
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int row = ring_rows[unit % 4][j];
      data[j] = uint4{};
      if (row >= 0 && vector < vectors) data[j] = load_vector<ALIGNED>(y + int64_t(row) * a.hidden, vector, a.hidden);
    }
  };

  if (threadIdx.x < K) {
    for (int unit = 0; unit < 2; ++unit) fetch(unit, ring_rows[unit][threadIdx.x], ring_gates[unit][threadIdx.x]);
  }
  __syncthreads();
  load(0, threadIdx.x);
  for (int unit = 0; unit < units; ++unit) {
    int next_row;
    float next_gate;
    if (threadIdx.x < K) fetch(unit + 2, next_row, next_gate);
    const int group = unit % groups;
    uint32_t keys[K] = {};
    float squares[K] = {};
    for (int first = 0; first < vectors; first += blockDim.x) {
      const int vector = first + threadIdx.x;
      float out[kVector] = {};
      if (group > 0 && vector < vectors) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) out[i] = sums[vector * kVector + i];
      }
#pragma unroll
      for (int j = 0; j < K; ++j) {
        const float gate = ring_gates[unit % 4][j];
        const uint32_t words[4] = {data[j].x, data[j].y, data[j].z, data[j].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 value = Format<T>::pair(words[i]);
          out[2 * i] += gate * value.x;
          out[2 * i + 1] += gate * value.y;
          if (STATISTICS) squares[j] += value.x * value.x + value.y * value.y;
        }
        if (STATISTICS) {
          // As integers magnitudes have the order of the values, NaN above Inf.
          const uint32_t mask = 0x7FFF7FFFu;
          const uint32_t largest = __vmaxu2(__vmaxu2(words[0] & mask, words[1] & mask),
                                            __vmaxu2(words[2] & mask, words[3] & mask));
          keys[j] = max(keys[j], max(largest & 0xFFFF0000u, largest << 16) | uint32_t(0xFFFF - vector));
        }
      }
      const bool last = first + int(blockDim.x) >= vectors;
      load(last ? unit + 1 : unit, last ? threadIdx.x : vector + blockDim.x);
      if (vector < vectors && a.out != nullptr) {
        if (group == groups - 1) {
          store_vector<T, ALIGNED>(a.out, a.out_type, token_of(unit), vector, a.hidden, out);
        } else {
#pragma unroll
          for (int i = 0; i < kVector; ++i) sums[vector * kVector + i] = out[i];
        }
      }
    }
    if (threadIdx.x < K) {
      ring_rows[(unit + 2) % 4][threadIdx.x] = next_row;
      ring_gates[(unit + 2) % 4][threadIdx.x] = next_gate;
    }
    if (STATISTICS) {
      const uint32_t key = reduce_warp(keys, lane, [](uint32_t p, uint32_t q) { return max(p, q); });
      const float sum = reduce_warp(squares, lane, [](float p, float q) { return p + q; });
      if (lane % (32 / K) == 0) {
        warp_keys[unit % 2][warp][lane / (32 / K)] = key;
        warp_squares[unit % 2][warp][lane / (32 / K)] = sum;
      }
    }
    // One barrier a unit: what is written above is read below, and written again two units later at the earliest.
    __syncthreads();
    if (STATISTICS) {
      for (int j = warp; j < K; j += warps) {
        const int row = ring_rows[unit % 4][j];
        if (row < 0) continue;
        const uint32_t key = __reduce_max_sync(kAll, lane < warps ? warp_keys[unit % 2][lane][j] : 0u);
        float sum = lane < warps ? warp_squares[unit % 2][lane][j] : 0.f;
#pragma unroll
        for (int offset = kWarps / 2; offset >= 1; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
        write_stats<T>(a, row, key, sum, lane);
      }
    }
  }
}

template <typename T, int K, bool STATISTICS, bool ALIGNED>
void launch(const Combine& a, cudaStream_t stream) {
  const int vectors = (a.hidden + kVector - 1) / kVector;
  const int per_thread = (vectors + kThreads - 1) / kThreads;
  const int threads = ((vectors + per_thread - 1) / per_thread + 31) / 32 * 32;
  const int grid = std::min(a.tokens, a.processors * kBlocks * (kThreads / threads));
  const int shared = a.top_k > K && a.out != nullptr ? vectors * kVector * int(sizeof(float)) : 0;
  const auto kernel = combine_kernel<T, K, STATISTICS, ALIGNED>;
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "cudaFuncSetAttribute");
  }
  kernel<<<grid, threads, shared, stream>>>(a);
  check(cudaGetLastError(), "launch of combine");
}

template <typename T, bool STATISTICS>
void choose(const Combine& a, cudaStream_t stream) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (a.hidden % kVector != 0 || !aligned(a.y) || !aligned(a.out)) {
    launch<T, 8, STATISTICS, false>(a, stream);
  } else if (a.top_k <= 2) {
    launch<T, 2, STATISTICS, true>(a, stream);
  } else if (a.top_k <= 4) {
    launch<T, 4, STATISTICS, true>(a, stream);
  } else {
    launch<T, 8, STATISTICS, true>(a, stream);
  }
}

template <bool STATISTICS>
void choose_type(const Combine& a, cudaStream_t stream) {
  if (a.type == Type::kBFloat16) {
    choose<__nv_bfloat16, STATISTICS>(a, stream);
  } else if (a.type == Type::kFloat16) {
    choose<__half, STATISTICS>(a, stream);
  } else {
    throw std::runtime_error("combine: not a 16-bit type");
  }
}

}  // namespace

void combine(const Combine& arguments, cudaStream_t stream) {
  arguments.keys == nullptr ? choose_type<false>(arguments, stream) : choose_type<true>(arguments, stream);
}

void row_scan(const RowScan& arguments, cudaStream_t stream) {
  constexpr int kRows = 4;  // that a block takes at once
  Combine rows{};
  rows.y = arguments.x;
  rows.routed = arguments.routed;
  rows.stats = arguments.stats;
  rows.type = arguments.type;
  rows.slots = arguments.rows;
  rows.tokens = (arguments.rows + kRows - 1) / kRows;
  rows.top_k = kRows;
  rows.hidden = arguments.width;
  rows.processors = arguments.processors;
  choose_type<true>(rows, stream);
}

}  // namespace sedetect::cuda
