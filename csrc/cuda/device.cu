#include <cuda_runtime.h>

#include "launch.h"

namespace cibp::cuda {
namespace {

std::string message(cudaError_t error) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return "no CUDA driver is installed on this machine";
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

}  // namespace

void check(const char* kernel, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + message(error));
}

DeviceGuard::DeviceGuard(const char* kernel, int device) {
  check(kernel, cudaGetDevice(&before_));
  if (device == before_) return;
  check(kernel, cudaSetDevice(device));
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(before_); }

void require_capability(const char* kernel, const Launch& at, int major, int minor) {
  int found[2] = {};
  check(kernel, cudaDeviceGetAttribute(&found[0], cudaDevAttrComputeCapabilityMajor, at.device));
  check(kernel, cudaDeviceGetAttribute(&found[1], cudaDevAttrComputeCapabilityMinor, at.device));
  if (found[0] == major && found[1] == minor) return;
  const auto name = [](int a, int b) { return std::to_string(a) + "." + std::to_string(b); };
  throw std::runtime_error(std::string(kernel) + ": needs compute capability " +
                           name(major, minor) + ", and device " + std::to_string(at.device) +
                           " has " + name(found[0], found[1]));
}

std::vector<std::pair<int, int>> devices(std::string* why_none) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    *why_none = message(error);
    cudaGetLastError();  // it would be the next launch's
    return {};
  }
  if (count == 0) *why_none = "there is no CUDA device";
  std::vector<std::pair<int, int>> all(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    check("devices", cudaDeviceGetAttribute(&all[static_cast<size_t>(i)].first,
                                            cudaDevAttrComputeCapabilityMajor, i));
    check("devices", cudaDeviceGetAttribute(&all[static_cast<size_t>(i)].second,
                                            cudaDevAttrComputeCapabilityMinor, i));
  }
  return all;
}

}  // namespace cibp::cuda
