// Plan: a stable counting sort of the routing in one cooperative launch. Each block counts its slots by expert, all
// wait for each other, then each finds where its slots go from the counts of all blocks. No atomic decides a place: the
// same order every time.
#include "check.h"
#include "search.cuh"
#include "stages.h"

#include <cooperative_groups.h>

namespace sedetect::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

// The shared memory of a block; a bin is an expert, the last bin holds the sentinels.
struct Bins {
  int count;                      // E + 1
  int *total, *first, *tile_end;  // (count,): slots, first sorted row, tiles up to and with this bin's
  int* of_warp;                   // (kWarps, count)

  __device__ Bins(int* memory, int experts)
      : count(experts + 1), total(memory), first(total + count), tile_end(first + count), of_warp(tile_end + count) {}
};

int shared_bytes(int experts) { return (experts + 1) * (3 + kWarps) * int(sizeof(int)); }

int slots_of_block(int slots, int processors) {
  const int units = (slots + kThreads - 1) / kThreads;
  return (units + processors - 1) / processors * kThreads;
}

__device__ int bin_of(const Plan& plan, int slot) {
  const int64_t expert =
      plan.narrow ? static_cast<const int32_t*>(plan.index)[slot] : static_cast<const int64_t*>(plan.index)[slot];
  return expert >= 0 && expert < plan.experts ? int(expert) : plan.experts;
}

// Calls work(slot, bin, slots of this bin before it in the warp, slots of this bin in the warp) for 32 slots at a time
// of those that a warp owns; bin is -1 beyond the last slot.
template <typename Work>
__device__ void each_slot(const Plan& plan, int per_block, const Work& work) {
  const int lane = threadIdx.x % 32, per_warp = per_block / kWarps;
  const int begin = blockIdx.x * per_block + threadIdx.x / 32 * per_warp, end = min(begin + per_warp, plan.slots);
  for (int start = begin; start < end; start += 32) {
    const int slot = start + lane;
    const int bin = slot < end ? bin_of(plan, slot) : -1;
    const unsigned same = __match_any_sync(kAll, bin);
    work(slot, bin, __popc(same & ((1u << lane) - 1)), __popc(same));
    __syncwarp();
  }
}

// first and tile_end from total. Needs all threads of the block.
__device__ void scan_bins(const Bins& bins, int rows) {
  __shared__ uint64_t warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t carry = 0;
  for (int start = 0; start < bins.count; start += kThreads) {
    const int bin = start + threadIdx.x;
    const int count = bin < bins.count ? bins.total[bin] : 0;
    const int tiles = bin < bins.count - 1 ? (count + rows - 1) / rows : 0;  // sentinels have none
    uint64_t sum = uint64_t(tiles) << 32 | uint64_t(count);
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint64_t other = __shfl_up_sync(kAll, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    uint64_t before = carry;
    for (int i = 0; i < kWarps; ++i) {
      before += i < warp ? warp_sums[i] : 0;
      carry += warp_sums[i];
    }
    sum += before;
    if (bin < bins.count) {
      bins.first[bin] = int(sum & 0xFFFFFFFFu) - count;
      bins.tile_end[bin] = int(sum >> 32);
    }
    __syncthreads();
  }
}

__device__ void write_schedule(const Bins& bins, const Schedule& schedule) {
  const int total = bins.tile_end[bins.count - 1];
  for (int tile = blockIdx.x * kThreads + threadIdx.x; tile < schedule.max_tiles; tile += gridDim.x * kThreads) {
    if (tile >= total) {
      schedule.tiles[tile] = {-1, 0, 0, 0};
      continue;
    }
    const int low = first_that_ends_after(bins.tile_end, bins.count, tile);
    const int number = tile - (low == 0 ? 0 : bins.tile_end[low - 1]), first = bins.first[low];
    schedule.tiles[tile] = {low, first + number * schedule.rows, first + bins.total[low], number};
  }
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) *schedule.count = total;
    for (int i = threadIdx.x; i < kLists * (bins.count - 1); i += kThreads) schedule.arrived[i] = 0;
  }
}

__global__ void __launch_bounds__(kThreads) plan_kernel(Plan plan, int per_block) {
  extern __shared__ int memory[];
  const Bins bins(memory, plan.experts);
  const int blocks = gridDim.x;
  int* mine = bins.of_warp + threadIdx.x / 32 * bins.count;
  for (int i = threadIdx.x; i < kWarps * bins.count; i += kThreads) bins.of_warp[i] = 0;
  for (int i = threadIdx.x; i < bins.count; i += kThreads) bins.total[i] = bins.first[i] = 0;
  __syncthreads();
  each_slot(plan, per_block, [&](int, int bin, int before, int same) {
    if (bin >= 0 && before == 0) mine[bin] += same;
  });
  __syncthreads();

  // Per bin: the slots of the warps before each warp, and of the block.
  for (int bin = threadIdx.x; bin < bins.count; bin += kThreads) {
    int counts[kWarps], sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) counts[i] = bins.of_warp[i * bins.count + bin];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      bins.of_warp[i * bins.count + bin] = sum;
      sum += counts[i];
    }
    plan.counts[blockIdx.x * bins.count + bin] = sum;
  }
  cooperative_groups::this_grid().sync();

  // Per bin: the slots of all blocks, and of those before this one (in first, until it is known).
  const int groups = max(1, kThreads / bins.count), group = threadIdx.x / bins.count;
  for (int bin = threadIdx.x % bins.count; bin < bins.count && group < groups;
       bin += groups == 1 ? kThreads : bins.count) {
    int total = 0, before = 0;
#pragma unroll 8
    for (int block = group; block < blocks; block += groups) {
      const int count = plan.counts[block * bins.count + bin];
      total += count;
      before += block < int(blockIdx.x) ? count : 0;
    }
    atomicAdd(bins.total + bin, total);  // of integers, in shared memory: their order does not matter
    atomicAdd(bins.first + bin, before);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins.count; bin += kThreads) {
    for (int i = 0; i < kWarps; ++i) bins.of_warp[i * bins.count + bin] += bins.first[bin];
  }
  __syncthreads();
  scan_bins(bins, plan.schedule.rows);

  each_slot(plan, per_block, [&](int slot, int bin, int before, int same) {
    const int in_bin = bin < 0 ? 0 : mine[bin];
    __syncwarp();
    if (bin < 0) return;
    const int row = bins.first[bin] + in_bin + before;
    plan.order[row] = slot;
    plan.schedule.row[slot] = row;
    if (before == 0) mine[bin] = in_bin + same;
  });
  if (blockIdx.x == 0) {
    for (int bin = threadIdx.x; bin < bins.count; bin += kThreads) plan.offsets[bin] = bins.first[bin];
  }
  write_schedule(bins, plan.schedule);
}

}  // namespace

int plan_blocks(int slots, int processors) {
  const int per_block = slots_of_block(slots, processors);
  return (slots + per_block - 1) / per_block;
}

void plan(const Plan& arguments, cudaStream_t stream) {
  Plan plan = arguments;
  int per_block = slots_of_block(plan.slots, plan.processors);
  const int blocks = plan_blocks(plan.slots, plan.processors), shared = shared_bytes(plan.experts);
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "cudaFuncSetAttribute");
  }
  void* parameters[] = {&plan, &per_block};
  check(cudaLaunchCooperativeKernel(plan_kernel, dim3(blocks), dim3(kThreads), parameters, shared, stream),
        "launch of plan");
}

}  // namespace sedetect::cuda
