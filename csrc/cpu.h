// The cpu backend: the grouped GEMMs of one experts call, with the row statistics of every output row taken while it is
// in cache. Shapes are in sedetect/ops/contract.py, the caller is sedetect/ops/cpu.py; S sorted rows, T tokens, E experts.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/types.h>

namespace sedetect {

using at::Tensor;

// kernels/plan.py's Plan: order, offsets, top_k.
using Plan = std::tuple<Tensor, Tensor, int64_t>;

// One of the two projections of ExpertWeights: weight, bias, transposed.
using Projection = std::tuple<Tensor, std::optional<Tensor>, bool>;

// Counting sort of the routing (T, k) int64 -> order (S,) int64, offsets (E + 1,) int64.
std::tuple<Tensor, Tensor> plan_cpu(const Tensor& top_k_index, int64_t num_experts);

// The fields of kernels/gate.py's Gate: activation, gated, interleaved, limit (infinite where there is none), slope, shift.
using Gate = std::tuple<std::string, bool, bool, double, double, double>;

// The whole experts call, chunk by chunk in cache: gather, gate_up, gate, down, statistics, weighted sum into combined
// (T, H) float32.
void experts_cpu(const Tensor& x, const Plan& plan, const Projection& gate_up, const Gate& gate, const Projection& down,
                 const Tensor& gates, const std::vector<Tensor>& stats, const Tensor& combined);

// rows[r] = W[e(r)] @ x[order[r] / k] + bias[e(r)] -> (S, M).
Tensor gate_up_cpu(const Tensor& x, const Plan& plan, const Projection& gate_up);

// y[r] = W[e(r)] @ h[r] + bias[e(r)] into y (S, H), and its statistics into stats.
void down_cpu(const Tensor& h, const Plan& plan, const Projection& down, const std::vector<Tensor>& stats,
              const Tensor& y);

// Statistics of given rows: y (S, H), h (S, I).
void row_stats_cpu(const Tensor& y, const Tensor& h, const std::vector<Tensor>& stats);

// Merge the row statistics of one call into the state {counts, sums, outliers, first_outliers, in_max}, in place.
// rows is {counted, first, sequence, position, token}.
void update_cpu(const std::vector<Tensor>& state, const std::vector<Tensor>& stats, const Plan& plan,
                const Tensor& gates, const std::vector<Tensor>& rows, int64_t source);

}  // namespace sedetect
