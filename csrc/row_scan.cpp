#include "row_scan.h"

#include <algorithm>
#include <cstring>

// The hot loops are compiled once per instruction set and picked at load time, so that one wheel is fast everywhere.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SEDETECT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SEDETECT_CLONES
#endif
#define SEDETECT_INLINE inline __attribute__((always_inline))

namespace sedetect {
namespace {

constexpr int kLanes = 16;
constexpr int kBlock = 64;

SEDETECT_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

SEDETECT_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

SEDETECT_INLINE float load(const float* x, int64_t i) { return x[i]; }
SEDETECT_INLINE float load(const c10::BFloat16* x, int64_t i) { return from_bits(uint32_t(x[i].x) << 16); }

// Branch-free so that it vectorizes; exact for every value, with every NaN staying a NaN.
SEDETECT_INLINE float load(const c10::Half* x, int64_t i) {
  const uint32_t half = x[i].x;
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7FFFu;
  const float scaled = from_bits(rest << 13) * 0x1p112f;  // rebiases the exponent, subnormals too
  const uint32_t special = rest >= 0x7C00u ? 0x7F800000u : 0u;
  return from_bits(to_bits(scaled) | special | sign);
}

SEDETECT_INLINE int32_t magnitude_bits(float x) { return int32_t(to_bits(x) & 0x7FFFFFFFu); }

template <typename T>
SEDETECT_INLINE RowScan scan(const T* x, int64_t n) {
  RowScan row{-1, 0, 0.f, 0, 0, 0};
  float squares[kLanes] = {};
  int64_t best_start = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    int32_t block_bits = 0;
    if (start + kBlock <= n) {
      int32_t lane_bits[kLanes] = {};
      for (int64_t i = start; i < start + kBlock; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const float value = load(x, i + lane);
          lane_bits[lane] = std::max(lane_bits[lane], magnitude_bits(value));
          squares[lane] += value * value;
        }
      }
      for (int lane = 0; lane < kLanes; ++lane) block_bits = std::max(block_bits, lane_bits[lane]);
    } else {
      for (int64_t i = start; i < n; ++i) {
        const float value = load(x, i);
        block_bits = std::max(block_bits, magnitude_bits(value));
        squares[(i - start) % kLanes] += value * value;
      }
    }
    if (block_bits > kFp8MaxBits) {  // rare: count only where there is something to count
      for (int64_t i = start; i < std::min(start + kBlock, n); ++i) {
        const int32_t bits = magnitude_bits(load(x, i));
        row.nonfinite += bits >= kInfBits;
        row.over_fp16 += bits > kFp16MaxBits && bits < kInfBits;
        row.over_fp8 += bits > kFp8MaxBits && bits < kInfBits;
      }
      if (block_bits > kInfBits) block_bits = kNanBits;
    }
    if (block_bits > row.bits) {
      row.bits = block_bits;
      best_start = start;
    }
  }
  for (float lane : squares) row.sqnorm += lane;
  for (int64_t i = best_start; i < n; ++i) {
    const int32_t bits = magnitude_bits(load(x, i));
    if (bits == row.bits || (row.bits == kNanBits && bits > kInfBits)) {
      row.channel = int32_t(i);
      break;
    }
  }
  return row;
}

template <typename T>
SEDETECT_INLINE void accumulate(float* out, const T* x, float gate, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] += gate * load(x, i);
}

}  // namespace

SEDETECT_CLONES RowScan scan_row(const float* x, int64_t n) { return scan(x, n); }
SEDETECT_CLONES RowScan scan_row(const c10::BFloat16* x, int64_t n) { return scan(x, n); }
SEDETECT_CLONES RowScan scan_row(const c10::Half* x, int64_t n) { return scan(x, n); }

SEDETECT_CLONES void accumulate_row(float* out, const float* x, float gate, int64_t n) { accumulate(out, x, gate, n); }
SEDETECT_CLONES void accumulate_row(float* out, const c10::BFloat16* x, float gate, int64_t n) {
  accumulate(out, x, gate, n);
}
SEDETECT_CLONES void accumulate_row(float* out, const c10::Half* x, float gate, int64_t n) {
  accumulate(out, x, gate, n);
}

}  // namespace sedetect
