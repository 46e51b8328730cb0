// Runs the kernels of csrc/cuda on the host: blocks one after the other, and in each of them the
// threads one after the other between two synchronisations, now from the first, now from the last,
// so that a missing one shows. Shared memory and what threads keep begin as NaN.
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "device.h"
#include "precision.h"

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
  template <class F>
  void unsynced(const F& f) {
    for (int i = 0; i < THREADS; ++i) f(i);
  }
};

inline void require_capability(const char*, const Launch&, int, int) {}

// What wgmma.h has for the GPU. Copies are done at once, and so are multiplications: 128 threads
// together, with matrices where the PTX ISA (9.7.15, asynchronous warpgroup instructions) says that
// their registers and descriptors have them.

// Shared memory begins at address 0.
template <int THREADS>
uint32_t shared_address(HostBlock<THREADS>&, const float* shared, const char* p) {
  return static_cast<uint32_t>(p - reinterpret_cast<const char*>(shared));
}

template <int THREADS>
void copy16(HostBlock<THREADS>&, char* to, const void* from, bool any) {
  if (any)
    std::memcpy(to, from, 16);
  else
    std::memset(to, 0, 16);
}

template <int THREADS>
void end_copies(HostBlock<THREADS>&) {}
template <int THREADS>
void await_copies(HostBlock<THREADS>&, bool) {}
template <int THREADS>
void begin_multiply(HostBlock<THREADS>&) {}
template <int THREADS>
void end_multiply(HostBlock<THREADS>&) {}
template <int THREADS>
void await_multiply(HostBlock<THREADS>&, bool) {}

inline void settle(float (&)[32]) {}

// Element `index` of A's fragment in a thread -> row and column: wgmma m64k16, and m64k8 of tf32.
inline void place_of_a(BFloat16, int thread, int index, int* row, int* column) {
  const int group = thread % 32 / 4, in_group = thread % 4;
  const bool low = index < 2 || (index >= 4 && index < 6);
  *row = 16 * (thread / 32) + (low ? group : group + 8);
  *column = in_group * 2 + (index & 1) + (index >= 4 ? 8 : 0);
}
inline void place_of_a(float, int thread, int index, int* row, int* column) {
  *row = 16 * (thread / 32) + thread % 32 / 4 + (index & 1 ? 8 : 0);
  *column = thread % 4 + (index >= 2 ? 4 : 0);
}

template <int THREADS, class T, class Sum, class Fragment, class Descriptor>
void multiply(HostBlock<THREADS>&, T type, const Sum& sum, const Fragment& fragment,
              const Descriptor& descriptor, const float* shared) {
  constexpr int kDeep = 32 / sizeof(T), kElements = 16 / sizeof(T);
  for (int first = 0; first < THREADS; first += 128) {
    float a[64][kDeep], b[kDeep][64];
    for (int t = 0; t < 128; ++t) {
      T elements[kElements];
      std::memcpy(elements, fragment(first + t), 16);
      for (int i = 0; i < kElements; ++i) {
        int row, column;
        place_of_a(type, t, i, &row, &column);
        a[row][column] = to_float(elements[i]);
      }
    }
    // K-major without swizzle: core matrices of 8 rows (of N) by 16 bytes, row after row
    const uint64_t d = descriptor(first);
    const uint64_t start = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4;
    const uint64_t stride = (d >> 32 & 0x3fff) << 4;
    for (int k = 0; k < kDeep; ++k)
      for (int n = 0; n < 64; ++n) {
        const uint64_t byte = static_cast<uint64_t>(k) * sizeof(T);
        T element;
        std::memcpy(&element,
                    reinterpret_cast<const char*>(shared) + start + byte / 16 * leading +
                        byte % 16 + static_cast<uint64_t>(n) / 8 * stride +
                        static_cast<uint64_t>(n) % 8 * 16,
                    sizeof(T));
        b[k][n] = to_float(element);
      }
    for (int t = 0; t < 128; ++t) {
      float* const out = sum(first + t);
      for (int i = 0; i < 32; ++i) {
        const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2);
        const int column = 8 * (i / 4) + t % 4 * 2 + (i & 1);
        for (int k = 0; k < kDeep; ++k) out[i] += a[row][k] * b[k][column];
      }
    }
  }
}

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
