// The stages of the cuda backend beside its GEMMs (grouped_gemm.h): launches on the current device, no synchronization.
// Shapes: T tokens, k experts per token, S = T * k rows, E experts, H hidden, I intermediate. All tensors are
// contiguous device memory; null where the text says so.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sedetect::cuda {

// Must agree with sedetect/ops/cuda.py.
enum class Type : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// The lists of kept records of an expert.
enum KeptList { kOutliers, kFirstOutliers, kInMax, kLists };

// kernels/plan.py's Plan and Schedule.
struct Schedule {
  int32_t* row;      // (S,): sorted row of each slot
  int4* tiles;       // (max_tiles,)
  int32_t* count;    // (1,): tiles that are in use
  int32_t* arrived;  // (E, kLists): zeros, which update leaves as zeros
  int rows;          // sorted rows of a tile
  int max_tiles;
};

// What a tile holds: the expert, its first sorted row, the end of the expert's rows, and which of the expert's tiles it
// is. The expert of a tile that is not in use is -1.
struct TileOf {
  int expert, first, end, number;

  __device__ explicit TileOf(const int4& tile) : expert(tile.x), first(tile.y), end(tile.z), number(tile.w) {}
};

struct Plan {
  const void* index;  // (S,) int64, or int32 if narrow
  bool narrow;
  int64_t* order;     // (S,) - output
  int64_t* offsets;   // (E + 1,) - output
  Schedule schedule;  // output
  int32_t* counts;    // (plan_blocks(S), E + 1) - scratch
  int slots, experts, processors;
};

// Blocks that plan launches for S slots; and the most experts that its shared memory holds.
int plan_blocks(int slots, int processors);
constexpr int kMaxExperts = 1536;

void plan(const Plan& arguments, cudaStream_t stream);

// kernels/row_stats.py's RowParts.
struct RowParts {
  const float* best;      // (S,)
  const int32_t* part;    // (S,)
  const float* sqnorm;    // (S,)
  const float* in_parts;  // (in_parts_number, S)
  const void *y, *h;      // (S, hidden) of y_type, (S, intermediate) of h_type
  Type y_type, h_type;
  int hidden, intermediate;
  int y_part_width, h_part_width, in_parts_number;
};

// Merge the row statistics of one call into the tables of a BankStats, in place: kernels/update.py. csrc/columns.h has
// their columns.
struct Update {
  RowParts rows;
  const int64_t* order;
  Schedule schedule;
  const void* gates;  // (T, k) of gates_type
  Type gates_type;
  const bool *counted, *first;                 // (T,)
  const int64_t *sequence, *position, *token;  // (T,)
  int64_t* counts;                             // (E, kCounts)
  double* sums;                                // (E, kSums)
  int64_t* records[kLists];                    // (E, kept, kColumns)
  int kept[kLists];
  void* scratch;  // update_scratch bytes
  int slots, top_k, source;
};

int64_t update_scratch(int max_tiles, int tile_rows);
constexpr int kMaxKept = 64;

void update(const Update& arguments, cudaStream_t stream);

}  // namespace sedetect::cuda
