// What the regularizer of Shi et al. (2021) needs of the boxes that an activation reads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../vec.h"
#include "layers.h"

namespace cibp {

// Sums over boxes of center c and radius r: of r, of c, of 1, c and c^2 where c > r (active units),
// and of the same where c + r < 0 (inactive ones). A unit that a bias of -infinity masks is
// inactive, and otherwise counts as 0.
constexpr int kMoments = 8;

template <class T>
[[gnu::always_inline]] inline void add_moments(const Vec<T>* streams, Vec<T>* sums) {
  const auto masked = masked_units<T>(streams);
  const Vec<T> c = streams[0], r = streams[1], one = Vec<T>{} + T(1);
  // of infinite bounds that differ the center is not known
  const Vec<T> center = masked ? Vec<T>{} : c + r * T(0), square = center * center;
  sums[0] += masked ? Vec<T>{} : r;
  sums[1] += center;
  const auto add_where = [&](auto where, Vec<T>* to) {
    to[0] += where ? one : Vec<T>{};
    to[1] += where ? center : Vec<T>{};
    to[2] += where ? square : Vec<T>{};
  };
  add_where(c > r, sums + 2);
  add_where(c + r < 0, sums + 5);
}

// The gradients by those sums.
template <class T>
struct MomentGradient {
  std::vector<T> radius, center;  // [channels], padded by zeros
  T active, active_square, inactive, inactive_square;

  // by: of the kMoments sums, `stride` elements apart, to be divided by count.
  MomentGradient(const double* by, int64_t stride, double count, int64_t channels, int64_t padded)
      : radius(static_cast<size_t>(padded)), center(static_cast<size_t>(padded)) {
    const auto of = [&](int64_t k) { return static_cast<T>(by[k * stride] / count); };
    std::fill_n(radius.begin(), channels, of(0));
    std::fill_n(center.begin(), channels, of(1));
    active = of(3);
    active_square = of(4);
    inactive = of(6);
    inactive_square = of(7);
  }

  // Adds them to the gradient by the streams of one vector.
  [[gnu::always_inline]] void add_to(int64_t channel, const Vec<T>* streams,
                                     Vec<T>* gradient) const {
    const auto at = static_cast<size_t>(channel);
    const Vec<T> c = streams[0], r = streams[1], twice = c + c;
    const auto masked = masked_units<T>(streams);
    const Vec<T> by_center = load(&center[at]) +
                             (c > r ? twice * active_square + active : Vec<T>{}) +
                             (c + r < 0 ? twice * inactive_square + inactive : Vec<T>{});
    gradient[0] += masked ? Vec<T>{} : by_center;
    gradient[1] += masked ? Vec<T>{} : load(&radius[at]);
  }
};

}  // namespace cibp
