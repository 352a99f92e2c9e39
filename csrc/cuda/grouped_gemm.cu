// Grouped GEMMs by hand for sm_90a: one kernel, persistent and warp-specialised.
//
// A block computes tiles of 128 rows x 256 weight rows, 64 inner elements at a time. One warpgroup loads: weights, and
// sorted rows, by the tensor copy engine; the rows of gate_up, where they lie scattered by token, 16 bytes at a time.
// Two warpgroups multiply, 64 rows each. The weights of all experts are one matrix (E * columns, inner) and so need one
// map.
//
// The epilogue is deferred: a finished tile is rounded to 16 bits, which halves its registers, and is gated, measured
// and stored in pieces while the tensor cores run the next tile. So the gate reads z as the model's dtype rounds it, as
// the model itself does, and neither gate nor statistics take time of the matrix products.

#include "check.h"
#include "gate.cuh"
#include "grouped_gemm.h"
#include "hopper.cuh"
#include "tensor_map.h"

namespace sedetect::cuda {
namespace {

using namespace hopper;

constexpr int kColumns = 256;  // weight rows of a tile
constexpr int kInner = 64;     // 128 bytes: the width of the swizzle
constexpr int kMaxStages = 4;
constexpr int kGroup = 16;  // row tiles that pass over a weight block together, while it is in L2
constexpr int kBytesA = kTileRows * kInner * 2, kBytesB = kColumns * kInner * 2;
constexpr int kThreads = 3 * 128;
constexpr int kSharedBytes = 1024 + kMaxStages * (kBytesA + kBytesB);

struct Arguments {
  const int64_t* order;
  const int4* tiles;
  const int32_t* count;
  const void* x;  // rows of gate_up, by token: what the copy engine does not bring
  void* out;      // (S, width)
  float* parts;
  Gate gate;
  int columns;  // weight rows of one expert
  int inner, width, slots, top_k;
  int stages;  // of shared memory that are in use
};

// Where a tile stands.
struct Tile {
  int expert, first, end, column;  // first row, end of the expert's rows, first column of the result

  template <int kBlock>
  static __device__ __forceinline__ Tile at(int index, int row_tiles, int column_tiles, const Arguments& arguments) {
    const int group = index / (kGroup * column_tiles) * kGroup;
    const int size = min(row_tiles - group, kGroup);
    const int within = index % (kGroup * column_tiles);
    const TileOf tile(__ldg(arguments.tiles + group + within % size));
    return {tile.expert, tile.first, tile.end, within / size * kBlock};
  }
};

// A quad holds blocks 0 to 3 of a row, every thread two columns of each; afterwards thread q holds block q whole.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const uint32_t a = __shfl_xor_sync(~0u, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(~0u, odd ? v[2] : v[3], 1);
  v[0] = odd ? a : v[0];
  v[1] = odd ? v[1] : a;
  v[2] = odd ? b : v[2];
  v[3] = odd ? v[3] : b;
  const uint32_t c = __shfl_xor_sync(~0u, high ? v[0] : v[2], 2), d = __shfl_xor_sync(~0u, high ? v[1] : v[3], 2);
  v[0] = high ? c : v[0];
  v[2] = high ? v[2] : c;
  v[1] = high ? d : v[1];
  v[3] = high ? v[3] : d;
}

// A finished tile, rounded: what a thread has yet to gate, measure and store.
template <typename T, bool kGated, bool kGateUp>
struct Pending {
  static constexpr int kBlocks = kGated ? 16 : 32;  // of 8 columns of the result
  static constexpr int kPieces = kBlocks / 4;

  uint32_t z[64];        // pairs of columns: of n-block j, z[2 j] in the upper and z[2 j + 1] in the lower of the rows
  uint32_t largest[2];   // of the two rows: magnitudes of even and odd columns
  int row, end, column;  // the upper of its rows, 8 above the lower one; end of the expert's rows; first column

  __device__ __forceinline__ void take(const float (&acc)[128], const Tile& tile, int warp_row, int lane) {
#pragma unroll
    for (int i = 0; i < 64; ++i) z[i] = Pair<T>::pack(acc[2 * i], acc[2 * i + 1]);
    row = tile.first + warp_row + lane / 4;
    end = tile.end;
    column = tile.column;
    largest[0] = largest[1] = 0;
  }

  // Gates, measures and stores the piece-th 32 columns. The index is a constant, so that z stays in registers.
  template <int kPiece>
  __device__ __forceinline__ void finish(const Arguments& arguments, int lane) {
    switch (kGateUp ? arguments.gate.activation : Activation::kNone) {
      case Activation::kSilu:
        return finish<kPiece, Activation::kSilu>(arguments, lane);
      case Activation::kGelu:
        return finish<kPiece, Activation::kGelu>(arguments, lane);
      case Activation::kGeluTanh:
        return finish<kPiece, Activation::kGeluTanh>(arguments, lane);
      case Activation::kRelu2:
        return finish<kPiece, Activation::kRelu2>(arguments, lane);
      default:
        return finish<kPiece, Activation::kNone>(arguments, lane);
    }
  }

  template <int kPiece, Activation kActivation>
  __device__ __forceinline__ void finish(const Arguments& arguments, int lane) {
    const int at = column + (4 * kPiece + lane % 4) * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int block = 4 * kPiece + i;
        v[i] = z[2 * block + half];
        if (kGated) {
          const float2 g = Pair<T>::unpack(v[i]), u = Pair<T>::unpack(z[2 * (block + 16) + half]);
          v[i] = Pair<T>::pack(apply_gate<kActivation>(arguments.gate, g.x, u.x),
                               apply_gate<kActivation>(arguments.gate, g.y, u.y));
        } else if (kActivation != Activation::kNone) {
          const float2 g = Pair<T>::unpack(v[i]);
          v[i] = Pair<T>::pack(activate<kActivation>(g.x, arguments.gate.slope),
                               activate<kActivation>(g.y, arguments.gate.slope));
        }
      }
      transpose_quad(v, lane);
      const int r = row + 8 * half;
      if (at < arguments.width) {
        if (r < end) {
          uint4* target =
              reinterpret_cast<uint4*>(static_cast<T*>(arguments.out) + static_cast<int64_t>(r) * arguments.width + at);
          *target = make_uint4(v[0], v[1], v[2], v[3]);
        }
        if (kGateUp) {
          constexpr uint32_t kMagnitudes = 0x7FFF7FFF;
          const uint32_t low = Pair<T>::max(v[0] & kMagnitudes, v[1] & kMagnitudes);
          const uint32_t high = Pair<T>::max(v[2] & kMagnitudes, v[3] & kMagnitudes);
          largest[half] = Pair<T>::max(largest[half], Pair<T>::max(low, high));
        }
      }
    }
    if (kGateUp && kPiece == kPieces - 1 && arguments.parts != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t best = Pair<T>::max(largest[half], __shfl_xor_sync(~0u, largest[half], 1));
        best = Pair<T>::max(best, __shfl_xor_sync(~0u, best, 2));
        const int r = row + 8 * half, tile = column / (8 * kBlocks);
        if (lane % 4 == 0 && r < end) {
          // As integers magnitudes have the order of the values, NaN above Inf.
          const uint32_t magnitude = max(best & 0xFFFF, best >> 16);
          arguments.parts[static_cast<int64_t>(tile) * arguments.slots + r] = Pair<T>::unpack(magnitude).x;
        }
      }
    }
  }
};

struct Shared {
  uint32_t a, b, full, empty;  // addresses of the stages and of their barriers

  __device__ __forceinline__ uint32_t stage_a(int stage) const { return a + stage * kBytesA; }
  __device__ __forceinline__ uint32_t stage_b(int stage) const { return b + stage * kBytesB; }
  __device__ __forceinline__ uint32_t full_of(int stage) const { return full + 8 * stage; }
  __device__ __forceinline__ uint32_t empty_of(int stage) const { return empty + 8 * stage; }
};

template <typename T, bool kGated, bool kGather>
__device__ __forceinline__ void load(const Arguments& arguments, const CUtensorMap& rows, const CUtensorMap& weights,
                                     const Shared& shared, int row_tiles, int column_tiles, int steps) {
  const int thread = threadIdx.x;
  if (!kGather && thread != 0) return;
  constexpr int kBlock = kGated ? kColumns / 2 : kColumns;
  const T* x = static_cast<const T*>(arguments.x);
  // Eight threads read the 128 bytes of a row; a thread has every 16th row.
  const int row = thread / 8, part = thread % 8;
  const uint32_t target = row * 128 + ((part ^ (row % 8)) << 4);
  Ring ring{arguments.stages};
  for (int index = blockIdx.x; index < row_tiles * column_tiles; index += gridDim.x) {
    const Tile tile = Tile::at<kBlock>(index, row_tiles, column_tiles, arguments);
    const int weight_row = tile.expert * arguments.columns + tile.column;
    int token[kGather ? kTileRows / 16 : 1];
    if (kGather) {
#pragma unroll
      for (int i = 0; i < kTileRows / 16; ++i) {
        const int r = min(tile.first + row + 16 * i, tile.end - 1);
        token[i] = static_cast<int>(__ldg(arguments.order + r)) / arguments.top_k;
      }
    }
    for (int step = 0; step < steps; ++step) {
      const int inner = step * kInner;
      const uint32_t full = shared.full_of(ring.stage);
      barrier_wait(shared.empty_of(ring.stage), ring.phase ^ 1);
      if (thread == 0) {
        barrier_arrive_expect(full, kBytesB + (kGather ? 0 : kBytesA));
        const uint32_t b = shared.stage_b(ring.stage);
        if (kGated) {
          copy_box(b, &weights, inner, weight_row, full);
          copy_box(b + kBytesB / 2, &weights, inner, weight_row + arguments.width, full);
        } else {
          copy_box(b, &weights, inner, weight_row, full);
        }
        if (!kGather) copy_box(shared.stage_a(ring.stage), &rows, inner, tile.first, full);
      }
      if (kGather) {
        const int at = inner + part * 8;
        const bool there = at < arguments.inner;
#pragma unroll
        for (int i = 0; i < kTileRows / 16; ++i) {
          // What a row beyond the end is multiplied with goes nowhere.
          if (tile.first + row + 16 * i >= tile.end) break;
          const T* source = x + static_cast<int64_t>(token[i]) * arguments.inner + (there ? at : 0);
          copy_16(shared.stage_a(ring.stage) + target + i * 2048, source, there);
        }
        barrier_arrive_copies(full);
      }
      ring.advance();
    }
  }
}

template <typename T, bool kGated, bool kGateUp, bool kGather>
struct Consumer {
  using Rounded = Pending<T, kGated, kGateUp>;

  const Arguments& arguments;
  const Shared& shared;
  int warp_row, lane;
  uint32_t a_offset;
  Ring ring;
  Rounded pending;
  float acc[128];

  // The stage before the last one is free when its products are done.
  __device__ __forceinline__ void release_previous() {
    if (threadIdx.x % 128 == 0) barrier_arrive(shared.empty_of(ring.before(2)));
  }

  __device__ __forceinline__ void multiply_stage(bool add) {
    barrier_wait(shared.full_of(ring.stage), ring.phase);
    if (kGather) fence_async_proxy();
    const uint64_t a = matrix_descriptor(shared.stage_a(ring.stage) + a_offset);
    const uint64_t b = matrix_descriptor(shared.stage_b(ring.stage));
    products_begin();
#pragma unroll
    for (int k = 0; k < kInner / 16; ++k) multiply<T>(acc, a + 2 * k, b + 2 * k, add || k > 0);
    products_commit();
    ring.advance();
  }

  // The first steps of a tile, each with a piece of the tile before.
  template <int kPiece = 0>
  __device__ __forceinline__ void first_steps() {
    if constexpr (kPiece < Rounded::kPieces) {
      multiply_stage(kPiece > 0);
      pending.template finish<kPiece>(arguments, lane);
      if (kPiece > 0) {
        products_wait<1>();
        release_previous();
      }
      first_steps<kPiece + 1>();
    }
  }

  template <int kPiece = 0>
  __device__ __forceinline__ void finish_all() {
    if constexpr (kPiece < Rounded::kPieces) {
      pending.template finish<kPiece>(arguments, lane);
      finish_all<kPiece + 1>();
    }
  }

  __device__ __forceinline__ void run(int row_tiles, int column_tiles, int steps) {
    constexpr int kBlock = kGated ? kColumns / 2 : kColumns;
    pending.row = pending.end = pending.column = 0;
#pragma unroll
    for (int i = 0; i < 64; ++i) pending.z[i] = 0;
    for (int index = blockIdx.x; index < row_tiles * column_tiles; index += gridDim.x) {
      const Tile tile = Tile::at<kBlock>(index, row_tiles, column_tiles, arguments);
      first_steps();
      for (int step = Rounded::kPieces; step < steps; ++step) {
        multiply_stage(true);
        products_wait<1>();
        release_previous();
      }
      products_wait<0>();
      if (threadIdx.x % 128 == 0) barrier_arrive(shared.empty_of(ring.before(1)));
      pending.take(acc, tile, warp_row, lane);
    }
    finish_all();
  }
};

template <typename T, bool kGated, bool kGateUp, bool kGather>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm(const __grid_constant__ Arguments arguments, const __grid_constant__ CUtensorMap rows,
                 const __grid_constant__ CUtensorMap weights) {
  extern __shared__ uint8_t dynamic[];
  __shared__ uint64_t barriers[2 * kMaxStages];
  const uint32_t base = (shared_address(dynamic) + 1023) / 1024 * 1024;  // the swizzle repeats every 1024 bytes
  const Shared shared{base, base + kMaxStages * kBytesA, shared_address(barriers),
                      shared_address(barriers + kMaxStages)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kMaxStages; ++stage) {
      barrier_init(shared.full_of(stage), kGather ? 129 : 1);
      barrier_init(shared.empty_of(stage), 2);
    }
    barrier_init_fence();
    prefetch_map(&weights);
    if (!kGather) prefetch_map(&rows);
  }
  __syncthreads();
  constexpr int kBlock = kGated ? kColumns / 2 : kColumns;
  const int row_tiles = __ldg(arguments.count);
  const int column_tiles = (arguments.width + kBlock - 1) / kBlock;
  // At least one step for every piece of the epilogue; steps beyond the end multiply zeros.
  const int steps = max((arguments.inner + kInner - 1) / kInner, Pending<T, kGated, kGateUp>::kPieces);
  if (threadIdx.x < 128) {
    registers_decrease<56>();
    load<T, kGated, kGather>(arguments, rows, weights, shared, row_tiles, column_tiles, steps);
  } else {
    registers_increase<224>();
    const int warp = threadIdx.x / 32 - 4;
    Consumer<T, kGated, kGateUp, kGather> consumer{arguments,
                                                   shared,
                                                   16 * warp,
                                                   static_cast<int>(threadIdx.x % 32),
                                                   static_cast<uint32_t>(warp / 4 * kBytesA / 2),
                                                   Ring{arguments.stages}};
    consumer.run(row_tiles, column_tiles, steps);
  }
}

template <typename T, bool kGated, bool kGateUp, bool kGather>
void launch(const Arguments& arguments, const CUtensorMap& rows, const CUtensorMap& weights, int processors,
            cudaStream_t stream) {
  const auto kernel = grouped_gemm<T, kGated, kGateUp, kGather>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "cudaFuncSetAttribute");
  kernel<<<processors, kThreads, kSharedBytes, stream>>>(arguments, rows, weights);
  check(cudaGetLastError(), "grouped_gemm");
}

template <bool kGated, bool kGateUp, bool kGather>
void launch(Type type, const Arguments& arguments, const CUtensorMap& rows, const CUtensorMap& weights, int processors,
            cudaStream_t stream) {
  if (type == Type::kBFloat16) {
    launch<__nv_bfloat16, kGated, kGateUp, kGather>(arguments, rows, weights, processors, stream);
  } else {
    launch<__half, kGated, kGateUp, kGather>(arguments, rows, weights, processors, stream);
  }
}

// The row tiles of an expert meet its weights in L2 only while they run in step. Bytes that are under way push others
// out: where an expert's matrix is large, all four stages of all blocks (25 MB) made each tile read the weights from
// memory for itself (DeepSeek-V3's gate_up at 8192 tokens: 42 GB where the Triton kernel reads 19; 14.6 ms, and 8.5
// with three). Small ones stay in L2 whole, and the fourth stage makes them 4 to 7 % faster.
int stages_for(int columns, int inner) { return int64_t{2} * columns * inner > (16 << 20) ? 3 : kMaxStages; }

}  // namespace

void grouped_gemm_gate_up(const GateUp& a, cudaStream_t stream) {
  const int columns = a.gate.gated ? 2 * a.width : a.width;
  const Arguments arguments{a.order,
                            a.tiles,
                            a.count,
                            a.x,
                            a.h,
                            a.parts,
                            a.gate,
                            columns,
                            a.hidden,
                            a.width,
                            a.slots,
                            a.top_k,
                            stages_for(columns, a.hidden)};
  // A gated tile holds the same channels of gate and up.
  const int box = a.gate.gated ? kColumns / 2 : kColumns;
  const CUtensorMap weights = tensor_map(a.weight, static_cast<int64_t>(a.experts) * columns, a.hidden, box, a.type);
  if (a.order == nullptr) {
    const CUtensorMap rows = tensor_map(a.x, a.slots, a.hidden, kTileRows, a.type);
    if (a.gate.gated) {
      launch<true, true, false>(a.type, arguments, rows, weights, a.processors, stream);
    } else {
      launch<false, true, false>(a.type, arguments, rows, weights, a.processors, stream);
    }
  } else if (a.gate.gated) {
    launch<true, true, true>(a.type, arguments, weights, weights, a.processors, stream);
  } else {
    launch<false, true, true>(a.type, arguments, weights, weights, a.processors, stream);
  }
}

void grouped_gemm_down(const Down& a, cudaStream_t stream) {
  const Arguments arguments{nullptr,
                            a.tiles,
                            a.count,
                            nullptr,
                            a.y,
                            nullptr,
                            {},
                            a.hidden,
                            a.width,
                            a.hidden,
                            a.slots,
                            1,
                            stages_for(a.hidden, a.width)};
  const CUtensorMap rows = tensor_map(a.h, a.slots, a.width, kTileRows, a.type);
  const CUtensorMap weights =
      tensor_map(a.weight, static_cast<int64_t>(a.experts) * a.hidden, a.width, kColumns, a.type);
  launch<false, false, false>(a.type, arguments, rows, weights, a.processors, stream);
}

}  // namespace sedetect::cuda
