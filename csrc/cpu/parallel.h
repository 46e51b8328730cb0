// Threads and their scratch memory.
//
// Work is divided into parts that follow from its shape and from the number of threads, and so do
// its numbers, bit for bit. Who is awake claims the next part: in the end it may be the caller who
// has done all of them.
//
// On a quiet machine the threads are OpenMP's. Those are torch's too, and look for work a few
// milliseconds long before they sleep: other threads would have to share the cores with them, which
// made a step of a small network up to 1.6 times as long. But an OpenMP region neither begins nor
// ends before all of its threads have come, and on a busy machine some are not run for
// milliseconds, though there may be nothing for them to do: a step of 1 ms took 60 to 110. So what
// the caller loses by that is measured, and while it is much, the threads are those of a pool of
// our own, where the caller waits only for parts that others have begun. The pool also serves
// without OpenMP, and in a forked child, which has lost OpenMP's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace cibp {

using Clock = std::chrono::steady_clock;

// Work that several threads may do at once.
struct Job {
  // Does what nobody has begun, until nothing is left. thread: 0 is the caller, 1 and up are
  // others.
  virtual void work(int thread) noexcept = 0;

  // of the pool
  int seats = 0, joined = 0;   // threads that may still join, and that have joined
  std::atomic<int> inside{0};  // that have joined and not left

 protected:
  ~Job() = default;
};

// Does the job in the calling thread and in up to `helpers` of the pool's; returns when it is done.
void share(Job& job, int helpers);

// Whether to use the pool now.
bool busy();
// Tells how long a caller has waited in vain in an OpenMP region.
void waited(Clock::duration lost);
// Processor time of the calling thread.
Clock::duration processor_time();

// The contiguous part [begin, end) of `count` items that falls to one of `parts`.
struct Part {
  int64_t begin, end;
  Part(int64_t count, int part, int parts)
      : begin(count * part / parts), end(count * (part + 1) / parts) {}
};

// body(i) for each of `count` items. A thread begins with a contiguous part of them, and then takes
// from the others' parts what is left.
template <class Body>
class Items final : public Job {
 public:
  Items(int threads, int64_t count, const Body& body)
      : threads_(threads), count_(count), body_(body), shares_(static_cast<size_t>(threads)) {
    std::fegetenv(&environment_);
  }

  void work(int thread) noexcept override {
    Share& share = shares_[static_cast<size_t>(thread)];
    share.begun = Clock::now();
    const Clock::duration used = processor_time();
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&environment_);  // the same numbers whoever computes them
    try {
      for (int k = 0; k < threads_; ++k) {
        const int owner = (thread + k) % threads_;
        const Part part(count_, owner, threads_);
        std::atomic<int64_t>& claimed = shares_[static_cast<size_t>(owner)].claimed;
        for (int64_t i; (i = part.begin + claimed.fetch_add(1)) < part.end;) body_(i);
      }
    } catch (...) {
      if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
    std::fesetenv(&own);
    share.done = Clock::now();
    share.idle = share.done - begun_ - (processor_time() - used);
  }

  // How long the caller has waited in vain, after an OpenMP region: until it began, while another
  // thread that had claimed an item was not run, and when there was nothing left to do.
  Clock::duration lost() const {
    const Share& caller = shares_[0];
    const Share& last =
        *std::max_element(shares_.begin(), shares_.end(),
                          [](const Share& a, const Share& b) { return a.done < b.done; });
    return caller.begun - begun_ + std::min(last.done - caller.done, last.idle) +
           (Clock::now() - last.done);
  }

  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  struct Share {                      // of a thread
    std::atomic<int64_t> claimed{0};  // items of its part
    Clock::time_point begun, done;
    Clock::duration idle{0};  // in which it was not run
  };

  const int threads_;
  const int64_t count_;
  const Body& body_;
  const Clock::time_point begun_ = Clock::now();
  std::fenv_t environment_;  // the caller's
  std::vector<Share> shares_;
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

// Calls body(i) once for each of `count` items, on at most `threads` threads; rethrows the first
// exception. What a body computes must not depend on which thread runs it.
template <class Body>
void parallel_for(int threads, int64_t count, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  Items<Body> items(threads, count, body);
#ifdef _OPENMP
  if (!busy()) {
    // All threads, however few the items: OpenMP ends those that a smaller team leaves out, and
    // their scratch memory with them.
#pragma omp parallel num_threads(threads)
    items.work(omp_get_thread_num());
    waited(items.lost());
    return items.rethrow();
  }
#endif
  share(items, static_cast<int>(std::min<int64_t>(threads, count)) - 1);
  items.rethrow();
}

// Calls body(part, parts) once for each of as many parts as `threads`: a part may have sums of its
// own.
template <class Body>
void parallel(int threads, const Body& body) {
  parallel_for(threads, threads, [&](int64_t part) { body(static_cast<int>(part), threads); });
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
  std::memset(data, 0xff, bytes);
#endif
  return data;
}

}  // namespace cibp
