// The grouped GEMM of mixed_gemm.h by the form that suits its rows.

#include "mixed_gemm.cuh"

namespace sedetect::cuda {

void mixed_gemm(const Mixed& m, cudaStream_t stream) {
  const Quantized& w = m.weight;
  int wide_bits = 0;
  while (w.scale_columns > 1 ? 1 << wide_bits < w.wide : wide_bits < 31) ++wide_bits;
  const Arguments arguments{m.offsets,
                            m.next,
                            m.bias,
                            m.result,
                            m.parts,
                            m.gate,
                            m.interleaved,
                            m.experts,
                            m.gate.gated ? 2 * m.width : m.width,
                            m.inner,
                            m.width,
                            m.slots,
                            {w.scale, w.scale_rows, w.scale_columns, w.high, wide_bits},
                            0x7654};
  switch (m.form) {
    case Form::kFew:
      return mixed_few(m, arguments, stream);
    case Form::kSome:
      return mixed_some(m, arguments, stream);
    case Form::kMany:
      return mixed_many(m, arguments, stream);
    case Form::kMost:
      return mixed_most(m, arguments, stream);
  }
}

}  // namespace sedetect::cuda
