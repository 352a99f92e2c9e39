// The grouped GEMMs of the cuda backend: persistent, one tile of 128 sorted rows of one expert at a time. Launches on
// the current device, no synchronization. All tensors are contiguous and on 16-byte boundaries; hidden and width are
// multiples of 8. Rows of no expert are not written. No biases and no interleaved gates: in transformers only
// transposed weights have them, which these kernels do not take either.
#pragma once

#include "stages.h"

namespace sedetect::cuda {

constexpr int kTileRows = 128;

// Must agree with sedetect/ops/cuda.py.
enum class Activation : int { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu2 = 4 };

// kernels/gate.py's Gate. limit is infinite where there is none.
struct Gate {
  Activation activation;
  bool gated;
  float limit, slope, shift;
};

// h[r] = gate(W[e(r)] @ x[order[r] / k]), z = W x rounded to type as in the model, then the gate in float32.
struct GateUp {
  const void* x;         // (tokens, hidden); (S, hidden) without order, row r that of h's row r
  const void* weight;    // (E, 2 * width, hidden); (E, width, hidden) if not gated
  const int64_t* order;  // (S,), or null
  const int4* tiles;     // Schedule's
  const int32_t* count;
  void* h;  // (S, width) - output
  // (column_tiles(width, gated), S) - output, or null: the largest |h| that a column tile holds of a row, NaN if it
  // holds one.
  float* parts;
  Gate gate;
  Type type;  // not kFloat32
  int slots, top_k, experts, hidden, width, processors;
};

// y[r] = W[e(r)] @ h[r].
struct Down {
  const void* h;       // (S, width)
  const void* weight;  // (E, hidden, width)
  const int4* tiles;   // Schedule's
  const int32_t* count;
  void* y;  // (S, hidden) - output
  Type type;
  int slots, experts, hidden, width, processors;
};

// A column tile is of 128 columns of h if gated, of 256 otherwise.
constexpr int column_tiles(int width, bool gated) { return gated ? (width + 127) / 128 : (width + 255) / 256; }

// Both throw std::runtime_error that names the call that failed.
void grouped_gemm_gate_up(const GateUp& arguments, cudaStream_t stream);
void grouped_gemm_down(const Down& arguments, cudaStream_t stream);

}  // namespace sedetect::cuda
