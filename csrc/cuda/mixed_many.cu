// Tiles of up to 160 sorted rows: small enough for many stages under way.

#include "mixed_by_wgmma.cuh"

namespace sedetect::cuda {
namespace {

struct Many : Wide {
  static constexpr int kRows = 160, kBlocks = 1;
  static constexpr int kRegistersOfConsumers = 216, kRegistersOfOthers = 72;
};

}  // namespace

void mixed_many(const Mixed& m, const Arguments& arguments, cudaStream_t stream) {
  launch<Many, WarpgroupConsumer>(m, arguments, stream);
}

}  // namespace sedetect::cuda
