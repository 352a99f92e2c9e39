// Every call of the CUDA runtime goes through check.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sedetect::cuda {

// Throws std::runtime_error that names the call that failed.
inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

}  // namespace sedetect::cuda
