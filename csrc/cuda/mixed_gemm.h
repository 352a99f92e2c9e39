// Grouped GEMMs of weights stored in 8 or 4 bits with 16-bit rows: persistent, up to 288 sorted rows of one expert at a
// time. Every weight is dequantized as in kernels/dequantize.py, value * scale in float32 rounded once, so that sums
// are those of grouped_gemm.h with the dequantized weights. Launches on the current device, no synchronization. All
// tensors are contiguous and on 16-byte boundaries. Rows of no expert are not written.
#pragma once

#include "grouped_gemm.h"
#include "stages.h"

namespace sedetect::cuda {

// How weights are stored. Must agree with sedetect/ops/cuda.py.
enum class Format : int {
  kE4M3 = 0,  // a byte each, scales in float32
  kE2M1 = 1,  // two to a byte, the lower half first; scales are exponents (e8m0) of 32 columns; bfloat16 only
};

// Tiles of at most 32, 64, 160 or 288 sorted rows. Must agree with sedetect/ops/cuda.py.
enum class Form : int { kFew = 0, kSome = 1, kMany = 2, kMost = 3 };

// Weights (E, columns, inner), inner a multiple of the 16 bytes that the copy engine takes, columns one of 8.
struct Quantized {
  const void* stored;
  const void* scale;  // (E, scale_rows, scale_columns)
  Format format;
  // high rows and wide columns of a weight share a scale; wide is a power of 2 from 64 on, or all columns share one.
  int scale_rows, scale_columns, high, wide;
};

// result[r] = gate(W[e(r)] @ x[r] + bias[e(r)]): the product rounded to type as in the model, then the gate in
// float32.
struct Mixed {
  const void* x;           // (S, inner)
  Quantized weight;        // (E, 2 * width, inner); (E, width, inner) if not gated
  const void* bias;        // (E, 2 * width) or (E, width) of type, or null
  const int64_t* offsets;  // (E + 1,)
  int32_t* next;           // (1,) - scratch
  void* result;            // (S, width) - output; width is a multiple of 8
  // (mixed_column_tiles(width, gated), S) - output, or null: as GateUp's
  float* parts;
  Gate gate;         // of no activation for none
  bool interleaved;  // gate and up are its even and odd rows, not its halves
  Type type;         // not kFloat32
  Form form;
  int slots, experts, inner, width, processors;
};

// The most experts that the shared memory beside the stages holds.
constexpr int kMaxMixedExperts = 640;

// A column tile of parts is of 32 columns of h if gated, of 64 otherwise.
constexpr int mixed_column_tiles(int width, bool gated) { return gated ? (width + 31) / 32 : (width + 63) / 64; }

// Throws std::runtime_error that names the call that failed.
void mixed_gemm(const Mixed& arguments, cudaStream_t stream);

}  // namespace sedetect::cuda
