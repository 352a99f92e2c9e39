// Grouped GEMMs with the weights on the left by hand for sm_90a: what their forms share, persistent and
// warp-specialized. A form says how many sorted rows its tiles have and how they are copied; its consumers multiply.
//
// The weights are the left operand, which the tensor cores take from registers: a block computes tiles of 128 weight
// rows x some sorted rows of an expert, 64 inner elements at a time, and so dequantizes a weight once for all of them.
// Two warpgroups dequantize and multiply, 64 weight rows each. They leave the products, transposed and rounded to 16
// bits, in shared memory. Of the third warpgroup one warp loads stored bytes and rows by the tensor copy engine, and
// the others gate, measure and store the products while the next tile is multiplied.
//
// Tiles have rows in steps as wide as a form's products, and so take unequal times; every block takes the next one when
// it is ready for it.
#pragma once

#include "check.h"
#include "gate.cuh"
#include "hopper.cuh"
#include "mixed_formats.cuh"
#include "mixed_gemm.h"
#include "search.cuh"
#include "tensor_map.h"

namespace sedetect::cuda {

using namespace hopper;

constexpr int kGroups = 2, kThreads = (kGroups + 1) * 128;  // warpgroups that multiply
constexpr int kColumns = kGroups * 64;                      // weight rows of a tile
constexpr int kInner = 64;                                  // of a step; 128 bytes of a row
constexpr int kPassing = 8;  // row tiles that pass over a weight block together, while it is in L2
constexpr int kTileSlots = 4;

struct Arguments {
  const int64_t* offsets;
  int32_t* next;
  const void* bias;
  void* out;  // (S, width)
  float* parts;
  Gate gate;
  bool interleaved;
  int experts, columns;  // columns: weight rows of one expert
  int inner, width, slots;
  Scales scales;
  uint32_t second;  // of prmt: the bytes of its second operand
};

// The forms, one source each.
void mixed_few(const Mixed& m, const Arguments& arguments, cudaStream_t stream);
void mixed_some(const Mixed& m, const Arguments& arguments, cudaStream_t stream);
void mixed_many(const Mixed& m, const Arguments& arguments, cudaStream_t stream);
void mixed_most(const Mixed& m, const Arguments& arguments, cudaStream_t stream);

// How the stored bytes of a step lie in shared memory: rows of kPitch bytes, their 16-byte parts swizzled.
template <typename Format>
struct Layout {
  static constexpr int kPitch = kInner * Format::kBits / 8;
  static constexpr int kSlab = 2 * Format::kBits;  // bytes of the 16 inner elements of a product
  static constexpr CUtensorMapSwizzle kSwizzle = kPitch == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;

  // Of a row's first byte; those of the slab-th 16 inner elements are at its exclusive or with slab * kSlab.
  static __device__ __forceinline__ int offset(int row) {
    return row * kPitch + row / (128 / kPitch) % (kPitch / 16) * 16;
  }
};

// --- Tiles.

// What the loading warpgroup tells the others of a tile; an expert of -1: there are no more.
struct Tile {
  int expert, first, rows, column;  // sorted rows, and which column tile it is

  static __device__ __forceinline__ Tile of(const int4& v) { return {v.x, v.y, v.z, v.w}; }

  // ends[e]: row tiles of the experts up to and with e.
  template <int kWidth>
  static __device__ __forceinline__ Tile at(int index, const int* ends, int column_tiles, const Arguments& arguments) {
    const int row_tiles = ends[arguments.experts - 1];
    if (index >= row_tiles * column_tiles) return {-1, 0, 0, 0};
    const int group = index / (kPassing * column_tiles) * kPassing;
    const int size = min(row_tiles - group, kPassing);
    const int within = index % (kPassing * column_tiles);
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
  for (int e = threadIdx.x; e < arguments.experts; e += blockDim.x) {
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

template <typename Format, typename Form>
struct Shared {
  const int* ends;
  int4* tiles;       // kTileSlots
  uint32_t b, a, z;  // addresses of the stages, and of the products
  uint32_t barriers;

  static constexpr int kBytesA = kColumns * Layout<Format>::kPitch, kBytesB = Form::kRows * kInner * 2;
  static constexpr int kBytesZ = Form::kRows * 64 * 2;  // of a warpgroup
  static constexpr int kBytesOfStage = kBytesA + kBytesB + 2 * int(sizeof(uint64_t));
  static constexpr int kBytesOfProducts = kGroups * (kBytesZ + 2 * int(sizeof(uint64_t)));
  static constexpr int kBytesOfTiles = kTileSlots * int(sizeof(int4) + 2 * sizeof(uint64_t));
  static constexpr int kStages = (Form::kBytes / Form::kBlocks - kBytesOfSystem - kBytesOfProducts - kBytesOfTiles -
                                  kMaxMixedExperts * int(sizeof(int))) /
                                 kBytesOfStage;
  static constexpr int kBarriers = 2 * kStages + 2 * kTileSlots + 2 * kGroups;
  static_assert(kStages >= 3 && Form::kRows % Form::kBoxRows == 0);

  // Of a block.
  static int bytes(int experts) {
    return kStages * kBytesOfStage + kBytesOfProducts + kBytesOfTiles + experts * int(sizeof(int));
  }

  __device__ __forceinline__ uint32_t stage_a(int stage) const { return a + stage * kBytesA; }
  __device__ __forceinline__ uint32_t stage_b(int stage) const { return b + stage * kBytesB; }
  __device__ __forceinline__ uint32_t products(int group) const { return z + group * kBytesZ; }
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(kStages + stage); }
  __device__ __forceinline__ uint32_t tile_full(int slot) const { return full(2 * kStages + slot); }
  __device__ __forceinline__ uint32_t tile_empty(int slot) const { return tile_full(kTileSlots + slot); }
  __device__ __forceinline__ uint32_t products_full(int group) const { return tile_full(2 * kTileSlots + group); }
  __device__ __forceinline__ uint32_t products_empty(int group) const { return products_full(kGroups + group); }

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

template <typename Format, bool kGated, typename Form>
__device__ __forceinline__ void load(const Arguments& arguments, const CUtensorMap& rows, const CUtensorMap& weights,
                                     const Shared<Format, Form>& shared, int column_tiles, int steps) {
  constexpr int kBytesA = Shared<Format, Form>::kBytesA;
  constexpr int kBytesBox = Form::kBoxRows * kInner * 2;
  // The weight rows of a column tile that has gate and up apart are in two runs.
  const bool apart = kGated && !arguments.interleaved;
  Ring ring{shared.kStages}, tiles{kTileSlots};
  while (true) {
    barrier_wait(shared.tile_empty(tiles.stage), tiles.phase ^ 1);
    const Tile tile = Tile::at<Form::kWidth>(atomicAdd(arguments.next, 1), shared.ends, column_tiles, arguments);
    shared.tiles[tiles.stage] = make_int4(tile.expert, tile.first, tile.rows, tile.column);
    barrier_arrive(shared.tile_full(tiles.stage));
    tiles.advance();
    if (tile.expert < 0) return;
    const int upper = tile.expert * arguments.columns + tile.column * (apart ? kColumns / 2 : kColumns);
    const int lower = upper + (apart ? arguments.width : kColumns / 2);
    const int boxes = (tile.rows + Form::kBoxRows - 1) / Form::kBoxRows;
    for (int step = 0; step < steps; ++step) {
      const int inner = step * kInner, byte = inner * Format::kBits / 8;
      const uint32_t full = shared.full(ring.stage), a = shared.stage_a(ring.stage), b = shared.stage_b(ring.stage);
      barrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
      barrier_arrive_expect(full, kBytesA + boxes * kBytesBox);
      copy_box(a, &weights, byte, upper, full);
      copy_box(a + kBytesA / 2, &weights, byte, lower, full);
      for (int i = 0; i < boxes; ++i) {
        Form::copy_rows(b + i * kBytesBox, &rows, inner, tile.first + i * Form::kBoxRows, full);
      }
      ring.advance();
    }
  }
}

// --- The warpgroups that multiply.

// Of the weight rows of a tile the two that a lane dequantizes, number its row of eight: the rows of its accumulators.
// The second is the up row of the first one's gate row where there are two.
template <bool kGated>
__device__ __forceinline__ int weight_row(const Arguments& arguments, int group, int warp, int number, int second) {
  if (!kGated) return 64 * group + 16 * warp + number + 8 * second;
  const int c = 32 * group + 8 * warp + number;
  return arguments.interleaved ? 2 * c + second : c + second * kColumns / 2;
}

// What a consumer knows of a tile.
struct TileWeights {
  uint32_t at[2];  // where the scales of the thread's weight rows begin
  float bias[2];

  template <bool kGated, typename T>
  static __device__ __forceinline__ TileWeights of(const Tile& tile, const int (&column)[2],
                                                   const Arguments& arguments) {
    const bool apart = kGated && !arguments.interleaved;
    TileWeights result{{}, {-0.0f, -0.0f}};  // which leave what they are added to as it is
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int row = tile.column * (apart ? kColumns / 2 : kColumns) + column[i];
      if (apart && i == 1) row += arguments.width - kColumns / 2;
      row = min(row, arguments.columns - 1);  // those beyond the end go nowhere
      const Scales& scales = arguments.scales;
      result.at[i] = (tile.expert * scales.rows + row / scales.high) * scales.columns;
      if (arguments.bias != nullptr) {
        const T* biases = static_cast<const T*>(arguments.bias);
        result.bias[i] = static_cast<float>(biases[static_cast<int64_t>(tile.expert) * arguments.columns + row]);
      }
    }
    return result;
  }
};

// Leaves the products of a warpgroup for those that finish them, rounded: a thread's accumulators, four for every 8 of
// the sorted rows, of which there are kRows, a multiple of 16.
template <typename T, bool kGated, int kRows, typename Memory>
__device__ __forceinline__ void hand_over(const Memory& shared, int group, int warp, int lane, uint32_t& phase,
                                          const float* acc, const float (&bias)[2]) {
  barrier_wait(shared.products_empty(group), phase ^ 1);
  const int row = lane / 16 * 8 + lane % 8, lower = lane / 8 % 2;
  const int piece = kGated ? warp + 4 * lower : 2 * warp + lower;
  const uint32_t target = shared.products(group) + row * 128 + ((piece ^ (row % 8)) << 4);
#pragma unroll
  for (int start = 0; start < kRows; start += 16) {
    uint32_t z[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = acc + start / 2 + 2 * i;
      z[i] = Pair<T>::pack(pair[0] + bias[i % 2], pair[1] + bias[i % 2]);
    }
    store_transposed(target + start * 128, z);
  }
  __syncwarp();
  if (lane == 0) barrier_arrive(shared.products_full(group));
  phase ^= 1;
}

// --- The warps that finish.

template <typename Format, typename T, bool kGated, typename Form>
struct Finisher {
  static constexpr int kPart = kGated ? 32 : 64;  // columns of the result that a warpgroup multiplies
  static constexpr int kThreadsOfRow = kPart / 8;
  static constexpr int kRowsAtOnce = 3 * 32 / kThreadsOfRow;

  const Arguments& arguments;
  const Shared<Format, Form>& shared;
  int warp, lane;

  // Gates, measures and stores the products of a warpgroup. Eight threads that read together read eight pieces of one
  // row; or four of two rows whose pieces are in other banks.
  template <Activation kActivation>
  __device__ __forceinline__ void finish(const Tile& tile, int group) {
    const int piece = lane % kThreadsOfRow, number = kGroups * tile.column + group;
    const int column = number * kPart + piece * 8;
    const int first = kGated ? 8 * warp + lane / 8 + lane / 4 % 2 * 4 : 4 * warp + lane / 8;
    for (int start = 0; start < tile.rows; start += kRowsAtOnce) {
      const int r = start + first;
      const uint32_t source = shared.products(group) + r % Form::kRows * 128;
      uint32_t v[4], u[4];
      load_16(source + ((piece ^ (r % 8)) << 4), v);
      if (kGated) load_16(source + (((piece + 4) ^ (r % 8)) << 4), u);
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
        if (piece == 0 && there) {
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
      for (int group = 0; group < kGroups; ++group) {
        barrier_wait_asleep(shared.products_full(group), phase);
        finish(tile, group);
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.products_empty(group));
      }
    }
  }
};

// --- The kernel.

// Consumer: multiplies what is loaded, tile by tile, until there are no more (run).
template <typename Format, typename T, bool kGated, typename Form,
          template <typename, typename, bool, typename> typename Consumer>
__global__ void __launch_bounds__(kThreads, Form::kBlocks)
    mixed_gemm(const __grid_constant__ Arguments arguments, const __grid_constant__ CUtensorMap rows,
               const __grid_constant__ CUtensorMap weights) {
  using Memory = Shared<Format, Form>;
  // What a block is launched with: with more, the last to ask would wait for ever.
  constexpr int kRegisters = 65536 / kThreads / Form::kBlocks / 8 * 8;
  static_assert(kGroups * Form::kRegistersOfConsumers + Form::kRegistersOfOthers <= (kGroups + 1) * kRegisters);
  extern __shared__ __align__(1024) uint8_t dynamic[];  // the swizzles repeat every 1024 bytes
  uint8_t* a = dynamic + Memory::kStages * Memory::kBytesB;
  uint8_t* z = a + Memory::kStages * Memory::kBytesA;
  int4* tiles = reinterpret_cast<int4*>(z + kGroups * Memory::kBytesZ);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(tiles + kTileSlots);
  int* ends = reinterpret_cast<int*>(barriers + Memory::kBarriers);
  const Memory shared{ends, tiles, shared_address(dynamic), shared_address(a), shared_address(z),
                      shared_address(barriers)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Memory::kStages; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), 4 * kGroups);
    }
    for (int slot = 0; slot < kTileSlots; ++slot) {
      barrier_init(shared.tile_full(slot), 1);
      barrier_init(shared.tile_empty(slot), 4 * kGroups + 3);  // the warps that read it
    }
    for (int group = 0; group < kGroups; ++group) {
      barrier_init(shared.products_full(group), 4);
      barrier_init(shared.products_empty(group), 3);
    }
    barrier_init_fence();
    prefetch_map(&weights);
    prefetch_map(&rows);
  }
  count_row_tiles<Form::kRows>(ends, arguments);
  constexpr int kTile = kGated ? kColumns / 2 : kColumns;
  const int column_tiles = (arguments.width + kTile - 1) / kTile;
  const int steps = (arguments.inner + kInner - 1) / kInner;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (group == 0) {
    registers_decrease<Form::kRegistersOfOthers>();
    if (warp > 0) {
      Finisher<Format, T, kGated, Form>{arguments, shared, warp - 1, lane}.run();
    } else if (lane == 0) {
      load<Format, kGated>(arguments, rows, weights, shared, column_tiles, steps);
    }
  } else {
    registers_increase<Form::kRegistersOfConsumers>();
    Consumer<Format, T, kGated, Form>{arguments, shared, steps, group - 1, warp, lane}.run();
  }
}

template <typename Format, typename T, bool kGated, typename Form,
          template <typename, typename, bool, typename> typename Consumer>
void launch(const Mixed& m, const Arguments& arguments, cudaStream_t stream) {
  const CUtensorMap rows = Form::map_of(m);
  const CUtensorMap weights = tensor_map(m.weight.stored, static_cast<int64_t>(m.experts) * arguments.columns,
                                         m.inner / 8 * Format::kBits, kColumns / 2, Layout<Format>::kPitch,
                                         CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, Layout<Format>::kSwizzle);
  const auto kernel = mixed_gemm<Format, T, kGated, Form, Consumer>;
  const int bytes = Shared<Format, Form>::bytes(m.experts);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             100 * Form::kBytes / kBytesOfProcessor),
        "cudaFuncSetAttribute");
  check(cudaMemsetAsync(m.next, 0, sizeof(int32_t), stream), "cudaMemsetAsync");
  kernel<<<m.processors * Form::kBlocks, kThreads, bytes, stream>>>(arguments, rows, weights);
  check(cudaGetLastError(), "mixed_gemm");
}

template <typename Form, template <typename, typename, bool, typename> typename Consumer, typename Format, typename T>
void launch(const Mixed& m, const Arguments& arguments, cudaStream_t stream) {
  if (m.gate.gated) {
    launch<Format, T, true, Form, Consumer>(m, arguments, stream);
  } else {
    launch<Format, T, false, Form, Consumer>(m, arguments, stream);
  }
}

template <typename Form, template <typename, typename, bool, typename> typename Consumer>
void launch(const Mixed& m, const Arguments& arguments, cudaStream_t stream) {
  if (m.weight.format == Format::kE2M1) {
    launch<Form, Consumer, E2M1, __nv_bfloat16>(m, arguments, stream);
  } else if (m.type == Type::kBFloat16) {
    launch<Form, Consumer, E4M3, __nv_bfloat16>(m, arguments, stream);
  } else {
    launch<Form, Consumer, E4M3, __half>(m, arguments, stream);
  }
}

}  // namespace sedetect::cuda
