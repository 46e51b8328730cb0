// Threads and their scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace cibp {

// Calls body(thread, threads) once on each of at most `threads` threads; rethrows the first
// exception.
template <class Body>
void parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
    std::exception_ptr failure;
#pragma omp parallel num_threads(threads)
    {
      try {
        body(omp_get_thread_num(), omp_get_num_threads());
      } catch (...) {
#pragma omp critical(cibp_failure)
        if (!failure) failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  (void)threads;
  body(0, 1);
}

// The contiguous part [begin, end) of `count` items that falls to one thread: fixed by the thread
// count, so that sums over a part repeat bitwise.
struct Part {
  int64_t begin, end;
  Part(int64_t count, int thread, int threads)
      : begin(count * thread / threads), end(count * (thread + 1) / threads) {}
};

template <class Body>
void parallel_for(int threads, int64_t count, const Body& body) {
  // One thread or all, however few the items: OpenMP ends the threads that a smaller team leaves
  // out, and their scratch memory with them.
  parallel(count > 1 ? threads : 1, [&](int thread, int team) {
    const Part part(count, thread, team);
    for (int64_t i = part.begin; i < part.end; ++i) body(i);
  });
}

// What a buffer of a thread mainly holds. Buffers in use at one time are of different names; each
// is kept from call to call, and never made smaller while the thread lives.
enum class Slot {
  kPanel,
  kBias,
  kSource,
  kGradient,
  kProduct,
  kSumA,
  kSumB,
  kWidth,
  kBlockWeights,
  kPacked,
  kTilesIn,
  kTilesOut,
  kStageOdd,
  kStageEven,
  kImages,
  kCount
};

// `count` elements of the calling thread's buffer for `slot`, 64-byte aligned, uninitialised.
template <class T>
T* scratch(Slot slot, int64_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Buffer {
    std::unique_ptr<void, Free> data;
    size_t bytes = 0;
  };
  static thread_local Buffer buffers[static_cast<int>(Slot::kCount)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
#ifdef CIBP_POISON  // tests: a new block of just this size, so that ASan sees what lies outside it,
  buffer.bytes = 0;  // and a buffer that is asked for again while it is in use
#endif
  if (buffer.bytes < bytes || !buffer.data) {
    buffer = Buffer{};
    void* block = nullptr;
    if (posix_memalign(&block, 64, bytes) != 0) throw std::bad_alloc();
    buffer.data.reset(block);
    buffer.bytes = bytes;
  }
  T* data = static_cast<T*>(buffer.data.get());
#ifdef CIBP_POISON  // tests: whatever is read before it is written turns the result into NaN
  for (int64_t i = 0; i < count; ++i) data[i] = std::numeric_limits<T>::quiet_NaN();
#endif
  return data;
}

}  // namespace cibp
