// Matrix products (wgmma) with A in registers: 64 rows of A, and up to 256 rows of B in shared memory as rows of 128
// swizzled bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sedetect::cuda::hopper {

// Blocks of 8 accumulators: their names in the instruction, where they follow six other operands, and as operands.
#define SEDETECT_N1 "%6, %7, %8, %9, %10, %11, %12, %13"
#define SEDETECT_N2 SEDETECT_N1 ", %14, %15, %16, %17, %18, %19, %20, %21"
#define SEDETECT_N3 SEDETECT_N2 ", %22, %23, %24, %25, %26, %27, %28, %29"
#define SEDETECT_N4 SEDETECT_N3 ", %30, %31, %32, %33, %34, %35, %36, %37"
#define SEDETECT_N5 SEDETECT_N4 ", %38, %39, %40, %41, %42, %43, %44, %45"
#define SEDETECT_N6 SEDETECT_N5 ", %46, %47, %48, %49, %50, %51, %52, %53"
#define SEDETECT_N7 SEDETECT_N6 ", %54, %55, %56, %57, %58, %59, %60, %61"
#define SEDETECT_N8 SEDETECT_N7 ", %62, %63, %64, %65, %66, %67, %68, %69"
#define SEDETECT_N9 SEDETECT_N8 ", %70, %71, %72, %73, %74, %75, %76, %77"
#define SEDETECT_N10 SEDETECT_N9 ", %78, %79, %80, %81, %82, %83, %84, %85"
#define SEDETECT_N11 SEDETECT_N10 ", %86, %87, %88, %89, %90, %91, %92, %93"
#define SEDETECT_N12 SEDETECT_N11 ", %94, %95, %96, %97, %98, %99, %100, %101"
#define SEDETECT_N13 SEDETECT_N12 ", %102, %103, %104, %105, %106, %107, %108, %109"
#define SEDETECT_N14 SEDETECT_N13 ", %110, %111, %112, %113, %114, %115, %116, %117"
#define SEDETECT_N15 SEDETECT_N14 ", %118, %119, %120, %121, %122, %123, %124, %125"
#define SEDETECT_N16 SEDETECT_N15 ", %126, %127, %128, %129, %130, %131, %132, %133"
#define SEDETECT_F8(i) \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
      "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define SEDETECT_A1 SEDETECT_F8(0)
#define SEDETECT_A2 SEDETECT_A1, SEDETECT_F8(8)
#define SEDETECT_A3 SEDETECT_A2, SEDETECT_F8(16)
#define SEDETECT_A4 SEDETECT_A3, SEDETECT_F8(24)
#define SEDETECT_A5 SEDETECT_A4, SEDETECT_F8(32)
#define SEDETECT_A6 SEDETECT_A5, SEDETECT_F8(40)
#define SEDETECT_A7 SEDETECT_A6, SEDETECT_F8(48)
#define SEDETECT_A8 SEDETECT_A7, SEDETECT_F8(56)
#define SEDETECT_A9 SEDETECT_A8, SEDETECT_F8(64)
#define SEDETECT_A10 SEDETECT_A9, SEDETECT_F8(72)
#define SEDETECT_A11 SEDETECT_A10, SEDETECT_F8(80)
#define SEDETECT_A12 SEDETECT_A11, SEDETECT_F8(88)
#define SEDETECT_A13 SEDETECT_A12, SEDETECT_F8(96)
#define SEDETECT_A14 SEDETECT_A13, SEDETECT_F8(104)
#define SEDETECT_A15 SEDETECT_A14, SEDETECT_F8(112)
#define SEDETECT_A16 SEDETECT_A15, SEDETECT_F8(120)

// The operands before acc are named as outputs only to stand there: the number of accumulators varies.
#define SEDETECT_WGMMA_OF(n, type, names, ...)                                            \
  asm volatile(                                                                           \
      "{\n"                                                                               \
      ".reg .pred p;\n"                                                                   \
      ".reg .b32 high;\n"                                                                 \
      ".reg .b64 b;\n"                                                                    \
      "setp.ne.b32 p, %5, 0;\n"                                                           \
      "mov.b32 high, 0x40000040;\n"                                                       \
      "mov.b64 b, {%4, high};\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names           \
      "}, {%0, %1, %2, %3}, b, p, 1, 1, 0;\n"                                             \
      "}\n"                                                                               \
      : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]), "+r"(b), "+r"(add), __VA_ARGS__)
#define SEDETECT_WGMMA(n, blocks)                                                  \
  if constexpr (kRows == n) {                                                      \
    if constexpr (std::is_same_v<T, __half>) {                                     \
      SEDETECT_WGMMA_OF(#n, "f16", SEDETECT_N##blocks, SEDETECT_A##blocks);        \
    } else {                                                                       \
      SEDETECT_WGMMA_OF(#n, "bf16", SEDETECT_N##blocks, SEDETECT_A##blocks);       \
    }                                                                              \
  }

// acc (64, kRows) = A (64, 16) B (kRows, 16)^T + (add ? acc : 0), by the four warps of a warpgroup; acc lies as that of
// hopper.cuh's multiply, kRows / 2 in a thread. Of A a thread holds pairs of columns, 2 (lane % 4) + 0, 1 and 8 beyond:
// a[0, 2] of row lane / 4, a[1, 3] of row lane / 4 + 8. They stay as they are until the product is done. b:
// matrix_descriptor_low's.
template <typename T, int kRows>
__device__ __forceinline__ void multiply(float* acc, uint32_t* a, uint32_t b, int add) {
  SEDETECT_WGMMA(16, 1)
  SEDETECT_WGMMA(32, 2)
  SEDETECT_WGMMA(48, 3)
  SEDETECT_WGMMA(64, 4)
  SEDETECT_WGMMA(80, 5)
  SEDETECT_WGMMA(96, 6)
  SEDETECT_WGMMA(112, 7)
  SEDETECT_WGMMA(128, 8)
  SEDETECT_WGMMA(144, 9)
  SEDETECT_WGMMA(160, 10)
  SEDETECT_WGMMA(176, 11)
  SEDETECT_WGMMA(192, 12)
  SEDETECT_WGMMA(208, 13)
  SEDETECT_WGMMA(224, 14)
  SEDETECT_WGMMA(240, 15)
  SEDETECT_WGMMA(256, 16)
}

#undef SEDETECT_N1
#undef SEDETECT_A1
#undef SEDETECT_N2
#undef SEDETECT_A2
#undef SEDETECT_N3
#undef SEDETECT_A3
#undef SEDETECT_N4
#undef SEDETECT_A4
#undef SEDETECT_N5
#undef SEDETECT_A5
#undef SEDETECT_N6
#undef SEDETECT_A6
#undef SEDETECT_N7
#undef SEDETECT_A7
#undef SEDETECT_N8
#undef SEDETECT_A8
#undef SEDETECT_N9
#undef SEDETECT_A9
#undef SEDETECT_N10
#undef SEDETECT_A10
#undef SEDETECT_N11
#undef SEDETECT_A11
#undef SEDETECT_N12
#undef SEDETECT_A12
#undef SEDETECT_N13
#undef SEDETECT_A13
#undef SEDETECT_N14
#undef SEDETECT_A14
#undef SEDETECT_N15
#undef SEDETECT_A15
#undef SEDETECT_N16
#undef SEDETECT_A16
#undef SEDETECT_F8
#undef SEDETECT_WGMMA
#undef SEDETECT_WGMMA_OF

}  // namespace sedetect::cuda::hopper
