// Tiles of up to 32 sorted rows, by mma, each warp for itself; a processor has two blocks, one of which loads while the
// other waits. Weight traffic decides here, and instructions do next, so that no warp waits for another: what hides
// their latency are the three others of a scheduler.
//
// Which of a slab's 16 inner elements stands where is free as long as both operands agree, and sums are the same: a
// thread has four that follow one another, one load of each row.

#include "mixed_gemm.cuh"

namespace sedetect::cuda {
namespace {

struct Few {
  static constexpr int kRows = 32, kWidth = 8, kBoxRows = 8;  // most rows of a tile, their steps, those of a box
  static constexpr int kBlocks = 2;                           // of a processor
  static constexpr int kBytes = 164 * 1024;                   // their shared memory: the rest caches the scales
  static constexpr int kRegistersOfConsumers = 88, kRegistersOfOthers = 56;
  static constexpr int kSlab = kBoxRows * 32;  // bytes of 16 inner elements of a box, one row after another

  static CUtensorMap map_of(const Mixed& m) { return slab_map(m.x, m.slots, m.inner, kBoxRows, m.type); }

  static __device__ __forceinline__ void copy_rows(uint32_t target, const CUtensorMap* rows, int inner, int row,
                                                   uint32_t barrier) {
    copy_box(target, rows, 0, row, inner / 16, barrier);
  }
};

#define SEDETECT_MMA(type)                                                                 \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                               \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"               \
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// acc (16, 8) += A (16, 16) B (8, 16)^T by a warp. A thread has of A's rows lane / 4 (a[0, 2]) and lane / 4 + 8
// (a[1, 3]), and of B's row lane / 4, pairs of the same inner elements; of acc columns 2 (lane % 4) + 0, 1 of A's rows.
template <typename T>
__device__ __forceinline__ void multiply(float* acc, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    SEDETECT_MMA("f16");
  } else {
    SEDETECT_MMA("bf16");
  }
}

#undef SEDETECT_MMA

__device__ __forceinline__ void load_8(uint32_t source, uint32_t (&v)[2]) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(source));
}

template <typename Format, typename T, bool kGated, typename>
struct Consumer {
  using Step = typename Format::Step;
  using Memory = Shared<Format, Few>;

  const Arguments& arguments;
  const Memory& shared;
  int steps;
  int group, warp, lane;  // warpgroup, and warp in it
  int column[2];          // of the tile's 128 weight rows, the thread's
  typename Format::Reader reader;
  Ring ring{Memory::kStages};
  uint32_t phase = 0;

  __device__ __forceinline__ Consumer(const Arguments& arguments, const Memory& shared, int steps, int group, int warp,
                                      int lane)
      : arguments(arguments), shared(shared), steps(steps), group(group), warp(warp), lane(lane) {
    for (int i = 0; i < 2; ++i) column[i] = weight_row<kGated>(arguments, group, warp, lane / 4, i);
    // Where the lane points to in matrices of 8 rows, and where its own pairs are.
    const int pointed = weight_row<kGated>(arguments, group, warp, lane % 8, lane / 8 % 2);
    reader = Format::Reader::of(Layout<Format>::offset(pointed), Layout<Format>::offset(column[0]),
                                (column[1] - column[0]) * Layout<Format>::kPitch, lane);
  }

  template <int kBlocksOfTile, bool kLarge>
  static __device__ __forceinline__ void multiply_step(float* acc, const uint32_t (&stored)[4][4], const Step& step,
                                                       uint32_t b) {
#pragma unroll
    for (int slab = 0; slab < 4; ++slab) {
      uint32_t fragment[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fragment[i] = Format::template decode<T, kLarge>(stored[slab][i], step, i % 2, slab / 2);
      }
#pragma unroll
      for (int block = 0; block < kBlocksOfTile; ++block) {
        uint32_t rows[2];
        load_8(b + block * Few::kBoxRows * kInner * 2 + slab * Few::kSlab, rows);
        multiply<T>(acc + 4 * block, fragment, rows);
      }
    }
  }

  template <int kBlocksOfTile>
  __device__ __forceinline__ void multiply_tile(const TileWeights& tile) {
    constexpr int kPadded = (kBlocksOfTile + 1) / 2 * 2;
    float acc[kPadded * 4] = {};
    typename Format::Scaling scaling{tile.at, arguments.scales};
    Step next{};
    scaling.next(next);
#pragma unroll 2
    for (int step = 0; step < steps; ++step) {
      const Step now = next;
      scaling.next(next);
      barrier_wait(shared.full(ring.stage), ring.phase);
      uint32_t stored[4][4];
      reader.read(stored, shared.stage_a(ring.stage));
      const uint32_t b = shared.stage_b(ring.stage) + lane * 8;
      if (now.is_large()) {
        multiply_step<kBlocksOfTile, true>(acc, stored, now, b);
      } else {
        multiply_step<kBlocksOfTile, false>(acc, stored, now, b);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.empty(ring.stage));
      ring.advance();
    }

    hand_over<T, kGated, kPadded * 8>(shared, group, warp, lane, phase, acc, tile.bias);
  }

  __device__ __forceinline__ void run() {
    Ring tiles{kTileSlots};
    while (true) {
      const Tile tile = shared.next_tile(tiles);
      if (tile.expert < 0) return;
      const TileWeights weights = TileWeights::of<kGated, T>(tile, column, arguments);
      switch ((tile.rows + Few::kWidth - 1) / Few::kWidth) {
#define SEDETECT_CASE(n)       \
  case n:                      \
    multiply_tile<n>(weights); \
    break
        SEDETECT_CASE(1);
        SEDETECT_CASE(2);
        SEDETECT_CASE(3);
        SEDETECT_CASE(4);
#undef SEDETECT_CASE
      }
    }
  }
};

}  // namespace

void mixed_few(const Mixed& m, const Arguments& arguments, cudaStream_t stream) {
  launch<Few, Consumer>(m, arguments, stream);
}

}  // namespace sedetect::cuda
