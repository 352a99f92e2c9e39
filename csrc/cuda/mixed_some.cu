// Tiles of up to 64 sorted rows; a processor has two blocks, one of which loads while the other waits.

#include "mixed_by_wgmma.cuh"

namespace sedetect::cuda {
namespace {

struct Some : Wide {
  static constexpr int kRows = 64, kBlocks = 2;
  static constexpr int kRegistersOfConsumers = 88, kRegistersOfOthers = 56;
};

}  // namespace

void mixed_some(const Mixed& m, const Arguments& arguments, cudaStream_t stream) {
  launch<Some, WarpgroupConsumer>(m, arguments, stream);
}

}  // namespace sedetect::cuda
