// The arithmetic limit of this machine: multiply-adds of registers with registers.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace cibp {

// Floating-point operations a second (a multiply-add counts as two) of all threads together, the
// best of `repeats` runs.
template <class T>
double peak_flops(int threads, int repeats) {
  constexpr int A = kAccumulators;  // independent: enough to hide the latency
  constexpr int64_t kRounds = 2000000;
  double best = 0;
  std::vector<T> results(static_cast<size_t>(threads));
  for (int repeat = 0; repeat < repeats; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    parallel(threads, [&](int part, int) {
      Vec<T> sums[A], factor = broadcast(T(0.5)), term = broadcast(T(1));
      for (int i = 0; i < A; ++i) sums[i] = broadcast(static_cast<T>(i));
      for (int64_t round = 0; round < kRounds; ++round) {
        pin(factor);  // nothing can be computed before
#pragma GCC unroll 32
        for (int i = 0; i < A; ++i) sums[i] = sums[i] * factor + term;
      }
      Vec<T> total = sums[0];
      for (int i = 1; i < A; ++i) total += sums[i];
      results[static_cast<size_t>(part)] = sum<T>(total);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double operations = static_cast<double>(threads * kRounds * A * kLanes<T> * 2);
    best = std::max(best, operations / seconds.count());
    for (const T& result : results) {  // so that nothing can be left out
      const volatile T kept = result;
      static_cast<void>(kept);
    }
  }
  return best;
}

}  // namespace cibp
