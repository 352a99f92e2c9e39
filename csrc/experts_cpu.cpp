#include "cpu.h"
#include "row_scan.h"

#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <cstring>

namespace sedetect {
namespace {

// Rows of one GEMM. Large enough that the weights are read few times, small enough that gate_up, gate and down output of a
// chunk stay in cache: 512 rows were faster than 128 on a 2 MiB second-level cache.
constexpr int64_t kChunk = 512;

int64_t output_width(const Projection& projection) {
  const auto& [weight, bias, transposed] = projection;
  return weight.size(transposed ? 2 : 1);
}

// Sorted rows [begin, end) of one expert, at most kChunk.
struct Chunk {
  int64_t expert, begin, end;
};

// Consecutive chunks of at most kChunk rows together: few rows per expert make one block of many experts, so that what is
// not a GEMM runs once per block.
using Block = std::vector<Chunk>;

std::vector<Block> blocks_of(const Tensor& offsets) {
  std::vector<Block> blocks;
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  for (int64_t e = 0; e + 1 < offsets.numel(); ++e) {
    for (int64_t begin = offset[e]; begin < offset[e + 1]; begin += kChunk) {
      const Chunk chunk{e, begin, std::min(begin + kChunk, offset[e + 1])};
      if (blocks.empty() || chunk.end - blocks.back().front().begin > kChunk) blocks.emplace_back();
      blocks.back().push_back(chunk);
    }
  }
  return blocks;
}

// to[i] = tokens[slot[i] / k] for the first rows of to.
void gather(const Tensor& tokens, const int64_t* slot, int64_t rows, int64_t top_k, const Tensor& to) {
  const size_t bytes = tokens.size(1) * tokens.element_size();
  const char* source = static_cast<const char*>(tokens.const_data_ptr());
  char* target = static_cast<char*>(to.mutable_data_ptr());
  at::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::memcpy(target + i * bytes, source + slot[i] / top_k * bytes, bytes);
  });
}

// out[r] = W[e] @ in[r] + bias[e] for the rows of a chunk, which begin at row first of in and out. Up to the next multiple
// of multiple, rows beyond the chunk are computed as well, for the next chunk to overwrite.
void linear(const Tensor& in, int64_t first, const Projection& projection, const Chunk& chunk, const Tensor& out,
            int64_t multiple = 1) {
  const auto& [weight, bias, transposed] = projection;
  const int64_t rows = (chunk.end - chunk.begin + multiple - 1) / multiple * multiple;
  Tensor result = out.narrow(0, first, rows);
  const Tensor matrix = weight.select(0, chunk.expert);
  at::mm_out(result, in.narrow(0, first, rows), transposed ? matrix : matrix.t());
  if (bias) result.add_(bias->select(0, chunk.expert));
}

void activate(const std::string& activation, const Tensor& x, Tensor out) {
  if (activation == "silu") {
    at::silu_out(out, x);
  } else if (activation == "gelu" || activation == "gelu_tanh") {
    at::gelu_out(out, x, activation == "gelu" ? "none" : "tanh");
  } else if (activation == "relu2") {
    at::clamp_min_out(out, x, 0).mul_(out);
  } else {
    TORCH_CHECK(false, "unknown activation ", activation);
  }
}

// kernels/gate.py's gate_torch, operation by operation, so that the roundings are the same.
void apply_gate(const Gate& gate, const Tensor& z, Tensor out) {
  const auto& [activation, gated, interleaved, limit, slope, shift] = gate;
  if (!gated) return activate(activation, z, out);
  const int64_t width = out.size(1);
  Tensor g = interleaved ? z.slice(1, 0, 2 * width, 2) : z.narrow(1, 0, width);
  Tensor u = interleaved ? z.slice(1, 1, 2 * width, 2) : z.narrow(1, width, width);
  if (std::isfinite(limit)) {
    g.clamp_max_(limit);
    u.clamp_(-limit, limit);
  }
  if (slope != 1) {
    at::mul_out(out, g, at::sigmoid(g * slope));
  } else {
    activate(activation, g, out);
  }
  if (shift != 0) u.add_(shift);
  out.mul_(u);
}

// Raw pointers of a RowStats, in the order of its fields.
struct StatsOut {
  float* peak;
  int32_t* channel;
  float* sqnorm;
  int32_t *nonfinite, *over_fp16, *over_fp8;
  float* in_peak;
  int32_t* in_channel;

  explicit StatsOut(const std::vector<Tensor>& t)
      : peak(t[0].mutable_data_ptr<float>()), channel(t[1].mutable_data_ptr<int32_t>()),
        sqnorm(t[2].mutable_data_ptr<float>()), nonfinite(t[3].mutable_data_ptr<int32_t>()),
        over_fp16(t[4].mutable_data_ptr<int32_t>()), over_fp8(t[5].mutable_data_ptr<int32_t>()),
        in_peak(t[6].mutable_data_ptr<float>()), in_channel(t[7].mutable_data_ptr<int32_t>()) {}
};

template <typename T>
float peak_value(const RowScan& scan, const T* row, int64_t n) {
  if (n == 0 || scan.bits == kNanBits) return n == 0 ? 0.f : std::numeric_limits<float>::quiet_NaN();
  return static_cast<float>(row[scan.channel]);
}

template <typename T, typename U>
void scan_into(const StatsOut& out, int64_t r, const T* y, int64_t hidden, const U* h, int64_t intermediate) {
  const RowScan scan = scan_row(y, hidden);
  out.peak[r] = peak_value(scan, y, hidden);
  out.channel[r] = scan.channel;
  out.sqnorm[r] = scan.sqnorm;
  out.nonfinite[r] = scan.nonfinite;
  out.over_fp16[r] = scan.over_fp16;
  out.over_fp8[r] = scan.over_fp8;
  const RowScan in = scan_row(h, intermediate);
  out.in_peak[r] = peak_value(in, h, intermediate);
  out.in_channel[r] = in.channel;
}

template <typename Work>
void dispatch(const Tensor& x, const Work& work) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "sedetect", [&] {
    if constexpr (std::is_same_v<scalar_t, double>) {
      TORCH_CHECK(false, "the cpu backend has no float64 kernel");
    } else {
      work(x.const_data_ptr<scalar_t>());
    }
  });
}

}  // namespace

void experts_cpu(const Tensor& x, const Plan& plan, const Projection& gate_up, const Gate& gate, const Projection& down,
                 const Tensor& gates, const std::vector<Tensor>& stats, const Tensor& combined) {
  const at::NoGradGuard no_grad;
  const Tensor tokens = x.contiguous();
  const Tensor &order = std::get<0>(plan), &offsets = std::get<1>(plan);
  const int64_t top_k = std::get<2>(plan);
  const Tensor &up_weight = std::get<0>(gate_up), &down_weight = std::get<0>(down);
  const int64_t most = std::min(order.numel(), kChunk), hidden = output_width(down);
  const int64_t intermediate = down_weight.size(std::get<2>(down) ? 1 : 2);
  // oneDNN, which serves the 16-bit types, compiles a kernel for every number of rows it meets: let it meet few.
  const int64_t multiple = down_weight.scalar_type() == at::kFloat ? 1 : 32, room = most + multiple;
  const Tensor gathered = at::zeros({room, tokens.size(1)}, up_weight.options());
  const Tensor z = at::empty({room, output_width(gate_up)}, up_weight.options());
  const Tensor h = at::zeros({room, intermediate}, up_weight.options());
  const Tensor y = at::empty({room, hidden}, down_weight.options());
  const int64_t* slot = order.const_data_ptr<int64_t>();
  const float* weight = gates.const_data_ptr<float>();
  float* sum = combined.mutable_data_ptr<float>();
  const StatsOut out(stats);
  dispatch(y, [&](const auto* y_data) {
    const auto* h_data = h.const_data_ptr<std::remove_cv_t<std::remove_pointer_t<decltype(y_data)>>>();
    for (const Block& block : blocks_of(offsets)) {
      const int64_t begin = block.front().begin, rows = block.back().end - begin;
      gather(tokens, slot + begin, rows, top_k, gathered);
      for (const Chunk& c : block) linear(gathered, c.begin - begin, gate_up, c, z, multiple);
      apply_gate(gate, z.narrow(0, 0, rows), h.narrow(0, 0, rows));
      for (const Chunk& c : block) linear(h, c.begin - begin, down, c, y, multiple);
      at::parallel_for(0, rows, 8, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
          scan_into(out, begin + i, y_data + i * hidden, hidden, h_data + i * intermediate, intermediate);
        }
      });
      // By columns: rows of one token may stand anywhere in the block, and no two threads may add to one element.
      at::parallel_for(0, hidden, 64, [&](int64_t first, int64_t last) {
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t s = slot[begin + i];
          accumulate_row(sum + s / top_k * hidden + first, y_data + i * hidden + first, weight[s], last - first);
        }
      });
    }
  });
}

Tensor gate_up_cpu(const Tensor& x, const Plan& plan, const Projection& gate_up) {
  const at::NoGradGuard no_grad;
  const Tensor tokens = x.contiguous();
  const auto& [order, offsets, top_k] = plan;
  const Tensor& weight = std::get<0>(gate_up);
  const int64_t rows = order.numel();
  const Tensor result = at::empty({rows, output_width(gate_up)}, weight.options());
  const Tensor gathered = at::empty({std::min(rows, kChunk), tokens.size(1)}, weight.options());
  const int64_t* slot = order.const_data_ptr<int64_t>();
  for (const Block& block : blocks_of(offsets)) {
    const int64_t begin = block.front().begin, length = block.back().end - begin;
    const Tensor target = result.narrow(0, begin, length);
    gather(tokens, slot + begin, length, top_k, gathered);
    for (const Chunk& c : block) linear(gathered, c.begin - begin, gate_up, c, target);
  }
  const int64_t routed = offsets.const_data_ptr<int64_t>()[offsets.numel() - 1];
  result.narrow(0, routed, rows - routed).zero_();  // sentinels: no expert, but the gate reads every row
  return result;
}

void down_cpu(const Tensor& h, const Plan& plan, const Projection& down, const std::vector<Tensor>& stats,
              const Tensor& y) {
  const at::NoGradGuard no_grad;
  const int64_t hidden = y.size(1), intermediate = h.size(1);
  const Tensor& offsets = std::get<1>(plan);
  const StatsOut out(stats);
  dispatch(y, [&](const auto* y_data) {
    const auto* h_data = h.const_data_ptr<std::remove_cv_t<std::remove_pointer_t<decltype(y_data)>>>();
    for (const Block& block : blocks_of(offsets)) {
      for (const Chunk& c : block) linear(h, c.begin, down, c, y);
      at::parallel_for(block.front().begin, block.back().end, 8, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
          scan_into(out, r, y_data + r * hidden, hidden, h_data + r * intermediate, intermediate);
        }
      });
    }
  });
}

void row_stats_cpu(const Tensor& y, const Tensor& h, const std::vector<Tensor>& stats) {
  const StatsOut out(stats);
  dispatch(y, [&](const auto* y_data) {
    dispatch(h, [&](const auto* h_data) {
      at::parallel_for(0, y.size(0), 8, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
          scan_into(out, r, y_data + r * y.size(1), y.size(1), h_data + r * h.size(1), h.size(1));
        }
      });
    });
  });
}

}  // namespace sedetect
