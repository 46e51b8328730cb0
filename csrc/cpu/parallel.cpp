#include "parallel.h"

#include <pthread.h>
#include <time.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace cibp {
namespace {

// How long a thread of the pool looks for what it waits for before it sleeps: longer than from one
// job of a pass to its next, shorter than others would notice.
constexpr std::chrono::microseconds kSpin{50};

template <class Ready>
void spin(const Ready& ready) {
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  } while (Clock::now() < end);
}

// Threads that help callers. They are made when they are first needed, and stay.
class Pool {
 public:
  void run(Job& job, int helpers) {
    int asleep;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      make_threads(helpers);
      job.seats = helpers;
      queue_.push_back(&job);
      waiting_ = true;
      asleep = std::min(asleep_, helpers);
    }
    while (asleep-- > 0) wake_.notify_one();
    job.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    if (job.seats > 0) remove(job);  // who has not joined it by now need not
    if (job.inside == 0) return;
    lock.unlock();
    spin([&] { return job.inside == 0; });
    lock.lock();
    left_.wait(lock, [&] { return job.inside == 0; });
  }

 private:
  void make_threads(int count) {
    try {
      for (; threads_ < count; ++threads_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {  // the caller does what no thread could be made for
    }
  }

  void remove(const Job& job) {
    queue_.erase(std::find(queue_.begin(), queue_.end(), &job));
    waiting_ = !queue_.empty();
  }

  [[noreturn]] void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (queue_.empty()) {
        lock.unlock();
        spin([this] { return waiting_.load(); });
        lock.lock();
        ++asleep_;
        wake_.wait(lock, [this] { return !queue_.empty(); });
        --asleep_;
      }
      Job& job = *queue_.front();
      const int thread = ++job.joined;
      if (--job.seats == 0) remove(job);
      ++job.inside;
      lock.unlock();
      job.work(thread);
      lock.lock();
      if (--job.inside == 0) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, left_;
  std::deque<Job*> queue_;            // with seats left
  std::atomic<bool> waiting_{false};  // whether any is in the queue
  int threads_ = 0, asleep_ = 0;
};

// Never destroyed: its threads use it until the process ends.
Pool* pool = new Pool;

// What a caller waits in vain counts if it is more than waking a thread takes on a quiet machine.
// Every such wait puts off the end of the pool's use by kFactor times as long, so that at most one
// part in kFactor of the time is lost; the end lies at least kCredit in the past before, so that
// rare and short waits have no effect.
constexpr std::chrono::microseconds kWakeUp{200};
constexpr int kFactor = 20;
constexpr std::chrono::milliseconds kCredit{100};

constexpr Clock::rep count(Clock::time_point time) { return time.time_since_epoch().count(); }

std::atomic<Clock::rep> until{count(Clock::time_point::min())};  // the pool is used

// A forked child has neither OpenMP's threads nor the pool's, and somebody else may have held the
// pool's lock.
void after_fork() {
  pool = new Pool;
  until = count(Clock::time_point::max());
}
const int registered = pthread_atfork(nullptr, nullptr, after_fork);

}  // namespace

void share(Job& job, int helpers) { pool->run(job, helpers); }

bool busy() {
  static_cast<void>(registered);
  return count(Clock::now()) < until;
}

void waited(Clock::duration lost) {
  if (lost <= kWakeUp) return;
  until = std::max(until.load(), count(Clock::now() - kCredit)) + (kFactor * lost).count();
}

Clock::duration processor_time() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

}  // namespace cibp
