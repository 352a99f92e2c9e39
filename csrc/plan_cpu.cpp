#include "cpu.h"

namespace sedetect {

std::tuple<Tensor, Tensor> plan_cpu(const Tensor& top_k_index, int64_t num_experts) {
  const Tensor index = top_k_index.to(at::kLong).contiguous();
  const int64_t slots = index.numel();
  Tensor order = at::empty({slots}, index.options());
  Tensor offsets = at::zeros({num_experts + 1}, index.options());
  const int64_t* expert = index.const_data_ptr<int64_t>();
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  int64_t* sorted = order.mutable_data_ptr<int64_t>();

  const auto bin = [&](int64_t slot) {
    const int64_t e = expert[slot];
    return e >= 0 && e < num_experts ? e : num_experts;  // sentinels go last
  };
  std::vector<int64_t> next(num_experts + 2, 0);
  for (int64_t slot = 0; slot < slots; ++slot) ++next[bin(slot) + 1];
  for (int64_t e = 0; e <= num_experts; ++e) next[e + 1] += next[e];
  for (int64_t e = 0; e <= num_experts; ++e) offset[e] = next[e];
  for (int64_t slot = 0; slot < slots; ++slot) sorted[next[bin(slot)]++] = slot;
  return {order, offsets};
}

}  // namespace sedetect
