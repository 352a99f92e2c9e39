#include "columns.h"
#include "cpu.h"
#include "row_scan.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace sedetect {
namespace {

using Record = std::array<int64_t, kColumns>;

// Value descending, then source, sequence, position, channel ascending.
bool precedes(const Record& a, const Record& b) {
  if (a[kValue] != b[kValue]) return a[kValue] > b[kValue];
  for (Column c : {kSource, kSequence, kPosition, kChannel}) {
    if (a[c] != b[c]) return a[c] < b[c];
  }
  return false;
}

int64_t float_bits(float x) {
  if (std::isnan(x)) return kNanBits;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The best K records of one expert: those of the state and those offered by this call.
class TopK {
 public:
  TopK(int64_t* slots, int64_t k) : slots_(slots), k_(k), kept_(k) {
    std::memcpy(kept_.data(), slots, k * sizeof(Record));
  }

  // Whether a row with this |value| could still enter: most cannot, and then its record is never built.
  bool admits(int64_t value_bits) const { return value_bits >= kept_[k_ - 1][kValue]; }

  void offer(const Record& record) {
    kept_.push_back(record);
    if (int64_t(kept_.size()) >= 4 * k_ + 64) prune();
  }

  void store() {
    prune();
    std::memcpy(slots_, kept_.data(), k_ * sizeof(Record));
  }

 private:
  void prune() {
    std::stable_sort(kept_.begin(), kept_.end(), precedes);
    kept_.resize(k_);
  }

  int64_t* slots_;
  int64_t k_;
  std::vector<Record> kept_;  // the first k_ are sorted
};

}  // namespace

void update_cpu(const std::vector<Tensor>& state, const std::vector<Tensor>& stats, const Plan& plan,
                const Tensor& gates, const std::vector<Tensor>& rows, int64_t source) {
  const Tensor &order = std::get<0>(plan), &offsets = std::get<1>(plan);
  const int64_t top_k = std::get<2>(plan);
  int64_t* counts = state[0].mutable_data_ptr<int64_t>();
  double* sums = state[1].mutable_data_ptr<double>();
  const auto records = [&](int i, int64_t expert) {
    const int64_t k = state[i].size(1);
    return TopK(state[i].mutable_data_ptr<int64_t>() + expert * k * kColumns, k);
  };
  const float* peak = stats[0].const_data_ptr<float>();
  const int32_t* channel = stats[1].const_data_ptr<int32_t>();
  const float* sqnorm = stats[2].const_data_ptr<float>();
  const int32_t* nonfinite = stats[3].const_data_ptr<int32_t>();
  const int32_t* over_fp16 = stats[4].const_data_ptr<int32_t>();
  const int32_t* over_fp8 = stats[5].const_data_ptr<int32_t>();
  const float* in_peak = stats[6].const_data_ptr<float>();
  const int32_t* in_channel = stats[7].const_data_ptr<int32_t>();
  const bool* row_counted = rows[0].const_data_ptr<bool>();
  const bool* row_first = rows[1].const_data_ptr<bool>();
  const int64_t* sequence = rows[2].const_data_ptr<int64_t>();
  const int64_t* position = rows[3].const_data_ptr<int64_t>();
  const int64_t* token_id = rows[4].const_data_ptr<int64_t>();
  const int64_t* slot = order.const_data_ptr<int64_t>();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  const float* gate = gates.const_data_ptr<float>();

  at::parallel_for(0, offsets.numel() - 1, 1, [&](int64_t expert_begin, int64_t expert_end) {
    for (int64_t e = expert_begin; e < expert_end; ++e) {
      if (offset[e] == offset[e + 1]) continue;
      TopK outliers = records(2, e), first_outliers = records(3, e), in_max = records(4, e);
      int64_t* count = counts + e * kCounts;
      double* sum = sums + e * kSums;
      for (int64_t r = offset[e]; r < offset[e + 1]; ++r) {
        const int64_t token = slot[r] / top_k;
        const float g = gate[slot[r]];
        if (!row_counted[token] || g == 0.f) continue;
        const bool first = row_first[token];
        count[kRows] += 1;
        count[kFirstRows] += first;
        count[kNonfinite] += nonfinite[r];
        count[kOverFp16] += over_fp16[r];
        count[kOverFp8] += over_fp8[r];
        if (nonfinite[r] == 0 && std::isfinite(g)) {
          const double norm = std::sqrt(sqnorm[r]);
          sum[kGateSum] += g;
          sum[kGateFirstSum] += first ? g : 0.;
          sum[kNormSum] += norm;
          sum[kSqnormSum] += sqnorm[r];
          sum[kGateNormSum] += g * norm;
        }
        const auto record = [&](float value, int64_t at) {
          return Record{float_bits(std::abs(value)), value < 0.f, at, source, sequence[token], position[token],
                        token_id[token], float_bits(g), float_bits(in_peak[r]), in_channel[r]};
        };
        TopK& list = first ? first_outliers : outliers;
        if (list.admits(float_bits(std::abs(peak[r])))) list.offer(record(peak[r], channel[r]));
        if (in_max.admits(float_bits(std::abs(in_peak[r])))) in_max.offer(record(in_peak[r], in_channel[r]));
      }
      outliers.store();
      first_outliers.store();
      in_max.store();
    }
  });
}

}  // namespace sedetect
