// Matrix products of a form by wgmma: 32 inner elements are dequantized while the 32 before them are multiplied.
#pragma once

#include "mixed_gemm.cuh"
#include "register_products.cuh"

namespace sedetect::cuda {

// What the forms have in common; they say the most rows of a tile.
struct Wide {
  static constexpr int kWidth = 16, kBoxRows = 32;
  static constexpr int kBytes = kBytesOfProcessor;

  static CUtensorMap map_of(const Mixed& m) { return tensor_map(m.x, m.slots, m.inner, kBoxRows, m.type); }

  static __device__ __forceinline__ void copy_rows(uint32_t target, const CUtensorMap* rows, int inner, int row,
                                                   uint32_t barrier) {
    copy_box(target, rows, inner, row, barrier);
  }
};

template <typename Format, typename T, bool kGated, typename Form>
struct WarpgroupConsumer {
  using Memory = Shared<Format, Form>;
  using Step = typename Format::Step;
  using Fragments = uint32_t[2][4];  // of two slabs: 32 inner elements, half a step

  const Arguments& arguments;
  const Memory& shared;
  int steps;
  int group, warp, lane;   // warpgroup, and warp in it
  int column[2];           // of the tile's weight rows, the thread's
  uint32_t offset, apart;  // of the first row's pairs in a stage, and how far behind the second's are
  Ring ring{Memory::kStages};
  uint32_t phase = 0;
  Fragments kept = {};

  __device__ __forceinline__ WarpgroupConsumer(const Arguments& arguments, const Memory& shared, int steps, int group,
                                               int warp, int lane)
      : arguments(arguments), shared(shared), steps(steps), group(group), warp(warp), lane(lane) {
    for (int i = 0; i < 2; ++i) column[i] = weight_row<kGated>(arguments, group, warp, lane / 4, i);
    offset = Layout<Format>::offset(column[0]) + lane % 4 * (Layout<Format>::kSlab / 8);
    apart = (column[1] - column[0]) * Layout<Format>::kPitch;  // both rows are swizzled alike
  }

  __device__ __forceinline__ void read(Fragments& stored, int half) const {
    constexpr int kSecond = Layout<Format>::kSlab / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t first = (shared.stage_a(ring.stage) + offset) ^ ((2 * half + i) * Layout<Format>::kSlab);
      const uint32_t second = first + apart;
      stored[i][0] = Format::template load_pair<0>(first);
      stored[i][1] = Format::template load_pair<0>(second);
      stored[i][2] = Format::template load_pair<kSecond>(first);
      stored[i][3] = Format::template load_pair<kSecond>(second);
    }
  }

  static __device__ __forceinline__ void decode(Fragments& fragments, const Fragments& stored, const Step& step,
                                                int half) {
    if (step.is_large()) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        fragments[i / 4][i % 4] = Format::template decode<T, true>(stored[i / 4][i % 4], step, i % 2, half);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        fragments[i / 4][i % 4] = Format::template decode<T, false>(stored[i / 4][i % 4], step, i % 2, half);
      }
    }
  }

  // As decode, into kept. Fragments of products that are under way where a loop starts again have registers of their
  // own in the loop of every width, and the compiler holds them all at once, too many, unless they are one value
  // throughout: these are made from what they were, as far as the compiler can see.
  __device__ __forceinline__ void decode_kept(const Fragments& stored, const Step& step) {
    if (Form::kRows <= 64) return decode(kept, stored, step, 0);  // few widths
    Fragments fragments;
    decode(fragments, stored, step, 0);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      asm volatile("prmt.b32 %0, %0, %1, %2;"
                   : "+r"(kept[i / 4][i % 4])
                   : "r"(fragments[i / 4][i % 4]), "r"(arguments.second));
    }
  }

  template <int kRowsOfTile>
  static __device__ __forceinline__ void multiply_slab(float (&acc)[kRowsOfTile / 2], uint32_t (&fragment)[4],
                                                       uint32_t b, bool add) {
    constexpr int kFirst = kRowsOfTile <= 256 ? kRowsOfTile : 144;  // a product has at most 256 rows
    multiply<T, kFirst>(acc, fragment, b, add);
    if constexpr (kFirst < kRowsOfTile) {
      multiply<T, kRowsOfTile - kFirst>(acc + kFirst / 2, fragment, b + kFirst * kInner * 2 / 16, add);
    }
  }

  template <int kRowsOfTile>
  static __device__ __forceinline__ void multiply_half(float (&acc)[kRowsOfTile / 2], Fragments& fragments, uint32_t b,
                                                       bool add) {
    products_begin();
    multiply_slab<kRowsOfTile>(acc, fragments[0], b, add);
    multiply_slab<kRowsOfTile>(acc, fragments[1], b + 2, true);
    products_commit();
  }

  // Until all products but those of the last half are done the registers of the one before are in use.
  static __device__ __forceinline__ void wait_half(Fragments& fragments) {
    products_wait<1>();
#pragma unroll
    for (int i = 0; i < 8; ++i) asm volatile("" : "+r"(fragments[i / 4][i % 4])::"memory");
  }

  template <int kRowsOfTile>
  __device__ __forceinline__ void multiply_tile(const TileWeights& tile) {
    float acc[kRowsOfTile / 2] = {};
    Fragments other, stored;
    typename Format::Scaling scaling{tile.at, arguments.scales};
    Step now{}, next{};
    scaling.next(now);
    barrier_wait(shared.full(ring.stage), ring.phase);
    read(stored, 0);
    decode_kept(stored, now);
    read(stored, 1);
    uint32_t b = matrix_descriptor_low(shared.stage_b(ring.stage));
    multiply_half<kRowsOfTile>(acc, kept, b, false);
    decode(other, stored, now, 1);
#pragma unroll 1
    for (int step = 1; step < steps; ++step) {
      scaling.next(next);
      const int done = ring.stage;
      multiply_half<kRowsOfTile>(acc, other, b + 4, true);
      ring.advance();
      barrier_wait(shared.full(ring.stage), ring.phase);
      read(stored, 0);
      wait_half(kept);
      now = next;
      decode_kept(stored, now);
      read(stored, 1);
      b = matrix_descriptor_low(shared.stage_b(ring.stage));
      multiply_half<kRowsOfTile>(acc, kept, b, true);
      wait_half(other);
      if (lane == 0) barrier_arrive(shared.empty(done));
      decode(other, stored, now, 1);
    }
    multiply_half<kRowsOfTile>(acc, other, b + 4, true);
    products_wait<0>();
#pragma unroll
    for (float& value : acc) asm volatile("" : "+f"(value)::"memory");  // not to be read before
    if (lane == 0) barrier_arrive(shared.empty(ring.stage));
    ring.advance();

    hand_over<T, kGated, kRowsOfTile>(shared, group, warp, lane, phase, acc, tile.bias);
  }

  __device__ __forceinline__ void run() {
    Ring tiles{kTileSlots};
    while (true) {
      const Tile tile = shared.next_tile(tiles);
      if (tile.expert < 0) return;
      const TileWeights weights = TileWeights::of<kGated, T>(tile, column, arguments);
      switch ((tile.rows + Form::kWidth - 1) / Form::kWidth) {
#define SEDETECT_CASE(n)                                                                    \
  case n:                                                                                   \
    if constexpr (n * Form::kWidth <= Form::kRows) multiply_tile<n * Form::kWidth>(weights); \
    break
        SEDETECT_CASE(1);
        SEDETECT_CASE(2);
        SEDETECT_CASE(3);
        SEDETECT_CASE(4);
        SEDETECT_CASE(5);
        SEDETECT_CASE(6);
        SEDETECT_CASE(7);
        SEDETECT_CASE(8);
        SEDETECT_CASE(9);
        SEDETECT_CASE(10);
        SEDETECT_CASE(11);
        SEDETECT_CASE(12);
        SEDETECT_CASE(13);
        SEDETECT_CASE(14);
        SEDETECT_CASE(15);
        SEDETECT_CASE(16);
        SEDETECT_CASE(17);
        SEDETECT_CASE(18);
#undef SEDETECT_CASE
      }
    }
  }
};

}  // namespace sedetect::cuda
