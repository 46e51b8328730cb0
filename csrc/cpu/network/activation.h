// Activations that do not fall, with which values of a graph are read.
#pragma once

#include <cstdint>
#include <cstring>

#include "../vec.h"
#include "graph.h"
#include "layers.h"

namespace cibp {

// exp(x) = whole (1 + part) for x of at most 88, 0 below the least normal number; NaN stays.
template <class T>
[[gnu::always_inline]] inline void exponential(Vec<T> x, Vec<T>* whole, Vec<T>* part) {
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr int kMantissa = kFloat ? 23 : 52, kDegree = kFloat ? 7 : 13;
  constexpr Bits<T> kBias = kFloat ? 127 : 1023;
  constexpr T kLeast = kFloat ? T(-87.3) : T(-708.3), kMost = 88;
  constexpr T kMagic = kFloat ? T(12582912.0) : T(6755399441055744.0);  // x + it is whole
  const Vec<T> low = x < kLeast ? Vec<T>{} + kLeast : x, in = low > kMost ? Vec<T>{} + kMost : low;
  const Vec<T> shifted = in * T(1.4426950408889634) + kMagic, n = shifted - kMagic;
  const Vec<T> rest = kFloat ? in - n * T(0.693359375) + n * T(2.1219444005469058e-4)
                             : in - n * T(0.6931471803691238) - n * T(1.9082149292705877e-10);
  T inverse[kDegree + 1] = {1};  // of the factorials
  for (int k = 1; k <= kDegree; ++k) inverse[k] = inverse[k - 1] / static_cast<T>(k);
  Vec<T> sum = Vec<T>{} + inverse[kDegree];
  for (int k = kDegree - 1; k >= 1; --k) sum = sum * rest + inverse[k];
  Vec<Bits<T>> bits, offset;
  const Vec<T> magic = Vec<T>{} + kMagic;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&offset, &magic, sizeof offset);
  bits = (bits - offset + kBias) << kMantissa;
  std::memcpy(whole, &bits, sizeof bits);
  *whole = x < kLeast ? Vec<T>{} : *whole;
  *part = sum * rest;
}

// Value and derivative of an activation that is not kLeaky.
template <class T>
[[gnu::always_inline]] inline void curve_at(const Activation<T>& f, Vec<T> x, Vec<T>* value,
                                            Vec<T>* derivative) {
  const Vec<T> one = Vec<T>{} + T(1);
  if (f.curve == Curve::kHardtanh) {
    const Vec<T> low = x <= f.a ? Vec<T>{} + f.a : x;
    *value = low >= f.b ? Vec<T>{} + f.b : low;
    *derivative = (x <= f.a) | (x >= f.b) ? Vec<T>{} : one + x * T(0);
    return;
  }
  const Vec<T> away = -absolute<T>(x);  // at most 0
  Vec<T> whole, part;
  if (f.curve == Curve::kExponential) {
    exponential<T>(away * f.b, &whole, &part);
    const Vec<T> grown = whole * part + (whole - one);  // exp - 1
    *value = x > 0 ? x * f.c : grown * f.a;
    *derivative = x > 0 ? Vec<T>{} + f.c : (whole + whole * part) * (f.a * f.b);
    return;
  }
  const bool sigmoid = f.curve == Curve::kSigmoid;
  exponential<T>(sigmoid ? away : away + away, &whole, &part);
  const Vec<T> power = whole + whole * part, share = one / (one + power);
  if (sigmoid) {
    *value = x > 0 ? share : power * share;
    *derivative = power * share * share;
  } else {
    const Vec<T> grown = whole * part + (whole - one), size = grown / (grown + T(2));
    *value = x > 0 ? -size : size;
    *derivative = power * share * share * T(4);
  }
}

// The activation of one vector of streams, in place.
template <class T>
[[gnu::noinline]] void bend_by_curve(const Activation<T>& f, Vec<T>* streams) {
  Vec<T> low, high, unused;
  curve_at<T>(f, streams[0] - streams[1], &low, &unused);
  curve_at<T>(f, streams[0] + streams[1], &high, &unused);
  curve_at<T>(f, Vec<T>(streams[2]), &streams[2], &unused);
  streams[0] = (low + high) * T(0.5);
  streams[1] = low == high ? Vec<T>{} : positive<T>((high - low) * T(0.5));
}

template <class T>
[[gnu::always_inline]] inline void bend(const Activation<T>& f, Vec<T>* streams) {
  if (f.none()) return;
  if (f.curve != Curve::kLeaky) return bend_by_curve<T>(f, streams);
  const Vec<T> mu = streams[0], r = streams[1], upper = mu + r, half = Vec<T>{} + T(0.5);
  if (f.relu()) {
    const Vec<T> both = positive<T>(upper) * half;
    streams[0] = mu > r ? mu : both;
    streams[1] = mu > r ? r : both;
    streams[2] = positive<T>(streams[2]);
    return;
  }
  const T slope = f.a;
  const Vec<T> low = (mu - r) * slope, high = upper <= 0 ? upper * slope : upper;
  streams[0] = mu > r ? mu : (low + high) * half;
  streams[1] = mu > r ? r : low == high ? Vec<T>{} : (high - low) * half;  // masked: inf - inf
  streams[2] = streams[2] <= 0 ? streams[2] * slope : streams[2];
}

// The gradient by what `bend` makes of `before` -> that by `before`, in place.
template <class T>
[[gnu::noinline]] void unbend_by_curve(const Activation<T>& f, const Vec<T>* before,
                                       Vec<T>* gradient) {
  Vec<T> unused, low, high, point;
  curve_at<T>(f, before[0] - before[1], &unused, &low);
  curve_at<T>(f, before[0] + before[1], &unused, &high);
  curve_at<T>(f, before[2], &unused, &point);
  const Vec<T> by_low = (gradient[0] - gradient[1]) * T(0.5) * low,
               by_high = (gradient[0] + gradient[1]) * T(0.5) * high;
  gradient[0] = by_high + by_low;
  gradient[1] = by_high - by_low;
  gradient[2] *= point;
}

template <class T>
[[gnu::always_inline]] inline void unbend(const Activation<T>& f, const Vec<T>* before,
                                          Vec<T>* gradient) {
  if (f.none()) return;
  if (f.curve != Curve::kLeaky) return unbend_by_curve<T>(f, before, gradient);
  const T slope = f.a;
  const Vec<T> mu = before[0], r = before[1], upper = mu + r, g = gradient[0], h = gradient[1];
  const Vec<T> nothing = upper * T(0);  // NaN stays NaN
  const T same = (1 + slope) / 2, other = (1 - slope) / 2;
  const auto dead = upper <= 0;
  const auto chosen = [&](Vec<T> active, Vec<T> unstable) {
    const Vec<T> below = slope == 0 ? Vec<T>{} : active * slope;
    return mu > r ? active : dead ? below : nothing + unstable;
  };
  gradient[0] = chosen(g, g * same + h * other);
  gradient[1] = chosen(h, g * other + h * same);
  const Vec<T> at = gradient[2], low = slope == 0 ? Vec<T>{} : at * slope;
  gradient[2] = before[2] <= 0 ? low : at;
}

}  // namespace cibp
