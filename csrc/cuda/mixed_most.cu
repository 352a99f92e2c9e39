// Tiles of up to 288 sorted rows: a weight is read and dequantized once for as many as accumulators have room for.

#include "mixed_by_wgmma.cuh"

namespace sedetect::cuda {
namespace {

struct Most : Wide {
  static constexpr int kRows = 288, kBlocks = 1;
  static constexpr int kRegistersOfConsumers = 216, kRegistersOfOthers = 72;
};

}  // namespace

void mixed_most(const Mixed& m, const Arguments& arguments, cudaStream_t stream) {
  launch<Most, WarpgroupConsumer>(m, arguments, stream);
}

}  // namespace sedetect::cuda
