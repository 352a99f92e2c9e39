// The instructions of sm_90a that the GEMM is made of, one function each: barriers, copies, matrix products.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sedetect::cuda::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- Barriers in shared memory (mbarrier): a phase ends when all arrivals and all announced bytes have come.

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialized barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives once all cp.async of this thread so far are complete.
__device__ __forceinline__ void barrier_arrive_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// As barrier_wait, for a wait that may be long and is in no hurry: leaves the processor to others.
__device__ __forceinline__ void barrier_wait_asleep(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra end;\n"
      "nanosleep.u32 256;\n"
      "bra again;\n"
      "end:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A place in the ring of stages.
struct Ring {
  int stages, stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }

  // The stage so many steps ago.
  __device__ __forceinline__ int before(int steps) const {
    return stage < steps ? stage - steps + stages : stage - steps;
  }
};

// --- Copies to shared memory.

__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap* map, int column, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(target),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap* map, int x, int y, int z,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(target),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// 16 bytes, or zeros where there is no source.
__device__ __forceinline__ void copy_16(uint32_t target, const void* source, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(there ? 16 : 0)
               : "memory");
}

// --- Matrix products (wgmma): 64 rows of A and 256 rows of B, both in shared memory as rows of 128 swizzled bytes.

// Orders shared memory written by ordinary copies before its reads by the tensor cores.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kInFlight>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

// Rows of 128 bytes with the 128-byte swizzle; groups of 8 rows are 1024 bytes apart.
constexpr uint32_t kMatrixDescriptorHigh = (1u << 30) | (1024 >> 4);

__device__ __forceinline__ uint32_t matrix_descriptor_low(uint32_t address) {
  return (1u << 16) | ((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address) {
  return (uint64_t{kMatrixDescriptorHigh} << 32) | matrix_descriptor_low(address);
}

#define SEDETECT_F8(a, i)                                                                                     \
  "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3]), "+f"(a[i + 4]), "+f"(a[i + 5]), "+f"(a[i + 6]), \
      "+f"(a[i + 7])
#define SEDETECT_F32(a, i) SEDETECT_F8(a, i), SEDETECT_F8(a, i + 8), SEDETECT_F8(a, i + 16), SEDETECT_F8(a, i + 24)
#define SEDETECT_WGMMA(type)                                                                              \
  asm volatile(                                                                                           \
      "{\n"                                                                                               \
      ".reg .pred p;\n"                                                                                   \
      "setp.ne.b32 p, %130, 0;\n"                                                                         \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                        \
      " "                                                                                                 \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                  \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                  \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                  \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
      "%128, %129, p, 1, 1, 0, 0;\n"                                                                      \
      "}\n"                                                                                               \
      : SEDETECT_F32(acc, 0), SEDETECT_F32(acc, 32), SEDETECT_F32(acc, 64), SEDETECT_F32(acc, 96)         \
      : "l"(a), "l"(b), "r"(add))

// acc (64, 256) = A (64, 16) B (256, 16)^T + (add ? acc : 0), by the four warps of a warpgroup. Of n-block j (8
// columns), a thread holds acc[4 j + 0, 1]: columns 2 (lane % 4) + 0, 1 of row lane / 4; and acc[4 j + 2, 3]: of row
// lane / 4 + 8.
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[128], uint64_t a, uint64_t b, int add);

template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&acc)[128], uint64_t a, uint64_t b, int add) {
  SEDETECT_WGMMA("bf16");
}

template <>
__device__ __forceinline__ void multiply<__half>(float (&acc)[128], uint64_t a, uint64_t b, int add) {
  SEDETECT_WGMMA("f16");
}

#undef SEDETECT_WGMMA
#undef SEDETECT_F32
#undef SEDETECT_F8

// --- Shared memory by the threads of a warp.

// Four 8 x 8 matrices of 16-bit elements, of each two of row lane / 4 in a thread. A column becomes the 16 bytes at the
// target: those of the i-th matrix of lanes 8 i to 8 i + 7.
__device__ __forceinline__ void store_transposed(uint32_t target, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: of the i-th, whose rows are the 16 bytes that lanes 8 i to 8 i + 7 point to,
// v[i] is elements 2 (lane % 4) + 0, 1 of row lane / 4.
__device__ __forceinline__ void load_matrices(uint32_t source, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(source)
               : "memory");
}

__device__ __forceinline__ void load_16(uint32_t source, uint32_t (&v)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(source)
               : "memory");
}

// --- Registers of a warpgroup.

template <int kRegisters>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace sedetect::cuda::hopper
