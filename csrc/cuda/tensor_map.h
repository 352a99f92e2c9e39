// Tensor maps, which tell the copy engine how a matrix lies in memory.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "check.h"
#include "stages.h"

namespace sedetect::cuda {

// The driver's function, found at run time: the module loads without a driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cudaGetDriverEntryPointByVersion");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("cuTensorMapEncodeTiled: not in this driver");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// A tensor in boxes, sizes and strides from the innermost dimension on; strides in bytes, of all but that. Outside are
// zeros.
template <int kRank>
CUtensorMap tensor_map_of(const void* data, const cuuint64_t (&sizes)[kRank], const cuuint64_t (&strides)[kRank - 1],
                          const cuuint32_t (&box)[kRank], CUtensorMapDataType type, CUtensorMapSwizzle swizzle) {
  CUtensorMap map;
  cuuint32_t steps[kRank];
  std::string shape;
  for (int i = 0; i < kRank; ++i) {
    steps[i] = 1;
    shape = std::to_string(sizes[i]) + (i == 0 ? "" : " x ") + shape;
  }
  const CUresult result = tensor_map_encoder()(
      &map, type, kRank, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result) + " for a tensor of " + shape);
  }
  return map;
}

inline CUtensorMapDataType data_type(Type type) {
  return type == Type::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// A matrix (rows, columns) in boxes of (box_rows, box_columns), swizzled in shared memory.
inline CUtensorMap tensor_map(const void* data, int64_t rows, int columns, int box_rows, int box_columns,
                              CUtensorMapDataType type, int element_bytes, CUtensorMapSwizzle swizzle) {
  return tensor_map_of<2>(data, {cuuint64_t(columns), cuuint64_t(rows)}, {cuuint64_t(columns) * element_bytes},
                          {cuuint32_t(box_columns), cuuint32_t(box_rows)}, type, swizzle);
}

// Of 16-bit type, in boxes of (box_rows, 64).
inline CUtensorMap tensor_map(const void* data, int64_t rows, int columns, int box_rows, Type type) {
  return tensor_map(data, rows, columns, box_rows, 64, data_type(type), 2, CU_TENSOR_MAP_SWIZZLE_128B);
}

// Of 16-bit type with columns a multiple of 16, as (columns / 16, rows, 16) in boxes of (4, box_rows, 16), as they are.
inline CUtensorMap slab_map(const void* data, int64_t rows, int columns, int box_rows, Type type) {
  return tensor_map_of<3>(data, {16, cuuint64_t(rows), cuuint64_t(columns / 16)}, {cuuint64_t(columns) * 2, 32},
                          {16, cuuint32_t(box_rows), 4}, data_type(type), CU_TENSOR_MAP_SWIZZLE_NONE);
}

}  // namespace sedetect::cuda
