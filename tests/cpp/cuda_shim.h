// Runs the kernels of csrc/cuda on the host: blocks one after the other, and in each of them the
// threads one after the other between two synchronisations, now from the first, now from the last,
// so that a missing one shows. Shared memory and what threads keep begin as NaN.
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "block.h"
#include "device.h"

namespace cibp::cuda {

template <int THREADS>
struct HostBlock {
  int x, y, z;
  bool backwards = false;

  template <class T>
  struct PerThread {
    PerThread() : values(THREADS) { std::memset(values.data(), 0xff, THREADS * sizeof(T)); }
    T& operator[](int thread) { return values[static_cast<size_t>(thread)]; }
    std::vector<T> values;
  };
  template <class F>
  void each(const F& f) {
    for (int i = 0; i < THREADS; ++i) f(backwards ? THREADS - 1 - i : i);
    backwards = !backwards;
  }
};

template <class Kernel>
void launch(const char*, const Launch&, const Kernel& kernel) {
  const Grid grid = kernel.grid();
  for (int z = 0; z < grid.z; ++z)
    for (int y = 0; y < grid.y; ++y)
      for (int x = 0; x < grid.x; ++x) {
        std::vector<float> shared(static_cast<size_t>(kernel.shared_floats()),
                                  std::numeric_limits<float>::quiet_NaN());
        HostBlock<Kernel::kThreads> block{x, y, z};
        kernel(block, shared.data());
      }
}

}  // namespace cibp::cuda
