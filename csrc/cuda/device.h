// The GPUs of this machine, and where a kernel is to run. Without CUDA's headers.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace cibp::cuda {

struct Launch {
  int device;
  uintptr_t stream;  // cudaStream_t
};

// Compute capability of each device. Where there is none, `why_none` says why.
std::vector<std::pair<int, int>> devices(std::string* why_none);

}  // namespace cibp::cuda
