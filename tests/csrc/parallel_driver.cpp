// What the threads (cpu/parallel.h) must do: OpenMP's, where there are, and the pool. Says what
// they do not, and returns whether there is any of it.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

using namespace cibp;

namespace {

// Whether every item is done once, for this many threads.
bool each_once(int threads, int64_t count) {
  std::vector<std::atomic<int>> done(static_cast<size_t>(count));
  parallel_for(threads, count, [&](int64_t i) { ++done[static_cast<size_t>(i)]; });
  for (const std::atomic<int>& times : done)
    if (times != 1) return false;
  return true;
}

bool all_once() {
  bool right = true;
  for (const int threads : {1, 2, 3, 5, 16})
    for (const int64_t count : {0, 1, 2, 3, 7, 100, 3000}) right &= each_once(threads, count);
  return right;
}

// An exception of any item comes to the caller, and the pool goes on.
bool rethrows() {
  bool right = true;
  for (int64_t bad = 0; bad < 20; ++bad) {
    std::string caught;
    try {
      parallel_for(3, 20, [&](int64_t i) {
        if (i == bad) throw std::runtime_error("item " + std::to_string(i));
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    right &= caught == "item " + std::to_string(bad) && each_once(3, 20);
  }
  return right;
}

// Several callers at a time.
bool several_callers() {
  std::atomic<bool> right{true};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&right, i] {
      for (int repeat = 0; repeat < 50; ++repeat)
        if (!each_once(2 + i % 3, 40)) right = false;
    });
  for (std::thread& caller : callers) caller.join();
  return right;
}

#ifdef _OPENMP
// A thread of OpenMP that is not run, while the caller waits for it, makes the pool be used. Before
// anything else: a busy machine may do the same at any time.
bool notices_late_threads() {
  using namespace std::chrono_literals;
  const std::thread::id self = std::this_thread::get_id();
  std::atomic<bool> helped{false};
  const bool before = busy();
  for (int attempt = 0; attempt < 100 && !busy(); ++attempt) {
    helped = false;
    parallel(2, [&](int, int) {
      if (std::this_thread::get_id() != self) {
        helped = true;
        std::this_thread::sleep_for(50ms);  // as if it were not run
      }
      for (int i = 0; i < 1000 && !helped; ++i) std::this_thread::sleep_for(1ms);
    });
  }
  return !before && busy();
}
#else
bool notices_late_threads() { return !busy(); }
#endif

// A caller does all of its job where no thread of the pool has time: here all are kept busy.
bool waits_for_nobody() {
  std::atomic<int> begun{0};
  std::atomic<bool> end{false};
  std::thread blocking([&] {
    parallel(16, [&](int, int) {  // the most threads that the tests above have asked for
      ++begun;
      while (!end) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
  });
  while (begun < 16) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const std::thread::id self = std::this_thread::get_id();
  std::atomic<int> done{0}, elsewhere{0};
  parallel(8, [&](int, int) {
    ++done;
    elsewhere += std::this_thread::get_id() != self;
  });
  end = true;
  blocking.join();
  return done == 8 && elsewhere == 0;
}

#if defined(__SANITIZE_THREAD__)
bool forks() { return true; }  // a child may not start threads under ThreadSanitizer
#else
// A forked child has threads of its own.
bool forks() {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) _exit(all_once() && rethrows() && several_callers() ? 0 : 1);
  int status = 1;
  return waitpid(child, &status, 0) == child && status == 0 && all_once();
}
#endif

// Everyone computes with the caller's rounding.
bool rounds_alike() {
  std::atomic<int> wrong{0};
  for (const int mode : {FE_UPWARD, FE_DOWNWARD, FE_TONEAREST}) {
    std::fesetround(mode);
    parallel(4, [&](int, int) { wrong += std::fegetround() != mode; });
  }
  return wrong == 0;
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // nothing is lost where a sanitizer ends the program
  int failures = 0;
  const auto check = [&](const char* name, bool right) {
    if (!right) std::printf("threads, %s: %s is wrong\n", busy() ? "pool" : "OpenMP", name);
    failures += !right;
  };
  const auto check_all = [&] {
    check("each item once", all_once());
    check("exceptions", rethrows());
    check("several callers", several_callers());
    check("rounding", rounds_alike());
    check("a forked child", forks());
  };
  check("a late thread", notices_late_threads());
  check_all();
  waited(std::chrono::hours(1));  // now the pool it is
  check_all();
  check("waiting for nobody", waits_for_nobody());
  return failures > 0;
}
