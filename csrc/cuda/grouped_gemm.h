// The grouped GEMMs of the cuda backend: persistent, one tile of 128 sorted rows of one expert at a time. Launches on the
// current device, no synchronisation. All tensors are contiguous, and on 16-byte boundaries row by row. Rows of no expert
// are not written.
#pragma once

#include "stages.h"

namespace sedetect::cuda {

constexpr int kTileRows = 128;

// Must agree with sedetect/cuda_backend.py.
enum class Activation : int { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu2 = 4 };

// kernels/gate.py's Gate. limit is infinite where there is none.
struct Gate {
  Activation activation;
  bool gated, interleaved;
  float limit, slope, shift;
};

// h[r] = gate(W[e(r)] @ x[order[r] / k] + bias[e(r)]), rounded once.
struct GateUp {
  const void* x;          // (tokens, hidden)
  const int64_t* order;   // (S,)
  const void* weight;     // (E, 2 * width, hidden); (E, width, hidden) if not gated
  const void* bias;       // (E, the same) or null
  const int64_t* offsets;  // (E + 1,)
  const int32_t *tiles, *count;
  void* h;  // (S, width) - output
  // (key_tiles(width, gated), S) - output, or null. The largest |h| that a column tile holds of a row: its 16 bits without
  // the sign above, 0xFFFF - channel in the whole row below, so that the maximum over the tiles is that of the row and
  // the lowest channel wins among equals.
  uint32_t* keys;
  Gate gate;
  Type type;
  int tokens, slots, top_k, experts, hidden, width, max_tiles, processors;
};

// y[r] = W[e(r)] @ h[r] + bias[e(r)].
struct Down {
  const void* h;       // (S, width)
  const void* weight;  // (E, hidden, width)
  const void* bias;    // (E, hidden) or null
  const int64_t* offsets;
  const int32_t *tiles, *count;
  void* y;  // (S, hidden) - output
  Type type;
  int slots, experts, hidden, width, max_tiles, processors;
};

constexpr int key_tiles(int width, bool gated) { return gated ? (width + 127) / 128 : (width + 255) / 256; }

// Both throw std::runtime_error that names the call that failed.
void grouped_gemm_gate_up(const GateUp& arguments, cudaStream_t stream);
void grouped_gemm_down(const Down& arguments, cudaStream_t stream);

}  // namespace sedetect::cuda
