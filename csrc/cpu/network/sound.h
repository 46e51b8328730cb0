// What makes the bounds of a network hold in floating point: rule G of docs/soundness.md.
//
// With u half of a number's spacing at 1 and n products in a sum, d = 1.0625 (n + 24) u is more
// than what such a sum is off by, relative to that of its absolute values, in any order, and than
// some roundings more. A layer is given a box that is larger by d (|center| + radius) than its
// input's. What comes out as its radius then covers the errors of all its sums.
#pragma once

#include <cfenv>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "../vec.h"
#include "network.h"

namespace cibp {

// Rounds to nearest and keeps subnormal numbers, in this thread and in those that work for it, as
// long as this lives. Throws where that cannot be.
template <class T>
class Nearest {
 public:
  explicit Nearest(bool wanted) : wanted_(wanted) {
    if (!wanted_) return;
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
    const volatile T one = 1, half = std::numeric_limits<T>::epsilon() / 2;
    const volatile T least = std::numeric_limits<T>::min();
    const bool nearest = one + half == one && one + T(1.5) * half > one;
    if (nearest && least / 2 > 0) return;
    std::fesetenv(&before_);
    throw std::runtime_error("sound bounds need rounding to nearest, with subnormal numbers");
  }
  ~Nearest() {
    if (wanted_) std::fesetenv(&before_);
  }
  Nearest(const Nearest&) = delete;
  Nearest& operator=(const Nearest&) = delete;

 private:
  bool wanted_;
  std::fenv_t before_;
};

// The factors of a layer, 0 where bounds need not be sound.
template <class T>
struct Slack {
  T input = 0;  // how much larger, relative to |center| + radius, the box is that it is given
  T bias = 0;   // what a bias adds, relatively
  T next = 0;   // `input` of the next layer

  bool wanted() const { return input > 0; }
};

template <class T>  // more than what underflow takes from a sum
constexpr T kTiny = static_cast<T>(sizeof(T) == 4 ? 0x1p-60 : 0x1p-900);
constexpr double kMost = 0x1p80;  // larger numbers are NaN: a sum of them might overflow

// count: products of a sum; 0 for a layer whose sums are not used.
template <class T>
Slack<T> slack(int64_t count, Given given) {
  if (given != Given::kReal && given != Given::kFloat32) return {};
  const double u = static_cast<double>(std::numeric_limits<T>::epsilon()) / 2;
  const double rounded = 1.0625 * static_cast<double>(count + 24);
  // the same error once more, of every evaluation in float32
  const double theirs = given == Given::kFloat32 ? rounded * 0x1p-24 : 0;
  return {static_cast<T>(rounded * u + theirs), static_cast<T>(theirs), 0};
}

// The radius of a box that holds what [m - r, m + r] does, larger by the slack of what reads it.
// V: T, or a vector of it.
template <class T, class V>
[[gnu::always_inline]] inline V outward(V m, V r, T slack) {
  const V size = (m < 0 ? -m : m) + r, out = r + size * slack;
  return size <= T(kMost) ? out : V{} + std::numeric_limits<T>::quiet_NaN();
}

// How far a layer's sums may be from their center; radius: what the sums of the radius are.
template <class T>
[[gnu::always_inline]] inline Vec<T> reach(Vec<T> radius, Vec<T> bias, const Slack<T>& slack) {
  return radius + (absolute<T>(bias) * slack.bias + kTiny<T>);
}

// (lower, upper, nominal) -> (center, radius, nominal) of a box that is larger by the slack.
template <class T>
struct Outward {
  static constexpr int STREAMS = 3, SOURCES = 3;
  T slack;
  template <class V>
  void operator()(const V* in, V* out) const {
    const V lower = T(0.5) * in[0], upper = T(0.5) * in[1];
    out[0] = lower + upper;
    out[1] = outward<T>(out[0], upper - lower, slack);
    out[2] = in[2];
  }
};

}  // namespace cibp
