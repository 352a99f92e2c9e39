// Update: the row statistics of one experts call, merged into the bank's tables in one launch.
//
// A block for every tile of rows of one expert and every list of kept records finds the rows of the tile that stand
// before the last record kept; those of one list also add up counts and float64 sums. Whichever block of an
// expert and list is the last to be done goes on: it adds up the expert's tiles in their order and merges the rows that
// were found. In a settled state there are none.
//
// Where in a row its largest element stands is looked up only for those rows, by a warp for each, and only rows whose
// largest says so are read for what they have to count.
#include "../columns.h"
#include "check.h"
#include "search.cuh"
#include "stages.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace sedetect::cuda {
namespace {

// The code is kept small (loops that are not unrolled, functions that are not inlined): a third of it took 16 us where
// all took 20, presumably because in a model it has left the caches whenever it is called.
constexpr unsigned kAll = 0xFFFFFFFFu;

// Must agree with kernels/records.py.
constexpr int kNanBits = 0x7FC00000;
constexpr int kInfBits = 0x7F800000;

// Bits of the largest finite values of float16 and float8_e4m3fn: 65504 and 448.
constexpr int kFp16MaxBits = 0x477FE000;
constexpr int kFp8MaxBits = 0x43E00000;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

// work(values with their type).
template <typename Work>
__device__ auto with_type(const void* values, Type type, const Work& work) {
  switch (type) {
    case Type::kBFloat16:
      return work(static_cast<const __nv_bfloat16*>(values));
    case Type::kFloat16:
      return work(static_cast<const __half*>(values));
    default:
      return work(static_cast<const float*>(values));
  }
}

constexpr int kThreads = 128;  // and the most rows of a tile
constexpr int kWarps = kThreads / 32;
constexpr int kPending = 256;  // rows that wait to be merged into a list
constexpr int64_t kLastSource = 0x7FFFFFFF;

// Sums, then counts of a tile's rows, in the order of their columns; float64 holds the counts exactly.
constexpr int kTotals = int(kSums) + int(kCounts);
constexpr int kAddsUp = kFirstOutliers;  // whose blocks add them up: they have the fewest rows to enter
struct Totals {
  double values[kTotals];
};

// Rows of a tile that enter a list. head: the largest of their values, -1 if there are none.
struct Found {
  int head, number;
};

// What records are ordered by: value and source in one key, descending, then the rest, ascending. Of equals those kept
// stand first, in their order (origin = slot - kept), then the rows of this call in theirs (origin = row).
struct Entry {
  int64_t key, sequence, position;
  int place, origin;  // channel << 1 | sign bit
};

__device__ bool precedes(const Entry& a, const Entry& b) {
  if (a.key != b.key) return a.key > b.key;
  if (a.sequence != b.sequence) return a.sequence < b.sequence;
  if (a.position != b.position) return a.position < b.position;
  if (a.place >> 1 != b.place >> 1) return a.place >> 1 < b.place >> 1;
  return a.origin < b.origin;
}

// Scratch of one launch, in this order.
struct Scratch {
  Totals* totals;  // (max_tiles,)
  Found* found;    // (kLists, max_tiles)
  Entry* offers;   // (kLists, max_tiles, rows of a tile)

  __device__ explicit Scratch(const Update& u)
      : totals(static_cast<Totals*>(u.scratch)),
        found(reinterpret_cast<Found*>(totals + u.schedule.max_tiles)),
        offers(reinterpret_cast<Entry*>(found + kLists * u.schedule.max_tiles)) {}
};

// Bits of |x|; every NaN becomes kNanBits.
__device__ int value_bits(float x) {
  const int bits = __float_as_int(x) & 0x7FFFFFFF;
  return bits > kInfBits ? kNanBits : bits;
}

// Bits of x as records hold them.
__device__ int64_t float_bits(float x) { return isnan(x) ? int64_t(kNanBits) : int64_t(__float_as_uint(x)); }

__device__ float gate_of(const Update& u, int slot) {
  return with_type(u.gates, u.gates_type, [&](const auto* gates) { return to_float(gates[slot]); });
}

// Value bits of the largest element of a row, and the first part that has it.
struct Part {
  int value, part;
};

// That of h.
__device__ Part largest_part(const RowParts& r, int row, int slots) {
  constexpr int kAtOnce = 8;  // loads that wait together
  Part best{-1, 0};
#pragma unroll 1
  for (int start = 0; start < r.in_parts_number; start += kAtOnce) {
    int values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      values[i] = start + i < r.in_parts_number ? value_bits(r.in_parts[int64_t(start + i) * slots + row]) : -1;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (values[i] > best.value) best = {values[i], start + i};
    }
  }
  return best;
}

// The same by a warp.
__device__ Part largest_part_by_warp(const RowParts& r, int row, int slots) {
  Part best{-1, 0};
#pragma unroll 1
  for (int part = threadIdx.x % 32; part < r.in_parts_number; part += 32) {
    const int value = value_bits(r.in_parts[int64_t(part) * slots + row]);
    if (value > best.value) best = {value, part};
  }
  const int value = __reduce_max_sync(kAll, best.value);
  return {value, int(__reduce_min_sync(kAll, best.value == value ? unsigned(best.part) : ~0u))};
}

// Place (channel << 1 | sign bit, that of a NaN 0) of the first element of this size in a part of a row, by a warp.
// There is one.
template <typename T>
__device__ __noinline__ int find_by_warp(const T* x, int columns, Part part, int width) {
  constexpr int kOfLane = 4;
  const int end = min((part.part + 1) * width, columns);
  for (int start = part.part * width; start < end; start += 32 * kOfLane) {
    const int mine = start + threadIdx.x % 32 * kOfLane;
    T values[kOfLane];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) values[i] = mine + i < end ? x[mine + i] : T(0.f);
    int place = -1;
#pragma unroll
    for (int i = kOfLane - 1; i >= 0; --i) {
      const float value = to_float(values[i]);
      if (mine + i < end && value_bits(value) == part.value) {
        place = (mine + i) << 1 | (part.value <= kInfBits && __float_as_int(value) < 0);
      }
    }
    const unsigned having = __ballot_sync(kAll, place >= 0);
    if (having != 0) return __shfl_sync(kAll, place, __ffs(having) - 1);
  }
  return part.part * width << 1;
}

__device__ int find_in_y(const RowParts& r, int row, Part part) {
  return with_type(r.y, r.y_type, [&](const auto* y) {
    return find_by_warp(y + int64_t(row) * r.hidden, r.hidden, part, r.y_part_width);
  });
}

__device__ int find_in_h(const RowParts& r, int row, Part part) {
  return with_type(r.h, r.h_type, [&](const auto* h) {
    return find_by_warp(h + int64_t(row) * r.intermediate, r.intermediate, part, r.h_part_width);
  });
}

__device__ Entry entry_of_record(const int64_t* record, int origin) {
  return {record[kValue] * (int64_t(1) << 32) + (kLastSource - record[kSource]), record[kSequence], record[kPosition],
          int(record[kChannel]) << 1, origin};
}

// Where a row stands in the block's order of those that have something: the sum of `number` over the threads before,
// and over all. Needs all threads.
struct Place {
  int before, total;
};

__device__ __noinline__ Place place(int number) {
  __shared__ int of_warp[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = number;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(kAll, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  Place result{sum - number, 0};
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) result.before += of_warp[i];
    result.total += of_warp[i];
  }
  __syncthreads();
  return result;
}

// The number of NaN and Inf, of finite elements beyond float16, and of those beyond float8 of a row, by a warp.
template <typename T>
__device__ __noinline__ void count_by_warp(const T* x, int columns, int (&counts)[3]) {
  constexpr int kAtOnce = 16;  // loads that wait together
  int found[3] = {};
  for (int start = threadIdx.x % 32; start < columns; start += 32 * kAtOnce) {
    T values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) values[i] = start + 32 * i < columns ? x[start + 32 * i] : T(0.f);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int bits = value_bits(to_float(values[i]));
      found[0] += bits >= kInfBits;
      found[1] += bits > kFp16MaxBits && bits < kInfBits;
      found[2] += bits > kFp8MaxBits && bits < kInfBits;
    }
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) counts[i] = __reduce_add_sync(kAll, found[i]);
}

// count_by_warp of the y of the threads' rows where it is wanted. Needs all threads.
__device__ void count_elements(const RowParts& r, int row, bool wanted, int (&counts)[3]) {
  __shared__ int rows[kThreads], found[kThreads][3];
  const Place at = place(wanted);
  if (at.total == 0) return;
  if (wanted) rows[at.before] = row;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < at.total; i += kWarps) {
    int of_row[3];
    with_type(r.y, r.y_type, [&](const auto* y) { count_by_warp(y + int64_t(rows[i]) * r.hidden, r.hidden, of_row); });
    if (threadIdx.x % 32 == 0) found[i][0] = of_row[0], found[i][1] = of_row[1], found[i][2] = of_row[2];
  }
  __syncthreads();
  if (wanted) {
    for (int i = 0; i < 3; ++i) counts[i] = found[at.before][i];
  }
}

// The largest of the threads' values. Needs all threads.
__device__ __noinline__ int largest(int value) {
  __shared__ int of_warp[kWarps];
  value = __reduce_max_sync(kAll, value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) value = max(value, of_warp[i]);
  __syncthreads();
  return value;
}

// The sum over a warp, in a fixed order, for all lanes.
__device__ double sum_of_warp(double value) {
  for (int offset = 16; offset >= 1; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

using Summands = double[kTotals][kThreads];

// Sums and counts of a tile's rows. Needs all threads.
__device__ void add_rows(Summands& of_rows, Totals& result, bool counted, bool first, float gate, float squares,
                         const int (&elements)[3]) {
  const bool summed = counted && elements[0] == 0 && isfinite(gate);
  const double weight = summed ? gate : 0., norm = summed ? __fsqrt_rn(squares) : 0.;
  const double values[kTotals] = {weight,
                                  first ? weight : 0.,
                                  norm,
                                  summed ? squares : 0.,
                                  weight * norm,
                                  double(counted),
                                  double(first),
                                  double(elements[0]),
                                  double(elements[1]),
                                  double(elements[2])};
#pragma unroll
  for (int i = 0; i < kTotals; ++i) of_rows[i][threadIdx.x] = values[i];
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < kTotals; i += kWarps) {
    double sum = 0;
    for (int row = threadIdx.x % 32; row < kThreads; row += 32) sum += of_rows[i][row];
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) result.values[i] = sum;
  }
}

// A tile of rows of one expert, for one list.
__device__ void reduce_tile(const Update& u, const Scratch& scratch, Summands& summands, int index, int list,
                            const TileOf& tile) {
  const int row = tile.first + threadIdx.x;
  const bool inside = threadIdx.x < u.schedule.rows && row < tile.end;
  const int64_t* record = u.records[list] + (int64_t(tile.expert + 1) * u.kept[list] - 1) * kColumns;
  // All that a row needs is read before any of it is looked at, so that no load waits to hear whether the row counts.
  const Entry last = entry_of_record(record, -1);
  float gate = 0, squares = 0;
  Part part{-1, 0};
  Entry mine{};
  bool counted = false, first = false;
  if (inside) {
    const int slot = int(u.order[row]), token = slot / u.top_k;
    part = list == kInMax ? largest_part(u.rows, row, u.slots) : Part{value_bits(u.rows.best[row]), u.rows.part[row]};
    squares = list == kAddsUp ? u.rows.sqnorm[row] : 0;
    gate = gate_of(u, slot);
    counted = u.counted[token], first = u.first[token];
    mine = {int64_t(part.value) << 32 | (kLastSource - u.source), u.sequence[token], u.position[token], 0, row};
  }
  counted = counted && gate != 0;
  first = first && counted;
  if (list == kAddsUp) {
    int elements[3] = {};
    count_elements(u.rows, row, counted && part.value > kFp8MaxBits, elements);
    add_rows(summands, scratch.totals[index], counted, first, gate, squares, elements);
  }
  const bool taken = list == kOutliers ? counted && !first : list == kFirstOutliers ? first : counted;
  // Equals are rare, except in experts that give the same everywhere, such as zero: those must not enter every time,
  // and are looked up only where the channel decides.
  mine.place = last.place;
  const bool same = mine.key == last.key && mine.sequence == last.sequence && mine.position == last.position;
  bool enters = taken && (precedes(mine, last) || same);
#pragma unroll 1
  for (unsigned left = __ballot_sync(kAll, enters); left != 0; left &= left - 1) {
    const int owner = __ffs(left) - 1, its_row = __shfl_sync(kAll, row, owner);
    const Part its{__shfl_sync(kAll, part.value, owner), __shfl_sync(kAll, part.part, owner)};
    const int place = list == kInMax ? find_in_h(u.rows, its_row, its) : find_in_y(u.rows, its_row, its);
    if (int(threadIdx.x % 32) == owner) mine.place = place;
  }
  enters = enters && precedes(mine, last);
  const Place before = place(enters);
  const int64_t at = int64_t(list) * u.schedule.max_tiles + index;
  if (enters) scratch.offers[at * u.schedule.rows + before.before] = mine;
  const int head = largest(enters ? part.value : -1);
  if (threadIdx.x == 0) scratch.found[at] = {head, before.total};
}

// Whether this block is the last of its expert and list; if so, it sees what the others wrote. Needs all threads.
__device__ bool is_last(int32_t* arrived, int blocks) {
  __shared__ bool last;
  __syncthreads();
  if (blocks == 1) return true;
  if (threadIdx.x == 0) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrived) : "memory");
    last = before == blocks - 1;
    if (last) *arrived = 0;  // as the next launch must find it
  }
  __syncthreads();
  return last;
}

// Adds the sums and counts of an expert's tiles to the state, in a fixed order.
__device__ void add_totals(const Update& u, const Totals* tiles, int number, int expert) {
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < kTotals; i += kWarps) {
    double sum = 0;
#pragma unroll 1
    for (int tile = threadIdx.x % 32; tile < number; tile += 32) sum += tiles[tile].values[i];
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 != 0) continue;
    if (i < kSums) {
      u.sums[expert * kSums + i] += sum;
    } else {
      u.counts[expert * kCounts + i - kSums] += int64_t(sum);
    }
  }
}

// A list of kept records while rows enter it: slots [0, kept) are the list in order, then come rows that wait.
struct List {
  Entry entries[kMaxKept + kPending], merged[kMaxKept];
  int waiting;
  int tiles[kThreads], ends[kThreads];  // tiles that offer rows, and the number of rows up to and with each
};

__device__ __noinline__ void merge_waiting(List& list, int kept) {
  const int number = kept + list.waiting;
  for (int i = threadIdx.x; i < number; i += kThreads) {
    const Entry entry = list.entries[i];
    int rank = i;
    if (i >= kept) {
      rank = 0;  // the number of kept entries before this one, which stand in order
      for (int high = kept; rank < high;) {
        const int middle = (rank + high) / 2;
        if (precedes(list.entries[middle], entry))
          rank = middle + 1;
        else
          high = middle;
      }
    }
#pragma unroll 1
    for (int j = kept; j < number; ++j) rank += precedes(list.entries[j], entry);
    if (rank < kept) list.merged[rank] = entry;
  }
  __syncthreads();
  if (threadIdx.x < kept) list.entries[threadIdx.x] = list.merged[threadIdx.x];
  if (threadIdx.x == 0) list.waiting = 0;
  __syncthreads();
}

// Writes the list back: records that moved, and new ones.
__device__ void write_records(const Update& u, const List& list, int which, int64_t* records) {
  __shared__ int in_values[kMaxKept], in_places[kMaxKept];
  const int kept = u.kept[which];
#pragma unroll 1
  for (int slot = threadIdx.x / 32; slot < kept; slot += kWarps) {
    const Entry& entry = list.entries[slot];
    if (entry.origin < 0) continue;
    Part in{int(entry.key >> 32), 0};
    int place = entry.place;
    if (which != kInMax) {
      in = largest_part_by_warp(u.rows, entry.origin, u.slots);
      place = find_in_h(u.rows, entry.origin, in);
    }
    if (threadIdx.x % 32 == 0) in_values[slot] = in.value, in_places[slot] = place;
  }
  int64_t record[kColumns];
  if (threadIdx.x < kept) {
    const Entry& entry = list.entries[threadIdx.x];
    if (entry.origin < 0) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) record[i] = records[(entry.origin + kept) * kColumns + i];
    } else {
      const int slot = int(u.order[entry.origin]);
      record[kValue] = entry.key >> 32;
      record[kSign] = entry.key >> 32 != 0 && entry.place & 1;
      record[kChannel] = entry.place >> 1;
      record[kSource] = u.source;
      record[kSequence] = entry.sequence;
      record[kPosition] = entry.position;
      record[kToken] = u.token[slot / u.top_k];
      record[kGate] = float_bits(gate_of(u, slot));
    }
  }
  __syncthreads();  // all old records are read before any new one is written
  if (threadIdx.x < kept) {
    if (list.entries[threadIdx.x].origin >= 0) {
      record[kInValue] = int64_t(in_values[threadIdx.x]) | int64_t(in_places[threadIdx.x] & 1) << 31;
      record[kInChannel] = in_places[threadIdx.x] >> 1;
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) records[threadIdx.x * kColumns + i] = record[i];
  }
}

// Lets the rows that an expert's tiles found enter one of its lists. head: the largest of the thread's share of the
// tiles' heads.
__device__ void enter_rows(const Update& u, const Scratch& scratch, int first_tile, int number, int which, int head,
                           List& list, int64_t* records) {
  const int kept = u.kept[which];
  if (threadIdx.x < kept) {
    list.entries[threadIdx.x] = entry_of_record(records + threadIdx.x * kColumns, int(threadIdx.x) - kept);
  }
  if (threadIdx.x == 0) list.waiting = 0;
  // As many rows as the list keeps reach the kept-th largest head: what is below it cannot stay.
  int bound = 0;
  if (kept == 1) {
    bound = largest(head);
  } else if (__syncthreads_count(head >= 0) >= kept) {
#pragma unroll 1
    for (int bit = 30; bit >= 0; --bit) {
      const int higher = bound | 1 << bit;
      if (__syncthreads_count(head >= higher) >= kept) bound = higher;
    }
  }
  for (int start = 0; start < number; start += kThreads) {
    const int64_t tile = int64_t(which) * u.schedule.max_tiles + first_tile + start + threadIdx.x;
    const int least = max(bound, int(list.entries[kept - 1].key >> 32));
    int offered = 0;
    if (start + int(threadIdx.x) < number) {
      const Found found = scratch.found[tile];
      if (found.head >= least) offered = found.number;
    }
    const Place rows = place(offered);
    const Place tiles = place(offered > 0);
    if (offered > 0) {
      list.tiles[tiles.before] = first_tile + start + threadIdx.x;
      list.ends[tiles.before] = rows.before + offered;
    }
    __syncthreads();
    for (int some = 0; some < rows.total; some += kThreads) {
      const int i = some + threadIdx.x;
      if (i < rows.total) {
        const int low = first_that_ends_after(list.ends, tiles.total, i);
        const int64_t at = int64_t(which) * u.schedule.max_tiles + list.tiles[low];
        const Entry offer = scratch.offers[at * u.schedule.rows + i - (low == 0 ? 0 : list.ends[low - 1])];
        if (int(offer.key >> 32) >= bound && precedes(offer, list.entries[kept - 1])) {
          list.entries[kept + atomicAdd(&list.waiting, 1)] = offer;
        }
      }
      __syncthreads();
      const bool full = list.waiting > kPending - kThreads;
      __syncthreads();
      if (full) merge_waiting(list, kept);
    }
  }
  if (list.waiting > 0) merge_waiting(list, kept);
  write_records(u, list, which, records);
}

__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Update u) {
  __shared__ union {
    Summands summands;
    List list;
  } shared;
  const Scratch scratch(u);
  const int index = blockIdx.x, list = blockIdx.y;
  const TileOf tile(u.schedule.tiles[index]);
  if (tile.expert < 0) return;
  const int expert = tile.expert, first_tile = index - tile.number;
  int64_t* records = u.records[list] + int64_t(expert) * u.kept[list] * kColumns;
  const int tiles = tile.number + (tile.end - tile.first + u.schedule.rows - 1) / u.schedule.rows;
  reduce_tile(u, scratch, shared.summands, index, list, tile);
  if (!is_last(u.schedule.arrived + expert * kLists + list, tiles)) return;

  if (list == kAddsUp) add_totals(u, scratch.totals + first_tile, tiles, expert);
  int head = -1;
#pragma unroll 1
  for (int i = threadIdx.x; i < tiles; i += kThreads) {
    head = max(head, scratch.found[int64_t(list) * u.schedule.max_tiles + first_tile + i].head);
  }
  if (__syncthreads_or(head >= 0)) {
    enter_rows(u, scratch, first_tile, tiles, list, head, shared.list, records);
  }
}

}  // namespace

int64_t update_scratch(int max_tiles, int tile_rows) {
  return max_tiles * int64_t(sizeof(Totals) + kLists * (sizeof(Found) + tile_rows * sizeof(Entry)));
}

void update(const Update& update, cudaStream_t stream) {
  if (update.schedule.rows > kThreads) {
    throw std::runtime_error("update: tiles of " + std::to_string(update.schedule.rows) + " rows, it takes " +
                             std::to_string(kThreads));
  }
  update_kernel<<<dim3(update.schedule.max_tiles, kLists), kThreads, 0, stream>>>(update);
  check(cudaGetLastError(), "launch of update");
}

}  // namespace sedetect::cuda
