// How the bodies of kernels are written, so that a host compiler takes them too.
//
// A body is a function of a block: block.x, block.y and block.z say which one it is, and
// block.each(f) calls f(thread) for each of its threads and then synchronises them
// (block.unsynced(f) does not). What a thread keeps from one `each` to the next is a PerThread. On
// the GPU (DeviceBlock) `each` is a call and a
// __syncthreads(); the tests run the same body in loops (tests/csrc/cuda_shim.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define CIBP_DEVICE __device__ __forceinline__
#define CIBP_HOST_DEVICE __host__ __device__ __forceinline__
#define CIBP_UNROLL _Pragma("unroll")
#else
#define CIBP_DEVICE inline
#define CIBP_HOST_DEVICE inline
#define CIBP_UNROLL
#endif

namespace cibp::cuda {

#ifdef __CUDACC__
struct DeviceBlock {
  int x = static_cast<int>(blockIdx.x), y = static_cast<int>(blockIdx.y),
      z = static_cast<int>(blockIdx.z);
  template <class T>
  struct PerThread {
    T value;
    CIBP_DEVICE T& operator[](int) { return value; }
  };
  template <class F>
  CIBP_DEVICE void each(const F& f) {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  template <class F>
  CIBP_DEVICE void unsynced(const F& f) {
    f(static_cast<int>(threadIdx.x));
  }
};

// Runs a kernel: a struct of arguments whose call operator is the body. All of its shared memory is
// dynamic. kMinBlocks bounds the
// registers of a thread: left alone, ptxas spills some to use fewer.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    run(const __grid_constant__ Kernel kernel) {
  extern __shared__ float4 shared[];
  DeviceBlock block;
  kernel(block, reinterpret_cast<float*>(shared));
}
#endif

struct Grid {
  int64_t x, y, z;
};

// N values that are read and written together.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

template <int N, class T>
CIBP_DEVICE Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <int N, class T>
CIBP_DEVICE void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

template <class T>
inline bool aligned(const T* p) {  // for any Pack
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// The smallest power of 2 that is at least n, but at most `most`.
inline int power_of_2(int64_t n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

CIBP_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Adds up values[0], ..., values[THREADS - 1] in shared memory; `store` gets the sum, in one
// thread. The order is fixed.
template <int THREADS, class Block, class Store>
CIBP_DEVICE void sum_block(Block& block, float* values, const Store& store) {
  for (int half = THREADS / 2; half > 0; half /= 2)
    block.each([&](int thread) {
      if (thread < half) values[thread] += values[thread + half];
    });
  block.each([&](int thread) {
    if (thread == 0) store(values[0]);
  });
}

}  // namespace cibp::cuda
