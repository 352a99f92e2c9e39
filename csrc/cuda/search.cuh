// Which of the runs that stand one after another holds a place.
#pragma once

namespace sedetect::cuda {

// ends[i]: the end of run i. There is a run that ends after the place.
__device__ __forceinline__ int first_that_ends_after(const int* ends, int number, int place) {
  int low = 0, high = number - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] > place)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

}  // namespace sedetect::cuda
