// Update: the row statistics of one experts call, merged into the bank's tables in one cooperative launch.
//
// First every tile of rows of one expert is reduced: counts, float64 sums, and per list of kept records the largest
// value that stands before the last record kept (its head). Then, when all tiles are done, one block per expert and
// list adds up its tiles in their order and takes what enters. In a settled state no head is there, and nothing is left
// to do.
#include "check.h"
#include "stages.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

namespace sedetect::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

// Must agree with kernels/records.py.
constexpr int kNanBits = 0x7FC00000;
constexpr int kInfBits = 0x7F800000;

// A routing weight as float32.
__device__ float load_gate(const void* gates, Type type, int slot) {
  switch (type) {
    case Type::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(gates)[slot]);
    case Type::kFloat16:
      return __half2float(static_cast<const __half*>(gates)[slot]);
    default:
      return static_cast<const float*>(gates)[slot];
  }
}

// Reduces K values of every lane over the warp with K + 1 or so shuffles instead of 5 K: a lane gives away half of what
// it still has at every step. Returns the result of value lane / (32 / K).
template <int K, typename V, typename Join>
__device__ V reduce_warp(V (&values)[K], int lane, const Join& join) {
  int offset = 16;
#pragma unroll
  for (int half = K / 2; half >= 1; half /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const V given = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = join(kept, __shfl_xor_sync(kAll, given, offset));
    }
    offset /= 2;
  }
  for (; offset >= 1; offset /= 2) values[0] = join(values[0], __shfl_xor_sync(kAll, values[0], offset));
  return values[0];
}

constexpr int kThreads = 128;  // and the most rows of a tile
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 8;     // on a multiprocessor
constexpr int kLists = 3;      // outliers, first_outliers, in_max
constexpr int kPending = 256;  // rows that wait to be merged into a list
constexpr int kAtOnce = 4;     // rows that a thread looks at together
constexpr int64_t kLastSource = 0x7FFFFFFF;

// Columns of a record; must agree with RECORD in kernels/records.py.
enum Column { kValue, kSign, kChannel, kSource, kSequence, kPosition, kToken, kGate, kInValue, kInChannel, kColumns };
enum Flag : uint8_t { kCounted = 1, kFirst = 2 };

struct Tile {
  double sums[5];
  int counts[5];
  int heads[kLists];  // -1: none of its rows enters
};

// Scratch of one launch.
struct Scratch {
  Tile* tiles;      // (max_tiles,)
  int* first_tile;  // (E,), of experts that have rows
  uint8_t* flags;   // (S,)

  __device__ explicit Scratch(const Update& u)
      : tiles(static_cast<Tile*>(u.scratch)),
        first_tile(reinterpret_cast<int*>(tiles + u.max_tiles)),
        flags(reinterpret_cast<uint8_t*>(first_tile + u.experts)) {}
};

// What records are ordered by: value and source in one key, descending, then the rest, ascending. Of equals those kept
// stand first, in their order (origin = slot - kept), then the rows of this call in theirs (origin = row).
struct Entry {
  int64_t key, sequence, position;
  int channel, origin;
};

__device__ bool precedes(const Entry& a, const Entry& b) {
  if (a.key != b.key) return a.key > b.key;
  if (a.sequence != b.sequence) return a.sequence < b.sequence;
  if (a.position != b.position) return a.position < b.position;
  if (a.channel != b.channel) return a.channel < b.channel;
  return a.origin < b.origin;
}

// Bits of |x|; every NaN becomes kNanBits.
__device__ int value_bits(float x) {
  const int bits = __float_as_int(x) & 0x7FFFFFFF;
  return bits > kInfBits ? kNanBits : bits;
}

// Bits of x as records hold them.
__device__ int64_t float_bits(float x) { return isnan(x) ? int64_t(kNanBits) : int64_t(__float_as_uint(x)); }

__device__ const float* peaks(const Update& u, int list) { return list == 2 ? u.stats.in_peak : u.stats.peak; }
__device__ const int* channels(const Update& u, int list) { return list == 2 ? u.stats.in_channel : u.stats.channel; }

__device__ bool belongs(int list, int flags) {
  return list == 0 ? flags == kCounted : list == 1 ? (flags & kFirst) != 0 : (flags & kCounted) != 0;
}

__device__ Entry entry_of_row(const Update& u, int list, int row, int value) {
  const int token = int(u.order[row]) / u.top_k;
  return {int64_t(value) << 32 | (kLastSource - u.source), u.sequence[token], u.position[token], channels(u, list)[row],
          row};
}

__device__ Entry entry_of_record(const int64_t* record, int origin) {
  return {record[kValue] * (int64_t(1) << 32) + (kLastSource - record[kSource]), record[kSequence], record[kPosition],
          int(record[kChannel]), origin};
}

// The last of the records that a list of an expert keeps.
__device__ const int64_t* last_record(const Update& u, int list, int expert) {
  return u.records[list] + (int64_t(expert + 1) * u.kept[list] - 1) * kColumns;
}

__device__ void reduce_tile(const Update& u, const Scratch& scratch, int index) {
  __shared__ double warp_sums[kWarps][8];
  __shared__ int warp_counts[kWarps][5], warp_heads[kWarps][kLists];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int expert = u.schedule.tiles[2 * index], start = u.schedule.tiles[2 * index + 1];
  const int row = start + threadIdx.x;
  const bool inside = threadIdx.x < u.schedule.rows && row < int(u.offsets[expert + 1]);
  if (threadIdx.x == 0 && start == int(u.offsets[expert])) scratch.first_tile[expert] = index;

  // All that a row needs is read before any of it is looked at, so that no load waits to hear whether the row counts.
  float gate = 0, squares = 0;
  int flags = 0, counts[5] = {}, values[kLists] = {}, least[kLists];
#pragma unroll
  for (int list = 0; list < kLists; ++list) least[list] = int(last_record(u, list, expert)[kValue]);
  if (inside) {
    const int slot = int(u.order[row]), token = slot / u.top_k;
    counts[2] = u.stats.nonfinite[row], counts[3] = u.stats.over_fp16[row], counts[4] = u.stats.over_fp8[row];
    squares = u.stats.sqnorm[row];
#pragma unroll
    for (int list = 0; list < kLists; ++list) values[list] = value_bits(peaks(u, list)[row]);
    gate = load_gate(u.gates, u.gates_type, slot);
    const bool counted = u.counted[token], first = u.first[token];
    if (gate != 0 && counted) flags = first ? kCounted | kFirst : kCounted;
    scratch.flags[row] = uint8_t(flags);
  }
  if (flags != 0) {
    counts[0] = 1, counts[1] = (flags & kFirst) != 0;
  } else {
    counts[2] = counts[3] = counts[4] = 0;
  }
  double sums[8] = {};
  if (flags != 0 && counts[2] == 0 && isfinite(gate)) {
    const double norm = __fsqrt_rn(squares);
    sums[0] = gate, sums[1] = flags & kFirst ? double(gate) : 0., sums[2] = norm, sums[3] = squares,
    sums[4] = gate * norm;
  }
#pragma unroll
  for (int list = 0; list < kLists; ++list) {
    int head = -1;
    if (belongs(list, flags)) {
      const int value = values[list];
      // Equals are rare, except in experts that give the same everywhere, such as zero: those must not enter every
      // time.
      const bool enters =
          value > least[list] || (value == least[list] && precedes(entry_of_row(u, list, row, value),
                                                                   entry_of_record(last_record(u, list, expert), -1)));
      if (enters) head = value;
    }
    head = __reduce_max_sync(kAll, head);
    if (lane == 0) warp_heads[warp][list] = head;
  }
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    counts[i] = __reduce_add_sync(kAll, counts[i]);
    if (lane == 0) warp_counts[warp][i] = counts[i];
  }
  const double sum = reduce_warp(sums, lane, [](double a, double b) { return a + b; });
  if (lane % 4 == 0) warp_sums[warp][lane / 4] = sum;
  __syncthreads();
  Tile& tile = scratch.tiles[index];
  if (threadIdx.x < 5) {
    double sum = 0;
    int count = 0;
    for (int i = 0; i < kWarps; ++i) {
      sum += warp_sums[i][threadIdx.x];
      count += warp_counts[i][threadIdx.x];
    }
    tile.sums[threadIdx.x] = sum;
    tile.counts[threadIdx.x] = count;
  }
  if (threadIdx.x < kLists) {
    int head = -1;
    for (int i = 0; i < kWarps; ++i) head = max(head, warp_heads[i][threadIdx.x]);
    tile.heads[threadIdx.x] = head;
  }
  __syncthreads();
}

// Adds the counts and sums of an expert's tiles to the state, in a fixed order.
__device__ void add_totals(const Update& u, const Tile* tiles, int number, int expert) {
  __shared__ double warp_totals[kWarps][16];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double totals[16] = {};  // the counts too: float64 holds them exactly
  for (int tile = threadIdx.x; tile < number; tile += kThreads) {
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      totals[i] += tiles[tile].sums[i];
      totals[5 + i] += tiles[tile].counts[i];
    }
  }
  const double total = reduce_warp(totals, lane, [](double a, double b) { return a + b; });
  if (lane % 2 == 0) warp_totals[warp][lane / 2] = total;
  __syncthreads();
  if (threadIdx.x < 10) {
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += warp_totals[i][threadIdx.x];
    if (threadIdx.x < 5) {
      u.sums[expert * 5 + threadIdx.x] += sum;
    } else {
      u.counts[expert * 5 + threadIdx.x - 5] += int64_t(sum);
    }
  }
}

// A list of kept records while rows enter it: slots [0, kept) are the list in order, then come rows that wait, of which
// only the value and the row are known yet.
struct List {
  Entry entries[kMaxKept + kPending], merged[kMaxKept];
  int waiting;
  int tiles[kThreads], tiles_number;
};

__device__ void merge_waiting(const Update& u, int which, List& list) {
  const int kept = u.kept[which], number = kept + list.waiting;
  for (int i = kept + threadIdx.x; i < number; i += kThreads) {
    const Entry& entry = list.entries[i];
    list.entries[i] = entry_of_row(u, which, entry.origin, int(entry.key >> 32));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < number; i += kThreads) {
    const Entry entry = list.entries[i];
    int rank = 0;
    for (int j = 0; j < number; ++j) rank += precedes(list.entries[j], entry);
    if (rank < kept) list.merged[rank] = entry;
  }
  __syncthreads();
  if (threadIdx.x < kept) list.entries[threadIdx.x] = list.merged[threadIdx.x];
  if (threadIdx.x == 0) list.waiting = 0;
  __syncthreads();
}

// Writes the list back: records that moved, and new ones.
__device__ void write_records(const Update& u, const List& list, int which, int64_t* records) {
  const int kept = u.kept[which];
  int64_t record[kColumns];
  if (threadIdx.x < kept) {
    const Entry& entry = list.entries[threadIdx.x];
    if (entry.origin < 0) {
      for (int i = 0; i < kColumns; ++i) record[i] = records[(entry.origin + kept) * kColumns + i];
    } else {
      const int row = entry.origin, slot = int(u.order[row]);
      record[kValue] = entry.key >> 32;
      record[kSign] = peaks(u, which)[row] < 0;
      record[kChannel] = entry.channel;
      record[kSource] = u.source;
      record[kSequence] = entry.sequence;
      record[kPosition] = entry.position;
      record[kToken] = u.token[slot / u.top_k];
      record[kGate] = float_bits(load_gate(u.gates, u.gates_type, slot));
      record[kInValue] = float_bits(u.stats.in_peak[row]);
      record[kInChannel] = u.stats.in_channel[row];
    }
  }
  __syncthreads();  // all old records are read before any new one is written
  if (threadIdx.x < kept) {
    for (int i = 0; i < kColumns; ++i) records[threadIdx.x * kColumns + i] = record[i];
  }
}

// Lets the rows of an expert enter one of its lists. head: the largest of the thread's share of the tiles' heads.
__device__ void enter_rows(const Update& u, const Scratch& scratch, int first_tile, int number, int end, int which,
                           int head, int64_t* records) {
  __shared__ List list;
  const int kept = u.kept[which];
  if (threadIdx.x < kept) {
    list.entries[threadIdx.x] = entry_of_record(records + threadIdx.x * kColumns, int(threadIdx.x) - kept);
  }
  if (threadIdx.x == 0) list.waiting = 0;
  // As many rows as the list keeps reach the kept-th largest head: what is below it cannot stay.
  int bound = 0;
  if (__syncthreads_count(head >= 0) >= kept) {
    for (int bit = 30; bit >= 0; --bit) {
      const int higher = bound | 1 << bit;
      if (__syncthreads_count(head >= higher) >= kept) bound = higher;
    }
  }
  const int rows = u.schedule.rows;
  for (int start = 0; start < number; start += kThreads) {
    if (threadIdx.x == 0) list.tiles_number = 0;
    __syncthreads();
    const int tile = first_tile + start + threadIdx.x;
    const int least = max(bound, int(list.entries[kept - 1].key >> 32));
    if (start + int(threadIdx.x) < number && scratch.tiles[tile].heads[which] >= least) {
      list.tiles[atomicAdd(&list.tiles_number, 1)] = tile;  // entries have an order of their own
    }
    __syncthreads();
    const int found = list.tiles_number * rows;
    const auto row_of = [&](int i) { return u.schedule.tiles[2 * list.tiles[i / rows] + 1] + i % rows; };
    for (int some = threadIdx.x; some - int(threadIdx.x) < found; some += kAtOnce * kThreads) {
      int values[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = some + n * kThreads, row = i < found ? row_of(i) : end;
        values[n] = row < end && belongs(which, scratch.flags[row]) ? value_bits(peaks(u, which)[row]) : -1;
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (values[n] >= bound && values[n] >= int(list.entries[kept - 1].key >> 32)) {
          const int64_t key = int64_t(values[n]) << 32;
          list.entries[kept + atomicAdd(&list.waiting, 1)] = {key, 0, 0, 0, row_of(some + n * kThreads)};
        }
        __syncthreads();
        const bool full = list.waiting > kPending - kThreads;
        __syncthreads();
        if (full) merge_waiting(u, which, list);
      }
    }
  }
  if (list.waiting > 0) merge_waiting(u, which, list);
  write_records(u, list, which, records);
}

__global__ void __launch_bounds__(kThreads, kBlocks) update_kernel(const Update u) {
  const Scratch scratch(u);
  const int number = *u.schedule.count;
  for (int tile = blockIdx.x; tile < number; tile += gridDim.x) reduce_tile(u, scratch, tile);
  cooperative_groups::this_grid().sync();

  for (int item = blockIdx.x; item < u.experts * kLists; item += gridDim.x) {
    const int expert = item / kLists, which = item % kLists;
    const int begin = int(u.offsets[expert]), end = int(u.offsets[expert + 1]);
    if (begin == end) continue;
    const int first_tile = scratch.first_tile[expert], tiles = (end - begin + u.schedule.rows - 1) / u.schedule.rows;
    if (which == 0) add_totals(u, scratch.tiles + first_tile, tiles, expert);
    int head = -1;
    for (int i = threadIdx.x; i < tiles; i += kThreads) head = max(head, scratch.tiles[first_tile + i].heads[which]);
    if (__syncthreads_or(head >= 0)) {
      enter_rows(u, scratch, first_tile, tiles, end, which, head,
                 u.records[which] + int64_t(expert) * u.kept[which] * kColumns);
    }
    __syncthreads();
  }
}

// Blocks of update_kernel that run at once: all of them must, to wait for each other.
int resident_blocks(int processors) {
  static const int of_processor = [] {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, update_kernel, kThreads, 0),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks;
  }();
  return of_processor * processors;
}

}  // namespace

int64_t update_scratch(int slots, int experts, int max_tiles) {
  return int64_t(max_tiles) * sizeof(Tile) + int64_t(experts) * sizeof(int) + slots;
}

void update(const Update& arguments, cudaStream_t stream) {
  Update update = arguments;
  const int wanted = std::max(update.max_tiles, update.experts * kLists);
  const int blocks = std::min(wanted, resident_blocks(update.processors));
  void* parameters[] = {&update};
  check(cudaLaunchCooperativeKernel(update_kernel, dim3(blocks), dim3(kThreads), parameters, 0, stream),
        "launch of update");
}

}  // namespace sedetect::cuda
