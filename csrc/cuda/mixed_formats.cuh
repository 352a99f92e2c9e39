// How weights are stored in 8 or 4 bits: their scales, and how a pair of them becomes two 16-bit elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "gate.cuh"
#include "hopper.cuh"

namespace sedetect::cuda {

// Where the scales of a matrix are.
struct Scales {
  const void* scale;
  int rows, columns, high, wide_bits;  // wide_bits: the exponent of 2 of columns that share a scale
};

// A format says how a thread reads the stored pairs of its two rows of a fragment, and what they are:
//   Scaling    gives the scales of the two rows for one step of 64 inner elements after another, into a Step
//   load_pair  a stored pair that is on its own
//   Reader     all pairs of a step, four inner elements of a slab that follow one another in two rows
//   decode     a pair of row 0 or 1 in half 0 or 1 of the step as two elements of 16 bits; <kLarge> where is_large says

struct E4M3 {
  static constexpr int kBits = 8;

  struct Step {
    float scale[2];

    __device__ __forceinline__ static constexpr bool is_large() { return false; }
  };

  struct Scaling {
    const float* scale;
    uint32_t at[2], inner, last;
    int wide_bits;

    // at: where the scales of each row begin.
    __device__ __forceinline__ Scaling(const uint32_t (&at)[2], const Scales& scales)
        : scale(static_cast<const float*>(scales.scale)), at{at[0], at[1]}, inner(0), last(scales.columns - 1),
          wide_bits(scales.wide_bits) {}

    __device__ __forceinline__ void next(Step& step) {
      const uint32_t group = min(inner >> wide_bits, last);
      inner += 64;
      for (int i = 0; i < 2; ++i) step.scale[i] = __ldg(scale + (at[i] + group));
    }
  };

  template <int kOffset>
  static __device__ __forceinline__ uint32_t load_pair(uint32_t address) {
    uint16_t pair;
    asm volatile("ld.shared.u16 %0, [%1 + %2];" : "=h"(pair) : "r"(address), "n"(kOffset));
    return pair;
  }

  struct Reader {
    uint32_t offset;

    static __device__ __forceinline__ Reader of(int pointed, int, int, int lane) { return {pointed ^ lane / 16 * 16u}; }

    __device__ __forceinline__ void read(uint32_t (&stored)[4][4], uint32_t stage) const {
#pragma unroll
      for (int slab = 0; slab < 4; slab += 2) {
        uint32_t v[4];
        hopper::load_matrices((stage + offset) ^ (slab * 16), v);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          stored[slab + i / 2][i % 2] = v[i] & 0xFFFF;
          stored[slab + i / 2][2 + i % 2] = v[i] >> 16;
        }
      }
    }
  };

  template <typename T, bool kLarge>
  static __device__ __forceinline__ uint32_t decode(uint32_t pair, const Step& step, int row, int) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
    const float2 values = Pair<__half>::unpack(halves);
    return Pair<T>::pack(__fmul_rn(values.x, step.scale[row]), __fmul_rn(values.y, step.scale[row]));
  }
};

struct E2M1 {
  static constexpr int kBits = 4;

  struct Step {
    uint32_t exponents[2][2];  // e of 2^(e - 127), by row and half; 255 is NaN

    // Whether one of the warp's is so large that one product of bfloat16 does not reach.
    __device__ __forceinline__ bool is_large() const {
      const uint32_t all = exponents[0][0] | exponents[0][1] | exponents[1][0] | exponents[1][1];
      return __any_sync(~0u, all >= 128);
    }
  };

  struct Scaling {
    const uint8_t* row[2];
    int left;  // scales of each

    __device__ __forceinline__ Scaling(const uint32_t (&at)[2], const Scales& scales) : left(scales.columns) {
      for (int i = 0; i < 2; ++i) row[i] = static_cast<const uint8_t*>(scales.scale) + at[i];
    }

    // A second half that is not there keeps the scales of the one before: its weights are zeros.
    __device__ __forceinline__ void next(Step& step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (left > 0) step.exponents[i][0] = __ldg(row[i]);
        if (left > 1) step.exponents[i][1] = __ldg(row[i] + 1);
        row[i] += 2;
      }
      left -= 2;
    }
  };

  template <int kOffset>
  static __device__ __forceinline__ uint32_t load_pair(uint32_t address) {
    uint32_t pair;
    asm volatile("ld.shared.u8 %0, [%1 + %2];" : "=r"(pair) : "r"(address), "n"(kOffset));
    return pair;
  }

  struct Reader {
    uint32_t offset[2][2];  // of the first and the second half, by row

    static __device__ __forceinline__ Reader of(int, int first, int apart, int lane) {
      const uint32_t at = first + lane % 4 * 2u;
      return {{{at, at + apart}, {at ^ 16, (at ^ 16) + apart}}};
    }

    __device__ __forceinline__ void read(uint32_t (&stored)[4][4], uint32_t stage) const {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const uint32_t source = stage + offset[half][row];
          stored[2 * half][row] = load_pair<0>(source);
          stored[2 * half][2 + row] = load_pair<1>(source);
          stored[2 * half + 1][row] = load_pair<8>(source);
          stored[2 * half + 1][2 + row] = load_pair<9>(source);
        }
      }
    }
  };

  // Their bits in bfloat16's places are 2^-126 of the values, 0.5 among the subnormals; every product is exact.
  template <typename T, bool kLarge>
  static __device__ __forceinline__ uint32_t decode(uint32_t pair, const Step& step, int row, int half) {
    const uint32_t e = step.exponents[row][half];
    const uint32_t bits = ((pair * 0x01001000) & 0x80008000) | ((pair * 0x00040040) & 0x01C001C0);
    if (!kLarge) return times(bits, e * 0x00800080 + 0x3F003F00);  // 2^(e - 1), twice
    return times(times(bits, 0x7E807E80), (e == 0 ? 0x40 : e == 255 ? 0x7FC0 : e << 7) * 0x10001);
  }

  static __device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
    const __nv_bfloat162 product =
        __hmul2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(product);
  }
};

}  // namespace sedetect::cuda
