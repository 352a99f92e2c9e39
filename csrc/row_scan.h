// One pass over one row of floats: the largest magnitude with its place, the sum of squares, and the counts of elements
// that a narrower type could not hold.
#pragma once

#include <cstdint>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

namespace sedetect {

// Must agree with kernels/records.py and kernels/row_stats.py.
constexpr int32_t kNanBits = 0x7FC00000;
constexpr int32_t kInfBits = 0x7F800000;
constexpr int32_t kFp16MaxBits = 0x477FE000;  // 65504
constexpr int32_t kFp8MaxBits = 0x43E00000;   // 448

struct RowScan {
  int32_t bits;     // of the largest |x|; kNanBits if the row holds a NaN
  int32_t channel;  // lowest channel that holds it
  float sqnorm;     // sum of x^2, over 16 interleaved lanes in fixed order
  int32_t nonfinite, over_fp16, over_fp8;
};

RowScan scan_row(const float* x, int64_t n);
RowScan scan_row(const c10::BFloat16* x, int64_t n);
RowScan scan_row(const c10::Half* x, int64_t n);

// out[i] += gate * x[i] in float32.
void accumulate_row(float* out, const float* x, float gate, int64_t n);
void accumulate_row(float* out, const c10::BFloat16* x, float gate, int64_t n);
void accumulate_row(float* out, const c10::Half* x, float gate, int64_t n);

}  // namespace sedetect
