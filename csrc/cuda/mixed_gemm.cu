// Grouped GEMMs with the weights on the left by hand for sm_90a: one kernel, persistent and warp-specialized.
//
// The weights are the left operand, which the tensor cores take from registers: a block computes tiles of 128 weight
// rows x up to 256 sorted rows of an expert, 64 inner elements at a time, and so dequantizes a weight once for all of
// them. Where experts have few rows the tiles have up to 64, and a processor has two blocks, one of which loads while
// the other waits. Two warpgroups dequantize and multiply, 64 weight rows each: 16 inner elements are dequantized while the 16
// before them are multiplied. They leave the products, transposed and rounded to 16 bits, in shared memory. Of the
// third warpgroup one warp loads stored bytes and rows by the tensor copy engine, and the others gate, measure and store
// the products while the next tile is multiplied.
//
// Tiles have rows in steps of kWidth, as many as their products are wide, and so take unequal times; every block takes
// the next one when it is ready for it.

#include "check.h"
#include "gate.cuh"
#include "hopper.cuh"
#include "mixed_gemm.h"
#include "register_products.cuh"
#include "search.cuh"
#include "tensor_map.h"

namespace sedetect::cuda {
namespace {

using namespace hopper;

constexpr int kColumns = 128;  // weight rows of a tile
constexpr int kWidth = 16;     // step of a tile's rows
constexpr int kBoxRows = 32;   // of the boxes that sorted rows are copied in
constexpr int kInner = 64;     // of a step; 128 bytes of a row: the width of the swizzle
constexpr int kFewRows = 64, kManyRows = 256;  // most sorted rows of a tile
constexpr int kGroup = 8;  // row tiles that pass over a weight block together, while it is in L2
constexpr int kThreads = 3 * 128;
constexpr int kTileSlots = 4;

template <int kRows>
constexpr int kBlocks = kRows == kFewRows ? 2 : 1;  // of a processor

struct Arguments {
  const int64_t* offsets;
  int32_t* next;
  const void *scale, *bias;
  void* out;  // (S, width)
  float* parts;
  Gate gate;
  bool interleaved;
  int experts, columns;  // columns: weight rows of one expert
  int inner, width, slots;
  uint32_t second;  // of prmt: the bytes of its second operand
  int scale_rows, scale_columns, high, wide_bits;  // wide_bits: the exponent of 2 of columns that share a scale
};

// --- Formats: how a thread reads the pairs of weights of its fragments, and what they are.

struct E4M3 {
  static constexpr int kBits = 8;
  using Scale = float;

  // The scales of a thread's two rows in a step.
  struct Step {
    float scale[2];

    __device__ __forceinline__ float of(int row, int) const { return scale[row]; }
  };

  // at: where the scales of each row begin.
  static __device__ __forceinline__ Step step(const uint32_t (&at)[2], int inner, const Arguments& arguments) {
    const Scale* scale = static_cast<const Scale*>(arguments.scale);
    const uint32_t group = min(inner >> arguments.wide_bits, arguments.scale_columns - 1);
    return {{__ldg(scale + (at[0] + group)), __ldg(scale + (at[1] + group))}};
  }

  template <int kOffset>
  static __device__ __forceinline__ uint32_t read(uint32_t address) {
    uint16_t pair;
    asm volatile("ld.shared.u16 %0, [%1 + %2];" : "=h"(pair) : "r"(address), "n"(kOffset));
    return pair;
  }

  template <typename T>
  static __device__ __forceinline__ uint32_t decode(uint32_t pair, float scale) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
    const float2 values = Pair<__half>::unpack(halves);
    return Pair<T>::pack(__fmul_rn(values.x, scale), __fmul_rn(values.y, scale));
  }
};

struct E2M1 {
  static constexpr int kBits = 4;
  using Scale = uint8_t;

  struct Step {
    uint32_t scale[2][2];

    // As a pair of bfloat16.
    __device__ __forceinline__ uint32_t of(int row, int half) const {
      const uint32_t e = scale[row][half];
      return (e == 0 ? 0x40 : e == 255 ? 0x7FC0 : e << 7) * 0x10001;
    }
  };

  static __device__ __forceinline__ Step step(const uint32_t (&at)[2], int inner, const Arguments& arguments) {
    const Scale* scale = static_cast<const Scale*>(arguments.scale);
    Step result;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t group = min(inner / 32 + half, arguments.scale_columns - 1);
      for (int row = 0; row < 2; ++row) result.scale[row][half] = __ldg(scale + (at[row] + group));
    }
    return result;
  }

  template <int kOffset>
  static __device__ __forceinline__ uint32_t read(uint32_t address) {
    uint32_t pair;
    asm volatile("ld.shared.u8 %0, [%1 + %2];" : "=r"(pair) : "r"(address), "n"(kOffset));
    return pair;
  }

  // Their bits in bfloat16's places are 2^-126 of the values, 0.5 among the subnormals; every step is exact.
  template <typename T>
  static __device__ __forceinline__ uint32_t decode(uint32_t pair, uint32_t scale) {
    const uint32_t bits = ((pair * 0x01001000) & 0x80008000) | ((pair * 0x00040040) & 0x01C001C0);
    return times(times(bits, 0x7E807E80), scale);
  }

  static __device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
    const __nv_bfloat162 product =
        __hmul2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(product);
  }
};

// How the stored bytes of a step lie in shared memory: rows of kPitch bytes, their 16-byte parts swizzled.
template <typename Format>
struct Layout {
  static constexpr int kPitch = kInner * Format::kBits / 8;
  static constexpr int kBytes = kColumns * kPitch;
  static constexpr int kSlab = 2 * Format::kBits;  // bytes of the 16 inner elements of a product
  static constexpr CUtensorMapSwizzle kSwizzle = kPitch == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;

  static __device__ __forceinline__ uint32_t offset(int row, int lane) {
    const int swizzle = row / (128 / kPitch) % (kPitch / 16);
    return row * kPitch + swizzle * 16 + lane % 4 * (kSlab / 8);
  }
};

// --- Tiles.

// What the loading warpgroup tells the others of a tile; an expert of -1: there are no more.
struct Tile {
  int expert, first, rows, column;  // sorted rows, and which column tile it is

  static __device__ __forceinline__ Tile of(const int4& v) { return {v.x, v.y, v.z, v.w}; }

  // ends[e]: row tiles of the experts up to and with e.
  static __device__ __forceinline__ Tile at(int index, const int* ends, int column_tiles, const Arguments& arguments) {
    const int row_tiles = ends[arguments.experts - 1];
    if (index >= row_tiles * column_tiles) return {-1, 0, 0, 0};
    const int group = index / (kGroup * column_tiles) * kGroup;
    const int size = min(row_tiles - group, kGroup);
    const int within = index % (kGroup * column_tiles);
    const int row_tile = group + within % size;
    const int expert = first_that_ends_after(ends, arguments.experts, row_tile);
    const int before = expert == 0 ? 0 : ends[expert - 1];
    const int tiles = ends[expert] - before, number = row_tile - before;
    const int begin = static_cast<int>(__ldg(arguments.offsets + expert));
    const int rows = static_cast<int>(__ldg(arguments.offsets + expert + 1)) - begin;
    // As even as steps of kWidth make them, the first ones the larger.
    const int widths = (rows + kWidth - 1) / kWidth, share = widths / tiles, more = widths % tiles;
    const int first = (number * share + min(number, more)) * kWidth;
    return {expert, begin + first, min((share + (number < more)) * kWidth, rows - first), within / size};
  }
};

// Needs all threads of the block.
template <int kRows>
__device__ __forceinline__ void count_row_tiles(int* ends, const Arguments& arguments) {
  for (int e = threadIdx.x; e < arguments.experts; e += kThreads) {
    const int64_t rows = __ldg(arguments.offsets + e + 1) - __ldg(arguments.offsets + e);
    ends[e] = static_cast<int>((rows + kRows - 1) / kRows);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    int before = 0;
    for (int start = 0; start < arguments.experts; start += 32) {
      const int e = start + threadIdx.x;
      int sum = e < arguments.experts ? ends[e] : 0;
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(~0u, sum, offset);
        if (threadIdx.x >= offset) sum += other;
      }
      sum += before;
      if (e < arguments.experts) ends[e] = sum;
      before = __shfl_sync(~0u, sum, 31);
    }
  }
  __syncthreads();
}

// --- Shared memory.

constexpr int kBytesOfProcessor = 228 * 1024, kBytesOfSystem = 1024;  // the latter of every block

template <typename Format, int kRows>
struct Shared {
  const int* ends;
  int4* tiles;       // kTileSlots
  uint32_t b, a, z;  // addresses of the stages, and of the products of the warpgroups
  uint32_t barriers;

  static constexpr int kBytesA = Layout<Format>::kBytes, kBytesB = kRows * kInner * 2;
  static constexpr int kBytesZ = kRows * kColumns / 2 * 2;
  static constexpr int kBytesOfStage = kBytesA + kBytesB + 2 * int(sizeof(uint64_t));
  static constexpr int kBytesOfTiles = kTileSlots * int(sizeof(int4) + 2 * sizeof(uint64_t)) + 4 * int(sizeof(uint64_t));
  static constexpr int kStages = (kBytesOfProcessor / kBlocks<kRows> - kBytesOfSystem - 2 * kBytesZ - kBytesOfTiles -
                                  kMaxMixedExperts * int(sizeof(int))) /
                                 kBytesOfStage;
  static constexpr int kBarriers = 2 * kStages + 2 * kTileSlots + 4;
  static_assert(kStages >= 3);

  // Of a block.
  static int bytes(int experts) {
    return kStages * kBytesOfStage + 2 * kBytesZ + kBytesOfTiles + experts * int(sizeof(int));
  }

  __device__ __forceinline__ uint32_t stage_a(int stage) const { return a + stage * kBytesA; }
  __device__ __forceinline__ uint32_t stage_b(int stage) const { return b + stage * kBytesB; }
  __device__ __forceinline__ uint32_t products(int group) const { return z + group * kBytesZ; }
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(kStages + stage); }
  __device__ __forceinline__ uint32_t tile_full(int slot) const { return full(2 * kStages + slot); }
  __device__ __forceinline__ uint32_t tile_empty(int slot) const { return tile_full(kTileSlots + slot); }
  __device__ __forceinline__ uint32_t products_full(int group) const { return tile_full(2 * kTileSlots + group); }
  __device__ __forceinline__ uint32_t products_empty(int group) const { return products_full(2 + group); }

  // The next tile, for all threads of a warp.
  __device__ __forceinline__ Tile next_tile(Ring& ring) const {
    barrier_wait(tile_full(ring.stage), ring.phase);
    const Tile tile = Tile::of(tiles[ring.stage]);
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(tile_empty(ring.stage));
    ring.advance();
    return tile;
  }
};

// --- The warp that loads.

template <typename Format, bool kGated, int kRows>
__device__ __forceinline__ void load(const Arguments& arguments, const CUtensorMap& rows, const CUtensorMap& weights,
                                     const Shared<Format, kRows>& shared, int column_tiles, int steps) {
  constexpr int kBytesA = Layout<Format>::kBytes, kBytesBox = kBoxRows * kInner * 2;
  // The weight rows of a column tile that has gate and up apart are in two runs.
  const bool apart = kGated && !arguments.interleaved;
  Ring ring{shared.kStages}, tiles{kTileSlots};
  while (true) {
    barrier_wait(shared.tile_empty(tiles.stage), tiles.phase ^ 1);
    const Tile tile = Tile::at(atomicAdd(arguments.next, 1), shared.ends, column_tiles, arguments);
    shared.tiles[tiles.stage] = make_int4(tile.expert, tile.first, tile.rows, tile.column);
    barrier_arrive(shared.tile_full(tiles.stage));
    tiles.advance();
    if (tile.expert < 0) return;
    const int upper = tile.expert * arguments.columns + tile.column * (apart ? kColumns / 2 : kColumns);
    const int lower = upper + (apart ? arguments.width : kColumns / 2);
    const int boxes = (tile.rows + kBoxRows - 1) / kBoxRows;
    for (int step = 0; step < steps; ++step) {
      const int inner = step * kInner, byte = inner * Format::kBits / 8;
      const uint32_t full = shared.full(ring.stage), a = shared.stage_a(ring.stage), b = shared.stage_b(ring.stage);
      barrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
      barrier_arrive_expect(full, kBytesA + boxes * kBytesBox);
      copy_box(a, &weights, byte, upper, full);
      copy_box(a + kBytesA / 2, &weights, byte, lower, full);
      for (int i = 0; i < boxes; ++i) copy_box(b + i * kBytesBox, &rows, inner, tile.first + i * kBoxRows, full);
      ring.advance();
    }
  }
}

// --- The warpgroups that multiply.

template <typename Format, typename T, bool kGated, int kRows>
struct Consumer {
  using Step = typename Format::Step;

  const Arguments& arguments;
  const Shared<Format, kRows>& shared;
  int steps;
  int group, warp, lane;  // warpgroup, and warp in it
  int column[2];          // of the tile's 128 weight rows, the thread's
  uint32_t offset, apart;  // of the first row's pairs in a stage, and how far behind the second's are
  uint32_t target;        // of a part of a row of the products
  Ring ring;
  uint32_t phase;
  uint32_t even[4] = {};

  // A thread's two rows are the gate and the up row of one column of the result where there are two.
  __device__ __forceinline__ void place() {
    if (kGated) {
      const int c = 32 * group + 8 * warp + lane / 4;
      column[0] = arguments.interleaved ? 2 * c : c;
      column[1] = arguments.interleaved ? 2 * c + 1 : c + kColumns / 2;
    } else {
      column[0] = 64 * group + 16 * warp + lane / 4;
      column[1] = column[0] + 8;
    }
    offset = Layout<Format>::offset(column[0], lane);
    apart = (column[1] - column[0]) * Layout<Format>::kPitch;  // both rows are swizzled alike
    const int row = lane / 16 * 8 + lane % 8, lower = lane / 8 % 2;
    const int part = kGated ? warp + 4 * lower : 2 * warp + lower;
    target = shared.products(group) + row * 128 + ((part ^ (row % 8)) << 4);
  }

  // The stored pairs of the slab-th 16 inner elements of a stage.
  __device__ __forceinline__ void read(uint32_t (&stored)[4], int slab) const {
    constexpr int kHalf = Layout<Format>::kSlab / 2;
    const uint32_t first = (shared.stage_a(ring.stage) + offset) ^ (slab * Layout<Format>::kSlab);
    const uint32_t second = first + apart;
    stored[0] = Format::template read<0>(first);
    stored[1] = Format::template read<0>(second);
    stored[2] = Format::template read<kHalf>(first);
    stored[3] = Format::template read<kHalf>(second);
  }

  static __device__ __forceinline__ void decode(uint32_t (&fragment)[4], const uint32_t (&stored)[4], const Step& step,
                                                int slab) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = Format::template decode<T>(stored[i], step.of(i % 2, slab / 2));
  }

  // As decode, into even. The fragment of a product that is under way where a loop starts again has registers of its
  // own in the loop of every width, and the compiler holds them all at once, too many, unless it is one value
  // throughout: this one is made from what it was, as far as the compiler can see.
  __device__ __forceinline__ void decode_even(const uint32_t (&stored)[4], const Step& step, int slab) {
    if (kBlocks<kRows> > 1) return decode(even, stored, step, slab);  // few widths
    uint32_t fragment[4];
    decode(fragment, stored, step, slab);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm volatile("prmt.b32 %0, %0, %1, %2;" : "+r"(even[i]) : "r"(fragment[i]), "r"(arguments.second));
    }
  }

  template <int kRowsOfTile>
  __device__ __forceinline__ void multiply_slab(float (&acc)[kRowsOfTile / 2], uint32_t (&fragment)[4], uint32_t b,
                                                bool add) {
    products_begin();
    multiply<T, kRowsOfTile>(acc, fragment, b, add);
    products_commit();
  }

  // Until all products but the last one are done the registers of the one before are in use.
  static __device__ __forceinline__ void wait_slab(uint32_t (&fragment)[4]) {
    products_wait<1>();
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(fragment[i])::"memory");
  }

  // at: where the scales of the thread's weight rows begin.
  template <int kRowsOfTile>
  __device__ __forceinline__ void multiply_tile(const uint32_t (&at)[2], const float (&bias)[2]) {
    float acc[kRowsOfTile / 2] = {};
    uint32_t odd[4], stored[4];
    Step now = Format::step(at, 0, arguments);
    barrier_wait(shared.full(ring.stage), ring.phase);
    read(stored, 0);
    decode_even(stored, now, 0);
    read(stored, 1);
    uint32_t b = matrix_descriptor_low(shared.stage_b(ring.stage));
    multiply_slab<kRowsOfTile>(acc, even, b, false);
    decode(odd, stored, now, 1);
#pragma unroll 1
    for (int step = 1; step < steps; ++step) {
      const Step next = Format::step(at, step * kInner, arguments);
      read(stored, 2);
      multiply_slab<kRowsOfTile>(acc, odd, b + 2, true);
      wait_slab(even);
      decode_even(stored, now, 2);
      read(stored, 3);
      multiply_slab<kRowsOfTile>(acc, even, b + 4, true);
      wait_slab(odd);
      decode(odd, stored, now, 3);
      const int done = ring.stage;
      ring.advance();
      barrier_wait(shared.full(ring.stage), ring.phase);
      read(stored, 0);
      multiply_slab<kRowsOfTile>(acc, odd, b + 6, true);
      wait_slab(even);
      now = next;
      decode_even(stored, now, 0);
      read(stored, 1);
      b = matrix_descriptor_low(shared.stage_b(ring.stage));
      multiply_slab<kRowsOfTile>(acc, even, b, true);
      wait_slab(odd);
      if (lane == 0) barrier_arrive(shared.empty(done));
      decode(odd, stored, now, 1);
    }
    read(stored, 2);
    multiply_slab<kRowsOfTile>(acc, odd, b + 2, true);
    wait_slab(even);
    decode_even(stored, now, 2);
    read(stored, 3);
    multiply_slab<kRowsOfTile>(acc, even, b + 4, true);
    wait_slab(odd);
    decode(odd, stored, now, 3);
    multiply_slab<kRowsOfTile>(acc, odd, b + 6, true);
    products_wait<0>();
#pragma unroll
    for (float& value : acc) asm volatile("" : "+f"(value)::"memory");  // not to be read before
    if (lane == 0) barrier_arrive(shared.empty(ring.stage));
    ring.advance();

    barrier_wait(shared.products_empty(group), phase ^ 1);
#pragma unroll
    for (int block = 0; block < kRowsOfTile / 8; block += 2) {
      uint32_t z[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = acc + 4 * block + 2 * i;
        z[i] = Pair<T>::pack(pair[0] + bias[i % 2], pair[1] + bias[i % 2]);
      }
      store_transposed(target + block * 8 * 128, z);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.products_full(group));
    phase ^= 1;
  }

  __device__ __forceinline__ void run() {
    place();
    phase = 0;
    Ring tiles{kTileSlots};
    while (true) {
      const Tile tile = shared.next_tile(tiles);
      if (tile.expert < 0) return;
      const bool apart = kGated && !arguments.interleaved;
      uint32_t at[2];
      float bias[2] = {-0.0f, -0.0f};  // which leave what they are added to as it is
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int row = tile.column * (apart ? kColumns / 2 : kColumns) + column[i];
        if (apart && i == 1) row += arguments.width - kColumns / 2;
        row = min(row, arguments.columns - 1);  // those beyond the end go nowhere
        at[i] = (tile.expert * arguments.scale_rows + row / arguments.high) * arguments.scale_columns;
        if (arguments.bias != nullptr) {
          const T* biases = static_cast<const T*>(arguments.bias);
          bias[i] = static_cast<float>(biases[static_cast<int64_t>(tile.expert) * arguments.columns + row]);
        }
      }
      switch ((tile.rows + kWidth - 1) / kWidth) {
#define SEDETECT_CASE(n)                                                       \
  case n:                                                                      \
    if constexpr (n * kWidth <= kRows) multiply_tile<n * kWidth>(at, bias); \
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
#undef SEDETECT_CASE
      }
    }
  }
};

// --- The warps that finish.

template <typename Format, typename T, bool kGated, int kRows>
struct Finisher {
  static constexpr int kPart = kGated ? 32 : 64;  // columns of the result that a warpgroup has multiplied
  static constexpr int kThreadsOfRow = kPart / 8;
  static constexpr int kRowsAtOnce = 3 * 32 / kThreadsOfRow;

  const Arguments& arguments;
  const Shared<Format, kRows>& shared;
  int warp, lane;

  // Gates, measures and stores the products of one warpgroup. Eight threads that read together read eight parts of one
  // row; or four of two rows whose parts are in other banks.
  template <Activation kActivation>
  __device__ __forceinline__ void finish(const Tile& tile, int group) {
    const int part = lane % kThreadsOfRow, number = 2 * tile.column + group, column = number * kPart + part * 8;
    const int first = kGated ? 8 * warp + lane / 8 + lane / 4 % 2 * 4 : 4 * warp + lane / 8;
    for (int start = 0; start < tile.rows; start += kRowsAtOnce) {
      const int r = start + first;
      const uint32_t source = shared.products(group) + r % kRows * 128;
      uint32_t v[4], u[4];
      load_16(source + ((part ^ (r % 8)) << 4), v);
      if (kGated) load_16(source + (((part + 4) ^ (r % 8)) << 4), u);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 g = Pair<T>::unpack(v[i]);
        if (kGated) {
          const float2 w = Pair<T>::unpack(u[i]);
          v[i] = Pair<T>::pack(apply_gate<kActivation>(arguments.gate, g.x, w.x),
                               apply_gate<kActivation>(arguments.gate, g.y, w.y));
        } else if (kActivation != Activation::kNone) {
          v[i] = Pair<T>::pack(activate<kActivation>(g.x, arguments.gate.slope),
                               activate<kActivation>(g.y, arguments.gate.slope));
        }
      }
      const bool there = column < arguments.width && r < tile.rows;
      const int64_t at = tile.first + r;
      if (there) {
        *reinterpret_cast<uint4*>(static_cast<T*>(arguments.out) + at * arguments.width + column) =
            make_uint4(v[0], v[1], v[2], v[3]);
      }
      if (arguments.parts != nullptr) {
        constexpr uint32_t kMagnitudes = 0x7FFF7FFF;
        uint32_t best = __vmaxu2(__vmaxu2(v[0] & kMagnitudes, v[1] & kMagnitudes),
                                 __vmaxu2(v[2] & kMagnitudes, v[3] & kMagnitudes));
        // As integers magnitudes have the order of the values, NaN above Inf.
        best = there ? max(best & 0xFFFF, best >> 16) : 0;
#pragma unroll
        for (int other = 1; other < kThreadsOfRow; other *= 2) best = max(best, __shfl_xor_sync(~0u, best, other));
        if (part == 0 && there) {
          arguments.parts[static_cast<int64_t>(number) * arguments.slots + at] = Pair<T>::unpack(best).x;
        }
      }
    }
  }

  __device__ __forceinline__ void finish(const Tile& tile, int group) {
    switch (arguments.gate.activation) {
      case Activation::kSilu:
        return finish<Activation::kSilu>(tile, group);
      case Activation::kGelu:
        return finish<Activation::kGelu>(tile, group);
      case Activation::kGeluTanh:
        return finish<Activation::kGeluTanh>(tile, group);
      case Activation::kRelu2:
        return finish<Activation::kRelu2>(tile, group);
      default:
        return finish<Activation::kNone>(tile, group);
    }
  }

  __device__ __forceinline__ void run() {
    Ring tiles{kTileSlots};
    for (uint32_t phase = 0;; phase ^= 1) {
      const Tile tile = shared.next_tile(tiles);
      if (tile.expert < 0) return;
      for (int group = 0; group < 2; ++group) {
        barrier_wait(shared.products_full(group), phase);
        finish(tile, group);
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.products_empty(group));
      }
    }
  }
};

template <typename Format, typename T, bool kGated, int kRows>
__global__ void __launch_bounds__(kThreads, kBlocks<kRows>)
    mixed_gemm(const __grid_constant__ Arguments arguments, const __grid_constant__ CUtensorMap rows,
               const __grid_constant__ CUtensorMap weights) {
  using Memory = Shared<Format, kRows>;
  extern __shared__ __align__(1024) uint8_t dynamic[];  // the swizzles repeat every 1024 bytes
  uint8_t* a = dynamic + Memory::kStages * Memory::kBytesB;
  uint8_t* z = a + Memory::kStages * Memory::kBytesA;
  int4* tiles = reinterpret_cast<int4*>(z + 2 * Memory::kBytesZ);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(tiles + kTileSlots);
  int* ends = reinterpret_cast<int*>(barriers + Memory::kBarriers);
  const Memory shared{ends, tiles, shared_address(dynamic), shared_address(a), shared_address(z),
                      shared_address(barriers)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Memory::kStages; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), 8);
    }
    for (int slot = 0; slot < kTileSlots; ++slot) {
      barrier_init(shared.tile_full(slot), 1);
      barrier_init(shared.tile_empty(slot), 11);  // the warps that read it
    }
    for (int group = 0; group < 2; ++group) {
      barrier_init(shared.products_full(group), 4);
      barrier_init(shared.products_empty(group), 3);
    }
    barrier_init_fence();
    prefetch_map(&weights);
    prefetch_map(&rows);
  }
  count_row_tiles<kRows>(ends, arguments);
  constexpr int kTile = kGated ? kColumns / 2 : kColumns;
  const int column_tiles = (arguments.width + kTile - 1) / kTile;
  const int steps = (arguments.inner + kInner - 1) / kInner;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  constexpr bool kFew = kBlocks<kRows> > 1;
  if (group == 0) {
    registers_decrease<kFew ? 56 : 72>();
    if (warp > 0) {
      Finisher<Format, T, kGated, kRows>{arguments, shared, warp - 1, lane}.run();
    } else if (lane == 0) {
      load<Format, kGated>(arguments, rows, weights, shared, column_tiles, steps);
    }
  } else {
    registers_increase<kFew ? 88 : 216>();
    Consumer<Format, T, kGated, kRows>{arguments, shared, steps, group - 1, warp, lane, {}, 0, 0, 0,
                                       Ring{Memory::kStages}}.run();
  }
}

template <typename Format, typename T, bool kGated, int kRows>
void launch(const Mixed& m, const Arguments& arguments, cudaStream_t stream) {
  const CUtensorMap rows = tensor_map(m.x, m.slots, m.inner, kBoxRows, m.type);
  const CUtensorMap weights = tensor_map(m.weight.stored, static_cast<int64_t>(m.experts) * arguments.columns,
                                         m.inner / 8 * Format::kBits, kColumns / 2, Layout<Format>::kPitch,
                                         CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, Layout<Format>::kSwizzle);
  const auto kernel = mixed_gemm<Format, T, kGated, kRows>;
  const int bytes = Shared<Format, kRows>::bytes(m.experts);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  check(cudaMemsetAsync(m.next, 0, sizeof(int32_t), stream), "cudaMemsetAsync");
  kernel<<<m.processors * kBlocks<kRows>, kThreads, bytes, stream>>>(arguments, rows, weights);
  check(cudaGetLastError(), "mixed_gemm");
}

template <typename Format, typename T, bool kGated>
void launch(const Mixed& m, const Arguments& arguments, cudaStream_t stream) {
  if (m.few) {
    launch<Format, T, kGated, kFewRows>(m, arguments, stream);
  } else {
    launch<Format, T, kGated, kManyRows>(m, arguments, stream);
  }
}

template <typename Format, typename T>
void launch(const Mixed& m, const Arguments& arguments, cudaStream_t stream) {
  if (m.gate.gated) {
    launch<Format, T, true>(m, arguments, stream);
  } else {
    launch<Format, T, false>(m, arguments, stream);
  }
}

}  // namespace

void mixed_gemm(const Mixed& m, cudaStream_t stream) {
  int wide_bits = 0;
  while (m.weight.scale_columns > 1 ? 1 << wide_bits < m.weight.wide : wide_bits < 31) ++wide_bits;
  const Arguments arguments{m.offsets,
                            m.next,
                            m.weight.scale,
                            m.bias,
                            m.result,
                            m.parts,
                            m.gate,
                            m.interleaved,
                            m.experts,
                            m.gate.gated ? 2 * m.width : m.width,
                            m.inner,
                            m.width,
                            m.slots,
                            0x7654,
                            m.weight.scale_rows,
                            m.weight.scale_columns,
                            m.weight.high,
                            wide_bits};
  if (m.weight.format == Format::kE2M1) {
    launch<E2M1, __nv_bfloat16>(m, arguments, stream);
  } else if (m.type == Type::kBFloat16) {
    launch<E4M3, __nv_bfloat16>(m, arguments, stream);
  } else {
    launch<E4M3, __half>(m, arguments, stream);
  }
}

}  // namespace sedetect::cuda
