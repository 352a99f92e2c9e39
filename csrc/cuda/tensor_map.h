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

// A matrix (rows, columns) in boxes of (box_rows, box_columns), swizzled in shared memory. Outside it are zeros.
inline CUtensorMap tensor_map(const void* data, int64_t rows, int columns, int box_rows, int box_columns,
                              CUtensorMapDataType type, int element_bytes, CUtensorMapSwizzle swizzle) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * element_bytes};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = tensor_map_encoder()(
      &map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result) + " for a matrix of " +
                             std::to_string(rows) + " x " + std::to_string(columns));
  }
  return map;
}

// Of 16-bit type, in boxes of (box_rows, 64).
inline CUtensorMap tensor_map(const void* data, int64_t rows, int columns, int box_rows, Type type) {
  return tensor_map(data, rows, columns, box_rows, 64,
                    type == Type::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                    CU_TENSOR_MAP_SWIZZLE_128B);
}

// A matrix (rows, columns) of 16-bit type, columns a multiple of 16, as (columns / 16, rows, 16) in boxes of
// (4, box_rows, 16).
inline CUtensorMap slab_map(const void* data, int64_t rows, int columns, int box_rows, Type type) {
  CUtensorMap map;
  const cuuint64_t sizes[3] = {16, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(columns / 16)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(columns) * 2, 32};
  const cuuint32_t box[3] = {16, static_cast<cuuint32_t>(box_rows), 4};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = tensor_map_encoder()(
      &map, type == Type::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result) + " for a matrix of " +
                             std::to_string(rows) + " x " + std::to_string(columns));
  }
  return map;
}

}  // namespace sedetect::cuda
