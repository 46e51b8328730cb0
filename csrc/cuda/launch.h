// Launching kernels from the host: device, stream and errors.
#pragma once

#ifndef __CUDACC__
#include "cuda_shim.h"  // of the tests, which run the kernels on the host
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "block.h"
#include "device.h"

namespace cibp::cuda {

// Makes a device the current one, and then the one that was.
class DeviceGuard {
 public:
  DeviceGuard(const char* kernel, int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// Raises std::runtime_error, which names the kernel, for anything but cudaSuccess.
void check(const char* kernel, cudaError_t error);

// Raises std::runtime_error on any other GPU.
void require_capability(const char* kernel, const Launch& at, int major, int minor);

template <class Kernel>
void launch(const char* name, const Launch& at, const Kernel& kernel) {
  const Grid grid = kernel.grid();
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    throw std::invalid_argument(std::string(name) + ": the tensors are too large for one launch");
  const DeviceGuard guard(name, at.device);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z));
  const size_t shared = static_cast<size_t>(kernel.shared_floats()) * sizeof(float);
  const void* function = reinterpret_cast<const void*>(&run<Kernel>);
  if (shared > 48 * 1024)
    check(name, cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared)));
  Kernel arguments = kernel;
  void* pointers[] = {&arguments};
  check(name, cudaLaunchKernel(function, blocks, dim3(Kernel::kThreads), pointers, shared,
                               reinterpret_cast<cudaStream_t>(at.stream)));
}

}  // namespace cibp::cuda

#endif
